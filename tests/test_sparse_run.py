"""Whole runs that prune: zeros in every file, in every later step, and in what stock libraries load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, some_slow
from tiny_runs import proof_inside, recipe, reloaded, tensors, write_text

from llmcompress import load
from llmcompress.errors import CalibrationError, FormatError, NumericalError, PlanError, RecipeError, SourceError
from llmcompress.export import export
from llmcompress.mask import Pattern, follows
from llmcompress.methods import METHODS
from llmcompress.run import run

TWO_OF_FOUR = {"method": "magnitude", "pattern": "2:4"}
SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}
RTN = {"method": "rtn", "group_size": 32}
GPTQ = {"method": "gptq", "group_size": 32}
LINEARS = (torch.nn.Linear,)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def run_tiny(tiny_folders: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run steps on a tiny model; the folder and its results."""

    def go(kind: str, *steps: dict[str, Any], **more: Any) -> tuple[Path, dict[str, Any]]:
        with proof_inside(monkeypatch):
            return tmp_path / "out", run(recipe(tiny_folders(kind), text, *steps, **more), tmp_path / "out")

    return go


def weights(folder: Path, results: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every compressed weight [out, in] as stock transformers loads it."""
    from transformers.pytorch_utils import Conv1D

    model = reloaded(folder)
    prefix = "" if results["layers"][0]["name"].startswith(model.base_model_prefix) else model.base_model_prefix + "."
    modules = {row["name"]: model.get_submodule(prefix + row["name"]) for row in results["layers"]}
    return {name: m.weight.T if isinstance(m, Conv1D) else m.weight for name, m in modules.items()}


@pytest.mark.parametrize("kind", some_slow(ARCHITECTURES))
def test_two_of_four_in_every_architecture(kind, run_tiny):
    folder, results = run_tiny(kind, SPARSEGPT)
    assert results["format"] == "dense"
    for name, weight in weights(folder, results).items():
        assert follows(weight != 0, Pattern.parse("2:4")), name
    assert all(row["pattern"] == "2:4" and row["sparsity"] >= 0.5 for row in results["layers"])


@pytest.mark.parametrize(
    "quantizer", [RTN, GPTQ, {"method": "awq", "group_size": 32}, {"method": "hqq", "group_size": 32}]
)
@pytest.mark.parametrize("pruner", [TWO_OF_FOUR, {"method": "wanda", "sparsity": 0.5}], ids=["2:4", "wanda"])
def test_zeros_survive_every_quantizer(pruner, quantizer, run_tiny):
    folder, results = run_tiny("qwen2", pruner, quantizer)
    assert results["format"] == "pack-quantized"
    for name, weight in weights(folder, results).items():
        assert 1 - int(weight.count_nonzero()) / weight.numel() >= 0.5, name
        assert "pattern" not in pruner or follows(weight != 0, Pattern.parse("2:4"))
    assert {row["pattern"] for row in results["layers"]} == {pruner.get("pattern", "row")}
    assert {row["method"] for row in results["layers"]} == {f"{pruner['method']} + {quantizer['method']}"}


def test_the_joint_sweep_in_one_step(run_tiny):
    folder, results = run_tiny("llama", GPTQ | {"pattern": "2:4"})
    assert results["format"] == "pack-quantized"
    for weight in weights(folder, results).values():
        assert follows(weight != 0, Pattern.parse("2:4"))


def test_steps_for_different_linears(run_tiny):
    """Each with a sparsity of its own; the rest is left alone."""
    attention = {"method": "wanda", "sparsity": 0.25, "targets": ["q_proj", "k_proj"]}
    mlp = {"method": "magnitude", "pattern": "block:16", "sparsity": 0.5, "targets": ["*.mlp.*"]}
    _, results = run_tiny("llama", attention, mlp)
    found = {row["name"].rsplit(".", 1)[-1]: row for row in results["layers"]}
    assert set(found) == {"q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"}
    assert found["q_proj"]["sparsity"] == pytest.approx(0.25, abs=0.02)
    assert found["up_proj"]["pattern"] == "block:16"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([TWO_OF_FOUR, {"method": "wanda", "sparsity": 0.5}], r"pruned it to pattern 2:4, and steps\[1\] \(wanda\)"),
        ([TWO_OF_FOUR, GPTQ | {"pattern": "2:4"}], r"steps\[1\] \(gptq\) would prune it to 2:4"),
        ([RTN, TWO_OF_FOUR], r"steps\[1\] \(magnitude\) would prune what steps\[0\] \(rtn\) has quantized"),
        ([RTN, GPTQ], "both quantize it"),
        (
            [{"method": "magnitude", "pattern": "5:7"}],
            r"input columns are not divisible by the 7 of steps\[0\]\.pattern",
        ),
    ],
    ids=["two masks", "two masks, one joint", "quantized first", "two grids", "pattern"],
)
def test_steps_that_do_not_compose(steps, message, run_tiny, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_tiny("llama", *steps)
    assert not (tmp_path / "out.partial").exists()


def test_a_budget_over_unlike_matrices(run_tiny):
    """Erdős-Rényi-Kernel: narrow matrices keep more, and the total is as asked, to the weight that rounding costs."""
    _, results = run_tiny("llama", {"method": "magnitude", "sparsity": 0.6, "pattern": "layer", "budget": "erk"})
    by_shape = {row["name"].rsplit(".", 1)[-1]: row["sparsity"] for row in results["layers"]}
    assert by_shape["k_proj"] < by_shape["q_proj"] < by_shape["up_proj"]
    assert results["sparsity"]["of_pruned_linears"] == pytest.approx(0.6, abs=1e-3)


def test_achieved_sparsity_says_of_what(run_tiny, tiny_folders):
    folder, results = run_tiny("llama", {"method": "magnitude", "pattern": "2:4", "targets": ["*.mlp.*"]})
    found = weights(folder, results)
    zeros = sum(w.numel() - int(w.count_nonzero()) for w in found.values())
    model = reloaded(folder)
    linears = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, LINEARS) and "layers." in n)
    parameters = sum(p.numel() for p in model.parameters())
    assert results["sparsity"] == pytest.approx(
        {
            "zeros": zeros,
            "of_pruned_linears": zeros / sum(w.numel() for w in found.values()),
            "of_decoder_linears": zeros / linears,
            "of_parameters": zeros / parameters,
        }
    )
    assert "all linears of the decoder blocks" in (folder / "README.md").read_text()
    assert "Share of zeros by block" in (folder / "report.html").read_text()


def test_a_run_without_pruning_says_nothing_of_sparsity(run_tiny):
    folder, results = run_tiny("llama", RTN)
    assert results["sparsity"] is None
    assert "Share of zeros" not in (folder / "report.html").read_text()


# models that come with zeros


@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "awq", "hqq"])
def test_zeros_of_an_earlier_run_survive(quantizer, run_tiny, text, tmp_path, monkeypatch):
    """Pruned in one run, quantized in another: the same zeros, and the pattern is known to formats."""
    pruned, _ = run_tiny("llama", TWO_OF_FOUR)
    second = recipe(pruned, text, {"method": quantizer, "group_size": 32}, output={"format": "sparse24-int4"})
    with proof_inside(monkeypatch):
        results = run(second, tmp_path / "second")
    assert all(row["pattern"] == "2:4" and row["sparsity"] >= 0.5 for row in results["layers"])
    before = {name: t for name, t in tensors(pruned).items() if name.endswith("_proj.weight")}
    model = load(tmp_path / "second")
    for name, weight in before.items():
        assert not model.get_submodule(name.removesuffix(".weight")).dense()[weight == 0].any(), name


@pytest.mark.parametrize(
    "step", [GPTQ, {"method": "sparsegpt", "sparsity": 0.6}, {"method": "random", "sparsity": 0.6}]
)
def test_zeros_that_nobody_tells_of_stay(step, tiny_folders, text, tmp_path, monkeypatch):
    """Another tool's pruning: no manifest, only zeros."""
    model = reloaded(tiny_folders("llama"))
    kept = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, LINEARS):
            module.weight.data *= torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3
            kept[f"model.layers.{name}"] = module.weight != 0
    shutil.copytree(tiny_folders("llama"), tmp_path / "theirs")
    model.save_pretrained(tmp_path / "theirs")
    with proof_inside(monkeypatch):
        results = run(recipe(tmp_path / "theirs", text, step), tmp_path / "out")
    assert any("stay zero" in note for note in results["notes"])
    for name, weight in weights(tmp_path / "out", results).items():
        assert not weight[~kept[name]].any(), name
    assert all(row["pattern"] in ("row", "layer") and row["sparsity"] > 0.25 for row in results["layers"])
    export(tmp_path / "out", "bitmask" if "sparsity" in step else "dense", tmp_path / "exported")


def test_a_model_pruned_to_another_pattern_is_refused(run_tiny, text, tmp_path):
    pruned, _ = run_tiny("llama", TWO_OF_FOUR)
    other = recipe(pruned, text, {"method": "wanda", "sparsity": 0.5})
    with pytest.raises(PlanError, match=r"an earlier run has pruned it to pattern 2:4, and steps\[0\] \(wanda\)"):
        run(other, tmp_path / "second")
    assert not (tmp_path / "second.partial").exists()


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{",
        '{"layers": 3}',
        '{"layers": [1, {"name": [2], "pattern": {}, "sparsity": "x"}]}',
        '{"layers": [{"name": "model.layers.0.mlp.up_proj", "pattern": "9-9", "sparsity": 0.5}]}',
    ],
)
def test_a_manifest_that_makes_no_sense(manifest, tiny_folders, text, tmp_path, monkeypatch):
    """Somebody else's file: refused if it is not JSON, else what cannot be used is left out."""
    shutil.copytree(tiny_folders("llama"), tmp_path / "theirs")
    (tmp_path / "theirs" / "llmcompress.json").write_text(manifest)
    if manifest == "{":
        with pytest.raises(SourceError, match="cannot read this file as JSON"):
            run(recipe(tmp_path / "theirs", text, RTN), tmp_path / "out")
        return
    with proof_inside(monkeypatch):
        results = run(recipe(tmp_path / "theirs", text, RTN), tmp_path / "out")
    assert not any("pattern" in row for row in results["layers"])


# surveys: what must be known of the dense model first


@pytest.mark.parametrize("method", ["snip", "taylor"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_scores_from_gradients(method, kind, run_tiny, tmp_path):
    folder, results = run_tiny(kind, {"method": method, "sparsity": 0.5})
    for row in results["layers"]:
        assert row["sparsity"] == pytest.approx(0.5, abs=0.01), row["name"]
    assert results["calibration"]["samples"] == 4
    assert not list(folder.glob("**/gradients*"))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "taylor"])
def test_a_global_ranking_keeps_the_total(method, run_tiny):
    _, results = run_tiny("llama", {"method": method, "sparsity": 0.6, "pattern": "global"})
    shares = {row["sparsity"] for row in results["layers"]}
    assert len(shares) > 3
    assert {row["pattern"] for row in results["layers"]} == {"layer"}
    assert results["sparsity"]["of_pruned_linears"] == pytest.approx(0.6, abs=1e-5)


def test_a_global_magnitude_ranking_is_a_sort_of_all_weights(run_tiny, tiny_folders):
    """bfloat16 weights fall into bins of their own, so the counts by matrix are those of one sort."""
    folder, results = run_tiny("qwen2", {"method": "magnitude", "sparsity": 0.7, "pattern": "global"})
    dense = {name: w.abs() for name, w in weights(tiny_folders("qwen2"), results).items()}
    everything = torch.cat([w.flatten() for w in dense.values()])
    limit = everything.sort(descending=True).values[everything.numel() - round(everything.numel() * 0.7) - 1]
    for name, weight in weights(folder, results).items():
        assert int((dense[name] > limit).sum()) <= int(weight.count_nonzero()) <= int((dense[name] >= limit).sum())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "snip"])
def test_owl_gives_blocks_their_own_sparsity(method, run_tiny):
    step = {"method": method, "sparsity": 0.6, "budget": "owl", "outlier_factor": 2.0}
    _, results = run_tiny("llama", step)
    by_block: dict[int, set[float]] = {}
    for row in results["layers"]:
        by_block.setdefault(row["block"], set()).add(round(row["sparsity"], 1))
    assert sorted(share for shares in by_block.values() for share in shares) == [0.5, 0.7]  # 0.6 +- 0.08, by rows
    assert results["sparsity"]["of_pruned_linears"] == pytest.approx(0.6, abs=6e-3)


def test_overrides_are_outside_the_budget(run_tiny):
    step = {"method": "magnitude", "sparsity": 0.6, "budget": "global", "pattern": "layer"}
    _, results = run_tiny("llama", step | {"overrides": {"*.down_proj": 0.25}})
    down = [row for row in results["layers"] if row["name"].endswith("down_proj")]
    rest = [row for row in results["layers"] if not row["name"].endswith("down_proj")]
    assert [row["sparsity"] for row in down] == [0.25, 0.25]
    zeros, size = sum(row["zeros"] for row in rest), sum(row["zeros"] / row["sparsity"] for row in rest)
    assert zeros / size == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "budget": "owl"}, "pattern 2:4 has one sparsity for all"),
        ({"pattern": "2:4", "overrides": {"*": 0.3}}, "pattern 2:4 has one sparsity for all"),
        ({"sparsity": 0.95, "budget": "owl"}, "set outlier_range to at most 0.025"),
        ({"sparsity": 0.1, "budget": "owl"}, "set outlier_range to at most 0.05"),
        ({"sparsity": 0.5, "pattern": "global", "budget": "erk"}, "pattern global has the budget global"),
        ({"sparsity": 0.5, "overrides": {"*.q_proj": 1.0}}, r"'\*\.q_proj' is 1\.0, expected a share"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"pattern": "global"}, "needs `sparsity`"),
    ],
    ids=[
        "owl 2:4",
        "overrides 2:4",
        "owl range",
        "owl low",
        "two budgets",
        "override",
        "all",
        "negative",
        "global without",
    ],
)
def test_budgets_that_cannot_be(options, message, run_tiny, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run_tiny("llama", {"method": "wanda"} | options)
    assert not (tmp_path / "out.partial").exists()


def test_an_override_that_matches_nothing(run_tiny):
    with pytest.raises(PlanError, match=r"steps\[0\]\.overrides: 'c_fc' matches no linear of this step"):
        run_tiny("llama", {"method": "wanda", "sparsity": 0.5, "overrides": {"c_fc": 0.3}})


def test_survey_without_calibration(run_tiny):
    with pytest.raises(PlanError, match="method 'magnitude' needs `calibration` data"):
        run_tiny("llama", {"method": "magnitude", "sparsity": 0.6, "budget": "owl"}, calibration=None)


# what must not happen


def test_a_method_that_fills_a_masked_weight_is_found_out(run_tiny, monkeypatch, tmp_path):
    compress = METHODS["rtn"].compress

    def careless(self: Any, weight: Any, statistics: Any, dtype: Any, mask: Any = None) -> Any:
        result = compress(self, weight, statistics, dtype, mask)
        result.values[~mask] = 1.0
        return result

    monkeypatch.setattr(METHODS["rtn"], "compress", careless)
    with pytest.raises(NumericalError, match=r"layers\.0\.\S+: RTN gave values to \d+ pruned weights"):
        run_tiny("llama", TWO_OF_FOUR, RTN)
    assert not (tmp_path / "out").exists()


def test_zeros_of_an_earlier_run_survive_however_few(run_tiny, text, tmp_path, monkeypatch):
    pruned, before = run_tiny("llama", {"method": "magnitude", "sparsity": 0.03})
    zeros = {name: weight == 0 for name, weight in weights(pruned, before).items()}
    with proof_inside(monkeypatch):
        after = run(recipe(pruned, text, GPTQ), tmp_path / "second")
    for name, weight in weights(tmp_path / "second", after).items():
        assert zeros[name].any()
        assert not weight[zeros[name]].any(), name


@pytest.mark.parametrize("pattern", ["row", "block:16", "2:4", "layer"])
def test_the_pattern_is_recorded_as_asked_also_after_rounding(pattern, run_tiny):
    """Kept weights that round to zero do not make it another one."""
    pruner = {"method": "wanda", "pattern": pattern} | ({} if pattern == "2:4" else {"sparsity": 0.5})
    _, results = run_tiny("llama", pruner, RTN | {"bits": 2})
    assert {row["pattern"] for row in results["layers"]} == {pattern}


def test_a_manifest_that_promises_too_much(tiny_folders, text, tmp_path, monkeypatch):
    """It says 2:4 and the weights are dense: the format refuses, with the name of the linear."""
    shutil.copytree(tiny_folders("llama"), tmp_path / "theirs")
    rows = [{"name": "model.layers.0.mlp.up_proj", "pattern": "2:4", "sparsity": 0.5}]
    (tmp_path / "theirs" / "llmcompress.json").write_text(json.dumps({"layers": rows}))
    step = RTN | {"targets": ["model.layers.0.mlp.up_proj"]}
    with pytest.raises(FormatError, match="four are not zero; prune to 2:4") as caught:
        run(recipe(tmp_path / "theirs", text, step, output={"format": "sparse24-int4"}), tmp_path / "out")
    assert "in model.layers.0.mlp.up_proj" in str(caught.value.__notes__)
    assert not (tmp_path / "out").exists()


def test_a_linear_that_no_token_reaches(run_tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("llmcompress.stats.InputSquares.update", lambda self, x: None)
    with pytest.raises(CalibrationError, match="no tokens reached this layer") as caught:
        run_tiny("llama", {"method": "wanda", "sparsity": 0.5})
    assert "in model.layers.0.self_attn.q_proj" in str(caught.value.__notes__)
    assert not (tmp_path / "out").exists()


def test_a_damaged_survey_is_made_again(tiny_folders, text, tmp_path, monkeypatch):
    """Not taken for the same sparsity everywhere."""
    step = {"method": "magnitude", "sparsity": 0.6, "pattern": "global"}
    whole = recipe(tiny_folders("llama"), text, step)
    with proof_inside(monkeypatch):
        expected = run(whole, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr("llmcompress.job.BlockCompressor.__call__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(whole, tmp_path / "out")
        (tmp_path / "out.partial" / ".state" / "survey.json").write_text("{")
        found = run(whole, tmp_path / "out")
    assert [row["zeros"] for row in found["layers"]] == [row["zeros"] for row in expected["layers"]]


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def test_plan_says_what_dense_output_means(run_tiny):
    _, results = run_tiny("llama", TWO_OF_FOUR)
    assert any("`output.format` sparse24 or bitmask, which llmcompress loads" in note for note in results["notes"])
    assert not any("quantized" in note for note in results["notes"])


@pytest.mark.parametrize("budget", ["erk", "owl", "global"])
def test_the_joint_sweep_takes_budgets_too(budget, run_tiny):
    step = GPTQ | {"pattern": "layer", "sparsity": 0.6, "budget": budget, "outlier_factor": 2.0}
    _, results = run_tiny("llama", step | {"overrides": {"*.o_proj": 0.25}})
    shares = {row["name"]: round(row["sparsity"], 2) for row in results["layers"]}
    assert len(set(shares.values())) > 2
    assert all(share >= 0.25 for name, share in shares.items() if name.endswith("o_proj"))
    assert {row["method"] for row in results["layers"]} == {"gptq"}


def test_a_budget_is_for_the_step_that_prunes(run_tiny):
    """The quantizer after it keeps its own options."""
    step = {"method": "wanda", "sparsity": 0.6, "pattern": "layer", "budget": "global"}
    _, results = run_tiny("llama", step, GPTQ)
    assert results["format"] == "pack-quantized"
    assert len({row["sparsity"] for row in results["layers"]}) > 3
