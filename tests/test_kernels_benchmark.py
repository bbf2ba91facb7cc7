"""The GPU benchmark, on CPU: its table of operators, what it refuses, what it writes, and its arithmetic."""

import dataclasses
import json
import re
from pathlib import Path

import cases
import gpu
import llmcompress_kernels
import measuring
import pytest
import timing
import torch
import variants
from cases import LARGE, OPERATORS, TARGETS, Target
from layers import GROUP, SHAPES, TOKENS, int4_layer
from measuring import Check, Clock, Failure, Plan
from peers import BF16, TORCH_INT4, Implementation
from summary import in_words, lines, verdict

TINY = gpu.plan(torch.device("cpu"), quick=True)
INT4 = OPERATORS[0]
PACKAGE = Path(llmcompress_kernels.__file__).parent
README = Path(gpu.__file__).parents[1] / "README.md"
QUICK = ["--device", "cpu", "--quick"]


# the table


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_operator_can_be_compared(operator):
    names = [made.name for made in (operator.ours, *operator.baselines)]
    assert len(names) == len(set(names))
    assert operator.baselines[0].name == "bf16"  # its error is the measure of all others
    assert operator.shapes()
    assert set(operator.parts) <= {shape.parts for shape in SHAPES}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.text())
def test_every_target_can_be_measured(target):
    assert set(target.tokens) <= set(TOKENS)
    for operator in OPERATORS:
        if operator.name == target.operator:
            assert target.against in {made.name for made in operator.baselines}
            assert any(cases.int4_bytes(s.rows, s.columns) >= target.int4_bytes for s in operator.shapes())


def test_the_readme_has_all_targets():
    rows = re.findall(r"^\| `.*\| [\d.]+x \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(TARGETS)
    for row, target in zip(rows, TARGETS, strict=True):
        assert row.startswith(f"| `{target.operator}` |")
        assert row.endswith(f" {target.at_least}x |")


def test_every_operator_has_a_row():
    assert {path.parent.name for path in PACKAGE.glob("*/launch.py")} == {operator.name for operator in OPERATORS}


def test_layers_come_by_importance():
    sizes = [shape.rows * shape.columns for _, shape in measuring.units(Plan(torch.device("cpu"), 1))]
    assert sizes[0] == max(sizes)
    assert [shape.model for shape in SHAPES[::4]] == ["Llama 70B", "Llama 8B", "Llama 1B"]
    assert sum(cases.int4_bytes(s.rows, s.columns) >= LARGE for s in SHAPES) == 3  # of Llama 70B all but k and v


def test_dense_weights_are_what_the_codes_say():
    layer = int4_layer(8, 64, 32, symmetric=False, generator=torch.Generator().manual_seed(0))
    assert layer.zero is not None
    for n, k in ((0, 0), (3, 31), (7, 63)):
        value = (int(layer.codes[n, k]) - int(layer.zero[k // 32, n])) * float(layer.scale[k // 32, n])
        assert float(layer.dense(torch.float64)[n, k]) == value


# correctness


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_operators_and_baselines_are_right_on_cpu(operator):
    rows = list(measuring.check(operator, TINY))
    assert {row["name"] for row in rows} == {
        made.name for made in measuring.usable((operator.ours, *operator.baselines), TINY)
    }
    assert measuring.wrong(rows) == set()
    assert {row["tokens"] for row in rows} == {1, 3}
    assert {row["symmetric"] for row in rows} == ({False, True} if operator.zeros else {True})


def test_other_ways_to_call_operators_are_right_on_cpu():
    rows = list(variants.check_variants(torch.device("cpu")))
    assert [row for row in rows if not row["right"]] == []
    assert {row["operator"] for row in rows} == {operator.name for operator in OPERATORS} - {"teal_linear"}
    for what, values in {"dtype": 2, "bias": 2, "strided": 2, "tokens": 3, "variant": 5}.items():
        assert len({row[what] for row in rows}) == values, what


@pytest.mark.parametrize(
    "spoil",
    [lambda y: 1.1 * y, lambda y: y + torch.rand(()).to(y.dtype) / 1000, None],
    ids=["scale", "random", "fails"],
)
def test_a_wrong_variant_is_seen(monkeypatch, spoil):
    def ours(x, bias):
        return spoil(x)  # which fails, if there is nothing to call

    wrong = variants.Variant("some", "", ours, lambda x, bias, to: x.to(to), torch.bfloat16)
    monkeypatch.setattr(variants, "variants", lambda device: [wrong])
    rows = list(variants.check_variants(torch.device("cpu")))
    assert not any(row["right"] for row in rows)


@pytest.mark.parametrize("spoil", [lambda y: 1.1 * y, lambda y: y * torch.nan], ids=["another scale", "NaN"])
def test_what_is_wrong_is_not_timed(monkeypatch, spoil):
    bad = dataclasses.replace(INT4.ours, call=lambda x, weight: spoil(INT4.ours.call(x, weight)))
    monkeypatch.setattr(measuring, "OPERATORS", (dataclasses.replace(INT4, ours=bad),))
    monkeypatch.setattr(gpu, "OPERATORS", measuring.OPERATORS)
    found = gpu.report(TINY, Clock(60))
    assert measuring.wrong(found["correctness"]) == {("int4_linear", "int4_linear")}
    assert found["results"] == []
    assert gpu.exit_code(found) == 1
    assert any(line.startswith("WRONG  int4_linear") for line in gpu.notes(found))


def test_a_baseline_that_fails_is_reported_and_hurts_nothing(monkeypatch):
    def refuse(layer):
        raise ValueError("not this one")

    other = Implementation("other", refuse, lambda x, weight: x)
    late = Implementation("late", lambda layer: layer.codes, lambda x, codes: x @ codes)
    monkeypatch.setattr(measuring, "OPERATORS", (dataclasses.replace(INT4, baselines=(BF16, other, late)),))
    findings = measuring.measure(TINY, Clock(60), 1e9, set())
    assert {row["name"]: row["why"] for row in findings.failures}["other"] == "ValueError: not this one"
    assert {row["tokens"] for row in findings.failures if row["name"] == "late"} == set(TINY.tokens)
    assert all(set(result["peers"]) == {"bf16"} for result in findings.results)
    assert len(findings.results) == 2 * len(TINY.tokens)


# the whole program


def test_a_tiny_run_writes_everything(tmp_path, capsys):
    output = tmp_path / "gpu.json"
    assert gpu.main([*QUICK, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert set(found) == {
        "schema", "date", "commit", "machine", "versions", "group", "dtype", "budget_seconds", "seconds",
        "copy_bytes_per_second", "correctness", "missing", "results", "failures", "left_out", "targets",
    }  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["missing"]) == {"gemlite", "marlin", "torch 2:4", "with a form"}
    assert found["failures"] == found["left_out"] == []
    measured = [(r["operator"], r["rows"], r["columns"], r["tokens"]) for r in found["results"]]
    assert measured == [
        (operator.name, shape.rows, shape.columns, tokens)
        for operator, shape in measuring.units(TINY)
        for tokens in (1, 4)
    ]
    assert {operator for operator, *_ in measured} == {operator.name for operator in OPERATORS}
    assert all(r["peers"].keys() >= {"bf16"} for r in found["results"])
    for result in [r for r in found["results"] if r["operator"] == "int4_linear"]:
        rows, columns, tokens = result["rows"], result["columns"], result["tokens"]
        assert result["packed_bytes"] == cases.int4_bytes(rows, columns)
        assert result["bytes"] == result["packed_bytes"] + 2 * tokens * (rows + columns)
        assert result["share_of_copy"] == pytest.approx(
            result["bytes"] / result["seconds"] / found["copy_bytes_per_second"]
        )
        for peer in ("bf16", "torch int4"):
            assert result["peers"][peer]["ratio"] == pytest.approx(result["peers"][peer]["seconds"] / result["seconds"])
    assert all(target["met"] is None for target in found["targets"])  # no layer of a model was measured
    printed = capsys.readouterr().out
    assert "tiny gate, up" in printed
    assert f"not measured  {TARGETS[0].text()}" in printed
    assert "not measured  gemlite: runs on a GPU alone" in printed


def test_what_the_time_does_not_allow_is_left_out(tmp_path, capsys):
    output = tmp_path / "gpu.json"
    assert gpu.main([*QUICK, "--minutes", "0", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["results"] == []
    cases_ = 2 * len(list(measuring.units(TINY)))
    assert len(found["left_out"]) == cases_
    assert f"{cases_} cases did not fit in 0 minutes" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "finds no CUDA device" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_on_a_gpu_a_tiny_run_is_right(tmp_path):
    assert gpu.main(["--quick", "--output", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failures"] == []
    assert len(found["results"]) == 2 * len(list(measuring.units(TINY)))


# time


def test_a_clock_leaves_room_for_the_slowest_case_of_late():
    clock = Clock(100)
    assert clock.has_room()
    clock.note(49)
    assert clock.has_room()
    clock.note(51)
    assert not clock.has_room()
    for _ in range(8):
        clock.note(1)
    assert clock.has_room()


def test_copies_fill_the_cache():
    weight = INT4.ours.prepare(int4_layer(64, GROUP, GROUP, True, torch.Generator()))
    assert timing.size(weight) == cases.int4_bytes(64, GROUP)
    made = timing.copies(weight, 10 * timing.size(weight))
    assert len(made) == 10 * timing.CACHES
    assert len({copy.words.data_ptr() for copy in made}) == len(made)
    assert len(timing.copies(weight, 0)) == 2
    packed = TORCH_INT4.prepare(int4_layer(64, GROUP, GROUP, True, torch.Generator()))
    assert timing.size(packed) == 64 * GROUP // 2 + 2 * 64 * 2


def test_medians_are_of_one_run(monkeypatch):
    ticks = {"slow": 3.0, "quick": 0.001}
    monkeypatch.setattr(timing, "elapsed", lambda run, times, device: times * run())
    runs = {name: lambda name=name: ticks[name] for name in ticks}
    assert timing.medians(runs, torch.device("cpu"), 3) == pytest.approx(ticks)


# targets


def result(tokens: int, rows: int, columns: int, ratio: float | None) -> dict[str, object]:
    peers = {} if ratio is None else {"bf16": {"seconds": 1.0, "ratio": ratio}}
    return {"operator": "int4_linear", "model": "Llama 8B", "parts": "q, o", "tokens": tokens, "rows": rows,
            "columns": columns, "seconds": 1e-5, "share_of_copy": 0.5, "peers": peers}  # fmt: skip


LINEAR = Target("int4_linear", "bf16", (1,), 3.1, LARGE)


@pytest.mark.parametrize(
    ("ratios", "met"), [((3.5, 3.1), True), ((3.5, 3.09), False), ((), None), ((None,), None)], ids=str
)
def test_a_target_is_met_by_the_worst_case(ratios, met):
    large = [result(1, 8192, 8192, ratio) for ratio in ratios]
    others = [result(16, 8192, 8192, 0.1), result(1, 4096, 4096, 0.1)]  # other tokens, and too small
    found = verdict(LINEAR, [*large, *others])
    assert found["met"] is met
    if met is not None:
        assert found["worst"] == min(ratios)
        assert found["cases"] == len(ratios)
    word = {True: "met", False: "missed", None: "not measured"}[met]
    assert in_words(found).startswith(word)


def test_size_of_layers_in_a_target():
    assert cases.int4_bytes(8192, 8192) >= LARGE > cases.int4_bytes(14336, 4096)
    assert LINEAR.text() == "int4_linear at least 3.1x bf16 at M = 1, layers of 32 MB and more"


def test_the_printed_table_has_a_dash_for_what_was_not_measured():
    header, first, second = lines([result(1, 64, 64, 2.0), result(1, 64, 64, None)])
    assert header.split()[-1] == "bf16"
    assert first.split()[-1] == "2.00x"
    assert second.split()[-1] == "-"
    assert list(lines([])) == []


def test_exit_code_is_one_for_a_missed_target():
    found = {"correctness": [], "failures": [], "targets": [{"met": True}, {"met": None}]}
    assert gpu.exit_code(found) == 0
    assert gpu.exit_code(found | {"targets": [{"met": False}]}) == 1
    failure = {"operator": "int4_linear", "name": "int4_linear"}
    assert gpu.exit_code(found | {"failures": [failure]}) == 1
    assert gpu.exit_code(found | {"failures": [failure | {"name": "gemlite"}]}) == 0


def test_an_attempt_gives_its_result_or_its_failure():
    assert measuring.attempt(lambda: 3) == 3
    assert measuring.attempt(lambda: [][0]) == Failure("IndexError: list index out of range")
    assert not Check(8, 64, 32, True).has_baselines()
