"""LoRA on quantized models: the model stays byte for byte, and what was learned loads beside it in stock libraries."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny
from safetensors import safe_open
from tiny_runs import digests, logits, proof_inside, recipe, reloaded, run_die_at, tensors, values

import llmcompress
import llmcompress.run as run_module
from llmcompress import job
from llmcompress.adapter import adapter_of, attach
from llmcompress.checkpoint import partial_folder, read_tensors, write_tensors
from llmcompress.errors import FormatError, PlanError, SourceError
from llmcompress.evaluate import evaluate, suite_from_options
from llmcompress.export import export
from llmcompress.inspection import inspect
from llmcompress.plan import Plan
from llmcompress.proof import prove, write_expected
from llmcompress.run import run
from llmcompress.source import open_source
from llmcompress.stages import plan_stages
from llmcompress.training_plan import lora_parameters

LEARN = {"train": "recover", "parameters": "lora", "rank": 4, "steps": 8, "batch": 4, "learning_rate": 1e-2}
LEARN |= {"warmup": 1, "checkpoint_every": 2, "precision": "float32"}
ROUND = {"method": "rtn", "bits": 3, "group_size": 32}
DROP = {"structure": "block", "score": "block_influence", "ratio": 0.5, "of": "decoder"}
PRUNE = {"method": "gptq", "bits": 4, "group_size": 32, "pattern": "2:4"}


@dataclass(frozen=True)
class Made:
    """A quantized model, and the same with an adapter: proved with its first block, by what is in `expected`."""

    base: Path
    folder: Path
    results: dict[str, Any]
    plan: Plan
    expected: Path


@pytest.fixture(scope="module")
def made(tiny_folders, text, tmp_path_factory) -> Made:
    root, seen = tmp_path_factory.mktemp("adapter"), []

    def keep(plan, folder, expected, blocks):
        shutil.copyfile(expected, root / "expected")
        seen.append(plan)
        return prove(plan, folder, expected, blocks)

    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        run(recipe(tiny_folders("llama"), text, ROUND), root / "base")
        patch.setattr(run_module, "prove", keep)
        patch.setattr(job, "proof_blocks", lambda plan: 1)
        results = run(recipe(tiny_folders("llama"), text, ROUND, LEARN), root / "out")
    return Made(root / "base", root / "out", results, seen[-1], root / "expected")


def check_beside(before: Path, folder: Path, results: dict[str, Any], method: str) -> None:
    """Nothing of the quantized model has changed, and something was learned beside it."""
    old, new = digests(before), digests(folder)
    assert set(new) - set(old) == {"adapter_config.json", "adapter_model.safetensors"}
    assert {name: new[name] for name in old} == old
    assert results["proof"]["adapter_matrices"] == 2 * results["adapter"]["linears"] > 0
    losses = results["training"][0]["losses"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert [row["method"] for row in results["layers"]] == [method] * results["adapter"]["linears"]


def test_the_quantized_model_stays_and_the_adapter_is_proved(made):
    check_beside(made.base, made.folder, made.results, "rtn")
    assert made.results["proof"]["blocks"] == 1
    old, new = tensors(made.base), tensors(made.folder)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "step", "form"),
    [("phi3", PRUNE, "pack-quantized"), ("gpt2", ROUND, "dense"), ("opt", ROUND, "pack-quantized")],
    ids=["pruned too", "dense", "biases"],
)
def test_models_of_other_kinds_stay(kind, step, form, run_here):
    before, _ = run_here(kind, step)
    folder, results = run_here(kind, step, LEARN)
    check_beside(before, folder, results, step["method"])
    assert results["format"] == form
    assert results["proof"]["blocks"] == 2


@pytest.mark.slow
def test_linears_that_are_kept_learn_nothing_also_among_many(text, tmp_path, monkeypatch):
    """Of many linears peft notes endings of names; those must not match what is kept."""
    model = write_tiny(tmp_path / "deep", "llama", num_hidden_layers=4)
    monkeypatch.setattr(job, "proof_blocks", lambda plan: 3)
    keep = ["model.layers.0.mlp.*"]
    with proof_inside(monkeypatch):
        results = run(recipe(model, text, ROUND, LEARN, keep=keep), tmp_path / "out")
    assert results["adapter"]["linears"] == 25
    assert len(json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["target_modules"]) < 25
    assert not [name for name in tensors(tmp_path / "out" / "adapter") if "layers.0.mlp" in name]


def test_the_adapter_is_what_peft_writes_and_names_no_folder(made):
    adapter, results = made.folder / "adapter", made.results
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (adapter / "adapter_config.json").read_text()
    assert str(made.folder.parent) not in text
    config = json.loads(text)
    assert (config["r"], config["base_model_name_or_path"], config["peft_type"]) == (4, None, "LORA")
    assert {t.dtype for t in tensors(adapter).values()} == {torch.bfloat16}
    size = results["size"]
    assert size["after_bytes"] == sum(path.stat().st_size for path in made.folder.rglob("*.safetensors"))
    assert {"part": "adapter", "before_bytes": 0, "after_bytes": results["adapter"]["bytes"]} in size["parts"]
    card = (made.folder / "README.md").read_text()
    assert "3 bits (symmetric, groups of 32), then recover by LoRA of rank 4" in card
    assert "--enable-lora --max-lora-rank 8" in card


def test_the_snippet_of_the_card_loads_it(made):
    snippet = (made.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        exec(snippet.replace(f'name = "{made.folder.name}"', f"name = {str(made.folder)!r}"), found)
    base = reloaded(made.folder)
    learned = logits(found["model"])
    assert not torch.equal(learned, logits(base))
    torch.testing.assert_close(learned, logits(attach(base, made.folder / "adapter")))
    torch.testing.assert_close(learned, logits(llmcompress.load(made.folder)))


def test_scores_are_of_the_model_with_its_adapter(made, text):
    suite = suite_from_options(None, None, text, 16, 2, None)
    learned, before = evaluate(made.folder, suite), evaluate(made.base, suite)
    assert (learned["adapter"], before["adapter"]) == (True, False)
    assert learned["perplexity"][0]["compressed"] != before["perplexity"][0]["compressed"]


def test_it_is_inspected_exported_and_not_taken_for_a_dense_model(made, tmp_path):
    rows = [row for row in inspect(made.folder)["tensors"] if "lora" in row["name"]]
    assert sum(row["shape"][0] * row["shape"][1] for row in rows) == made.results["adapter"]["parameters"]
    export(made.folder, "dense", tmp_path / "dense")
    sizes = json.loads((tmp_path / "dense" / "results.json").read_text())["size"]
    assert sizes["parts"][-1] == made.results["size"]["parts"][-1]
    assert sizes["after_bytes"] == sum(path.stat().st_size for path in (tmp_path / "dense").rglob("*.safetensors"))
    with pytest.raises(PlanError, match="peft cannot add to linears of 'bitmask'"):
        export(made.folder, "bitmask", tmp_path / "other")
    torch.testing.assert_close(logits(llmcompress.load(tmp_path / "dense")), logits(llmcompress.load(made.folder)))
    with pytest.raises(SourceError, match="which a run would leave out"):
        open_source(str(tmp_path / "dense"))


def test_the_plan_predicts_its_size(made, tiny_folders, text):
    def planned(**more):
        chain = plan_stages(recipe(tiny_folders("llama"), text, ROUND, LEARN, **more), open_source(dense))
        return [plan for _, plan in chain]

    dense = str(tiny_folders("llama"))
    before, plan = planned()
    assert lora_parameters(plan) == made.results["adapter"]["parameters"]
    assert lora_parameters(planned(keep=["model.layers.0.*"])[1]) == lora_parameters(plan) / 2
    assert plan.format_name == "pack-quantized"
    more = plan.predicted.output_bytes - before.predicted.output_bytes
    assert more == pytest.approx(made.results["adapter"]["bytes"], rel=0.05)
    assert before.predicted.output_bytes < plan.before_bytes


@pytest.mark.parametrize("block", [0, 1])
def test_a_damaged_matrix_is_refused(block, made, tmp_path, monkeypatch):
    """Also in a block that the reloaded model lacks, whose matrices are compared in the file."""
    shutil.copytree(made.folder, tmp_path / "out")
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    name = f"base_model.model.model.layers.{block}.mlp.down_proj.lora_B.weight"
    found = read_tensors(file)
    write_tensors(file, found | {name: found[name] * 1.01})
    with proof_inside(monkeypatch), pytest.raises(FormatError, match=f"1 weights differ .* {name}"):
        prove(made.plan, tmp_path / "out", made.expected, 1)


def test_logits_without_the_adapter_are_refused(made, tmp_path, monkeypatch):
    with safe_open(made.expected, "pt") as file:
        names = {key: json.loads(value) for key, value in file.metadata().items()}
        wanted = [file.get_tensor(name) for name in ("tokens", "positions", "logits")]
    write_expected(tmp_path / "expected", *wanted, names | {"adapter": {}})
    with proof_inside(monkeypatch), pytest.raises(FormatError, match="logits after reloading"):
        prove(made.plan, made.base, tmp_path / "expected", 1)


@pytest.mark.slow
def test_a_killed_run_continues_with_the_same_bytes(tiny_folders, text, tmp_path):
    wanted = values(tiny_folders("llama"), text, ROUND, LEARN)
    moments = [
        {"folder": str(tmp_path / name), "side": side, "file": file}
        for name, side, file in [("a", "after", "train.json"), ("b", "before", "adapter_model.safetensors")]
    ]
    moments.append({"folder": str(tmp_path / "c"), "side": "after", "file": "adapter_model.safetensors"})
    run_die_at(moments, tmp_path / "whole", wanted)
    for moment in moments:
        folder = Path(moment["folder"])
        assert partial_folder(folder).exists()
        with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
            run(recipe(tiny_folders("llama"), text, ROUND, LEARN), folder)
        assert digests(folder) == digests(tmp_path / "whole")
        assert adapter_of(folder)


@pytest.mark.parametrize(
    ("steps", "more", "message"),
    [
        ([ROUND, LEARN | {"parameters": "all"}], {}, "quantize last, or set `parameters: lora`"),
        ([ROUND, LEARN, LEARN], {}, r"steps\[2\] \(recover\): would change the model that steps\[1\] \(recover\)"),
        ([ROUND, LEARN, ROUND], {}, r"steps\[2\] \(rtn\): would change the model"),
        ([ROUND, LEARN, DROP], {}, r"steps\[2\] \(block\): would change the model"),
        ([ROUND, DROP], {}, "quantize last"),
        ([PRUNE, LEARN], {"output": {"format": "sparse24-int4"}}, "which the peft library has no LoRA"),
        ([ROUND | {"targets": ["q_proj"]}, LEARN], {"keep": ["model.layers.[01].*_proj"]}, "leaves"),
        ([ROUND, LEARN], {"calibration": None}, "needs `calibration` data"),
    ],
)
def test_what_cannot_follow_a_quantizer_is_a_plan_error(steps, more, message, run_here, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_here("llama", *steps, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_clean_process_loads_it_without_ours(tiny_folders, text, tmp_path):
    results = run(recipe(tiny_folders("llama"), text, ROUND, LEARN), tmp_path / "out")
    assert results["proof"]["passed"]
    assert not results["proof"]["imported_llmcompress"]
