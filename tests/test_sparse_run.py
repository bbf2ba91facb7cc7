"""Whole runs that prune: zeros in every file, in every later step, and in what stock libraries load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from tiny_runs import proof_inside, recipe, reloaded, write_text

from llmcompress.errors import PlanError
from llmcompress.mask import Pattern, follows
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


@pytest.mark.parametrize("kind", ARCHITECTURES)
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
