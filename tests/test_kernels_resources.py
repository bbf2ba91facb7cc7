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


def needs_the_same_compiler(operator: str) -> None:
    triton = pytest.importorskip("triton")
    recorded = table(operator)["triton"]
    if triton.__version__ != recorded:
        pytest.skip(f"the table is of triton {recorded}, this is {triton.__version__}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_is_what_the_compiler_makes_now(operator, tmp_path, monkeypatch):
    """The first one with weights: the others take minutes."""
    needs_the_same_compiler(operator)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    tool = resources()
    case = next(c for c in tool.cases(operator) if c.configuration.weights and c.architecture == 90)
    assert tool.facts(case) == table(operator)["kernels"][case.name()]


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_table_is_what_the_compiler_makes_now(operator):
    needs_the_same_compiler(operator)
    command = [sys.executable, str(TOOL), operator, "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_changed_configuration_is_seen(tmp_path, monkeypatch):
    tool = resources()
    monkeypatch.setattr(tool, "TABLES", tmp_path)
    assert "no " in tool.differences("some", {}, set())[0]
    tool.write("some", {"a": {"registers": 1}, "b": {"registers": 2}})
    assert tool.differences("some", {"a": {"registers": 1}}, {"a", "b"}) == []
    assert "registers" in tool.differences("some", {"a": {"registers": 3}}, {"a", "b"})[0]
    assert tool.differences("some", {}, {"a", "b", "c"}) == ["c: not in the table"]
    assert tool.differences("some", {}, {"a"}) == ["b: no such configuration"]
