"""What the compiler made of the kernels: what is compiled is recorded, keeps its promises, and is as recorded."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resource_files

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "kernels/tools/resources.py"
PACKAGE = ROOT / "kernels/torch-ext/llmcompress_kernels"
OPERATORS = sorted(path.parent.name for path in PACKAGE.glob("*/launch.py"))
TILE, WIDTH = 128, 16  # input columns of an int4 weight in a round, and those of a plane
PARTS = re.compile(r" no bias .*parts ").search
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
def test_a_table_is_of_the_kernels_of_today(operator):
    why = f"its kernels were changed: run python kernels/tools/resources.py {operator}"
    assert table(operator)["sources"] == resource_files.digest(operator), why


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_kernels_keep_their_promises(operator):
    """In registers, weights by wide loads and without conversions; tensor cores where they are meant to be."""
    for case in resources().cases(operator):
        name, row = case.name(), table(operator)["kernels"][case.name()]
        assert row["spills"] == row["stack_bytes"] == row["conversions"] == row["weight_loads_narrow"] == 0, name
        assert row["shared_bytes"] <= SHARED_LIMIT, name
        assert row["weight_loads_128"] == wide_loads(case.configuration), name
        assert (row["tensor_core"] > 0) == ("gemm" in case.configuration.kernel), name


def wide_loads(made: Any) -> float:
    """Loads of 16 bytes in the code of a thread, as its tile implies them: a narrower one would be missing.

    A pipeline has the loads of a round as often as it has stages: before the loop, and once in it.
    """
    if not made.weights:
        return 0
    threads = 32 * made.warps
    loads = made.weights * wide_bits(made.kernel) / 8 / threads / 16
    x = WIDTH * made.constants.get("BM", 0) / threads  # numbers of a plane of x for each thread: from 8 on 16 bytes
    if x >= 8 and made.kernel in ("int4_gemm", "lora_gemm"):
        loads += TILE / WIDTH * x / 8
    return loads * (made.stages if "gemm" in made.kernel else 1)


def wide_bits(kernel: str) -> int:
    """Of a weight, in loads of 16 bytes."""
    others = {"sparse24_gemm": 9, "sparse24_int4_gemm_sp": 3, "teal_gemv": 16}
    if kernel in others:
        return others[kernel]
    return {"sparse24_int4": 2, "sparse24": 8}.get(kernel.rpartition("_")[0], 4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_float16_takes_hardly_more_registers(operator):
    """So what is compiled in bfloat16 alone has room for it, unless it is one of the few that take nearly all."""
    rows, most = table(operator)["kernels"], resources().FLOAT16_REGISTERS
    for name, row in rows.items():
        if " bf16 " in name:
            other = rows.get(name.replace(" bf16 ", " fp16 "))
            assert other is None or other["registers"] <= row["registers"] + most, name
            assert other is not None or PARTS(name) or row["registers"] + most <= 255, name


@pytest.mark.parametrize("operator", OPERATORS)
def test_parts_of_splits_take_few_more_registers(operator):
    """So what is not compiled in parts has room for them. `sparse24_gemm` has a tile that is never split."""
    rows, most = table(operator)["kernels"], resources().PARTS_REGISTERS
    in_parts = {name.replace(" no bias", "").replace(" parts ", " "): row for name, row in rows.items() if PARTS(name)}
    kernels = {name.split()[0] for name in in_parts}
    for name, row in rows.items():
        if name in in_parts:
            assert in_parts[name]["registers"] <= row["registers"] + most, name
        elif not PARTS(name) and name.split()[0] in kernels and "sparse24_gemm" not in name:
            assert " fp16 " in name or row["registers"] + most <= 255, name


def needs_the_same_compiler(operator: str) -> None:
    triton = pytest.importorskip("triton")
    recorded = table(operator)["triton"]
    if triton.__version__ != recorded:
        pytest.skip(f"the table is of triton {recorded}, this is {triton.__version__}")


def samples() -> list[tuple[str, str]]:
    """Operators, and of each the kind of kernels that multiply one token, and few."""
    kinds = [(operator, kind) for operator in OPERATORS for kind in ("gemv", "gemm")]
    return [(operator, kind) for operator, kind in kinds if any(kind in n for n in table(operator)["kernels"])]


@pytest.mark.parametrize(("operator", "kind"), samples())
def test_a_kernel_is_what_the_compiler_makes_now(operator, kind, tmp_path, monkeypatch):
    """The shortest of its kind: all others take minutes."""
    needs_the_same_compiler(operator)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    tool, rows = resources(), table(operator)["kernels"]
    cases = [c for c in tool.cases(operator) if kind in c.configuration.kernel and c.configuration.weights]
    case = min(cases, key=lambda case: rows[case.name()]["instructions"])
    compiled = tool.compile_case(case)
    assert tool.facts_of(case, compiled) == rows[case.name()]
    assert tool.hinted_bytes(compiled) == hinted_bytes(case.configuration)


def hinted_bytes(made: Any) -> float:
    """Of the packed weights of a round, as often as the pipeline loads them; x and what is small have no hint."""
    bits = 8 if made.kernel == "sparse24_gemm" else wide_bits(made.kernel)
    return made.weights * bits / 8 * (made.stages if "gemm" in made.kernel else 1)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_table_is_what_the_compiler_makes_now(operator):
    needs_the_same_compiler(operator)
    command = [sys.executable, str(TOOL), operator, "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_changed_configuration_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(resource_files, "TABLES", tmp_path)
    monkeypatch.setattr(resource_files, "digest", lambda operator: "of today")
    differences = resource_files.differences
    assert "no " in differences("some", {}, set())[0]
    resource_files.write("some", {"a": {"registers": 1}, "b": {"registers": 2}})
    assert differences("some", {"a": {"registers": 1}}, {"a", "b"}) == []
    assert "registers" in differences("some", {"a": {"registers": 3}}, {"a", "b"})[0]
    assert differences("some", {}, {"a", "b", "c"}) == ["c: not in the table"]
    assert differences("some", {}, {"a"}) == ["b: no such configuration"]


def test_only_rows_of_the_same_kernels_are_kept(tmp_path, monkeypatch):
    tool, rows = resources(), {"a": {"registers": 1}}
    monkeypatch.setattr(resource_files, "TABLES", tmp_path)
    monkeypatch.setattr(resource_files, "digest", lambda operator: "of yesterday")
    assert resource_files.still_true("some") == {}
    resource_files.write("some", rows)
    assert resource_files.still_true("some") == rows
    case = type("Case", (), {"name": lambda self: "a"})()
    monkeypatch.setattr(tool, "cases", lambda operator: [case])
    assert tool.run("some", missing=True) == []  # nothing was compiled
    assert table_of(tmp_path) == rows
    monkeypatch.setattr(resource_files, "digest", lambda operator: "of today")
    assert resource_files.still_true("some") == {}


def table_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "some.json").read_text())["kernels"]


def test_a_digest_is_of_code_and_not_of_words_about_it():
    code = '@jit\ndef f(x):\n    """Doubled."""\n    # as written\n    return "#" + 2 * x  # twice\n'
    same = '"""A module."""\n\n\n@jit\ndef f(x):\n    return "#" + 2 * x\n'
    assert resource_files.code_of(code) == resource_files.code_of(same) == '@jit\ndef f(x):\n    return "#" + 2 * x'
    assert resource_files.code_of(code) != resource_files.code_of(code.replace("2", "3"))


def test_a_digest_is_of_all_that_a_kernel_imports():
    found = {path.relative_to(PACKAGE).as_posix() for path in resource_files.sources("int4_lora_linear")}
    assert found == {"int4_lora_linear/kernel.py", "int4_linear/kernel.py", "outputs.py", "words.py"}


def test_the_readme_has_the_tables_of_today():
    text = resource_files.README.read_text(encoding="utf-8")
    assert resource_files.with_tables(text) == text, "run python kernels/tools/resources.py --readme"
    with pytest.raises(ValueError, match="has no line <!-- resources: begin -->"):
        resource_files.with_tables("# Kernels\n")
