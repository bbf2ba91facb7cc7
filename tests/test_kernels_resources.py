"""What the compiler made of the kernels: every configuration is recorded, keeps its promises, and is as recorded."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "kernels/tools/resources.py"
PACKAGE = ROOT / "kernels/torch-ext/llmcompress_kernels"
OPERATORS = sorted(path.parent.name for path in PACKAGE.glob("*/launch.py"))
SHARED_LIMIT = 99 * 1024  # bytes that a block may have on every one of the architectures


@functools.cache
def resources() -> Any:
    """kernels/tools/resources.py as a module."""
    spec = importlib.util.spec_from_file_location("kernel_resources", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@functools.cache
def table(operator: str) -> dict[str, Any]:
    return json.loads((ROOT / f"kernels/resources/{operator}.json").read_text(encoding="utf-8"))


def test_every_operator_is_compiled():
    assert resources().operators() == OPERATORS
    assert {path.stem for path in (ROOT / "kernels/resources").glob("*.json")} == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_table_has_every_configuration(operator):
    names = [case.name() for case in resources().cases(operator)]
    assert len(names) == len(set(names)), "two configurations have one name"
    assert set(names) == table(operator)["kernels"].keys()


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_kernels_keep_their_promises(operator):
    """In registers, weights by wide loads and without conversions; tensor cores where they are meant to be."""
    for case in resources().cases(operator):
        name, row = case.name(), table(operator)["kernels"][case.name()]
        assert row["spills"] == row["stack_bytes"] == row["conversions"] == row["weight_loads_narrow"] == 0, name
        assert row["shared_bytes"] <= SHARED_LIMIT, name
        assert (row["weight_loads_128"] > 0) == (case.configuration.weights > 0), name
        assert (row["tensor_core"] > 0) == ("gemm" in case.configuration.kernel), name


def check(*options: str) -> None:
    """Compiles and compares; skips for another compiler than that of the tables."""
    triton = pytest.importorskip("triton")
    recorded = {table(operator)["triton"] for operator in OPERATORS}
    if recorded != {triton.__version__}:
        pytest.skip(f"the tables are of triton {recorded}, this is {triton.__version__}")
    ran = subprocess.run([sys.executable, str(TOOL), "--check", *options], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_some_of_the_tables_are_what_the_compiler_makes_now():
    check("--sample", "4")


@pytest.mark.slow
def test_the_tables_are_what_the_compiler_makes_now():
    check()


def test_a_changed_configuration_is_seen(tmp_path, monkeypatch):
    tool = resources()
    monkeypatch.setattr(tool, "TABLES", tmp_path)
    assert "no " in tool.differences("some", {}, set())[0]
    tool.write("some", {"a": {"registers": 1}, "b": {"registers": 2}})
    assert tool.differences("some", {"a": {"registers": 1}}, {"a", "b"}) == []
    assert "registers" in tool.differences("some", {"a": {"registers": 3}}, {"a", "b"})[0]
    assert tool.differences("some", {}, {"a", "b", "c"}) == ["c: not in the table"]
    assert tool.differences("some", {}, {"a"}) == ["b: no such configuration"]


def test_a_sample_is_spread_over_all_cases():
    spread = resources().spread
    assert list(spread(range(100), 4)) == [0, 33, 66, 99]
    assert list(spread(range(3), 4)) == list(spread(range(3), None)) == [0, 1, 2]
    assert list(spread(range(9), 1)) == [0]
