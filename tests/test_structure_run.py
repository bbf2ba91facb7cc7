"""Whole runs with structure steps: the folder loads in stock transformers and computes what was masked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, some_slow, tiny_model, tiny_tokenizer, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import proof_inside, recipe, reloaded, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompress import proof
from llmcompress import run as run_module
from llmcompress.errors import FormatError, PlanError
from llmcompress.export import export
from llmcompress.run import run, stages_folder

CHANNELS = {"structure": "mlp_channel", "score": "magnitude", "ratio": 0.25, "of": "group"}
HIDDEN = {"structure": "hidden", "score": "magnitude", "ratio": 0.25, "of": "group"}
BLOCKS = {"structure": "block", "score": "block_influence", "ratio": 0.5, "of": "decoder"}
GROUPED = [kind for kind in ARCHITECTURES if kind not in ("gpt2", "gpt_neox", "opt")]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", some_slow(ARCHITECTURES))
def test_narrower_models_of_every_architecture_are_proved(kind, run_here):
    folder, results = run_here(kind, CHANNELS)
    assert results["proof"]["passed"]
    assert "compressed by\nllmcompress with mlp_channel, stored as dense" in (folder / "README.md").read_text()
    before = ARCHITECTURES[kind].get("intermediate_size", ARCHITECTURES[kind].get("ffn_dim", 384))
    keys, config = ("intermediate_size", "ffn_dim", "n_inner"), config_of(folder)
    assert next(config[key] for key in keys if config.get(key)) == before * 3 // 4
    assert results["size"]["after_bytes"] < results["size"]["before_bytes"]


@pytest.mark.parametrize("kind", some_slow(GROUPED))
def test_fewer_key_value_groups(kind, run_here):
    step = {"structure": "kv_group", "score": "activation", "ratio": 0.5, "of": "group"}
    folder, _ = run_here(kind, step)
    config = config_of(folder)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (3, 1)
    assert config["head_dim"] == ARCHITECTURES[kind].get("head_dim", 16)


def test_fewer_query_heads_of_every_group(run_here):
    folder, results = run_here("qwen3", CHANNELS | {"structure": "query_head", "ratio": 0.3})
    config = config_of(folder)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert results["proof"]["passed"]


@pytest.mark.parametrize(
    "budget",
    [
        {"parameters": 100_000, "of": "decoder"},
        {"bytes": "220KB", "of": "model"},
        {"ratio": 0.2, "of": "model"},
    ],
)
def test_a_budget_is_met_to_the_nearest_width(budget, run_here, tiny_folders):
    """A width more or less would be farther from it; and what is told of it is what the files have."""
    folder, results = run_here("llama", CHANNELS | {"ratio": None} | budget)
    before, after = tensors(Path(tiny_folders("llama"))), tensors(folder)

    def count(found: dict[str, torch.Tensor], part: str = "") -> int:
        return sum(x.numel() for name, x in found.items() if part in name)

    of = {"model": "", "decoder": "layers"}[budget["of"]]
    wanted = {"parameters": 100_000, "bytes": 110_000, "ratio": 0.8 * count(before)}[next(iter(budget))]
    assert abs(count(after, of) - wanted) <= 2 * 3 * 96 / 2
    gone = count(before) - count(after)
    shares = [gone / count(before, part) for part in ("", "layers", "mlp")]
    told = "{:,} parameters: {:.1%} of the model, {:.1%} of its decoder blocks, {:.1%} of this kind of group"
    assert any(note.endswith(told.format(gone, *shares)) for note in results["notes"])


def test_rounds_end_where_one_round_does(run_here):
    """Though the multiple does not divide the width that there was."""
    step = CHANNELS | {"structure": "mlp_channel", "ratio": 0.5, "multiple": 24}
    once, twice = (config_of(run_here("llama", step | more)[0])["intermediate_size"] for more in ({}, {"rounds": 2}))
    assert once == twice == 72


@pytest.mark.parametrize("kind", some_slow(ARCHITECTURES))
def test_fewer_blocks_generate_with_a_cache(kind, run_here):
    folder, results = run_here(kind, BLOCKS, dtype="float32")
    model = reloaded(folder)
    assert model.config.num_hidden_layers == 1
    assert results["proof"]["relative_rms"] < 1e-5  # beside the dense model that passes the other block by
    tokens = torch.tensor([[3, 4, 5, 6]])
    cached = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))


def test_stages_are_shown_and_their_folders_go(run_here):
    """Narrower in two rounds, then quantized: sizes fall, the card and the page say so, and only the result is left."""
    rounds = CHANNELS | {"ratio": 0.5, "rounds": 2, "multiple": 32}
    folder, results = run_here("llama", rounds, {"method": "rtn", "group_size": 32})
    stages = results["stages"]
    assert [stage["name"] for stage in stages] == ["before", "mlp_channel", "mlp_channel", "rtn"]
    assert [stage["bytes"] for stage in stages] == sorted((stage["bytes"] for stage in stages), reverse=True)
    assert stages[1]["parameters"] > stages[2]["parameters"] == stages[3]["parameters"]
    assert config_of(folder)["intermediate_size"] == 96
    assert "| mlp_channel |" in (folder / "README.md").read_text()
    assert "Stage by stage" in (folder / "report.html").read_text()
    assert not stages_folder(folder).exists()
    assert results["size"]["before_bytes"] > results["size"]["after_bytes"]


def test_a_stage_is_scored_again_when_the_suite_is_another(run_here, tmp_path, text, tiny_folders, monkeypatch):
    """The first try ends after its first stage; the second asks for shorter windows, and tells their perplexity."""

    def scored(length: int, folder: Path) -> list[float]:
        suite = tmp_path / f"{length}.yaml"
        texts = [{"name": "text", "source": str(text), "length": length, "windows": 4}]
        suite.write_text(json.dumps({"name": "test", "version": 1, "perplexity": texts}))
        steps = [CHANNELS | {"ratio": 0.2}, {"method": "rtn", "group_size": 32}]
        with proof_inside(monkeypatch):
            made = run(recipe(tiny_folders("llama"), text, *steps, evaluate={"suite": str(suite)}), folder)
        return [stage["perplexity"][0]["value"] for stage in made["stages"]]

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_folder", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scored(32, tmp_path / "out")
    assert len(list(stages_folder(tmp_path / "out").iterdir())) == 1
    assert scored(16, tmp_path / "out") == scored(16, tmp_path / "other") != scored(32, tmp_path / "third")


def test_compensation_lowers_the_error_of_the_layer(run_here, tiny_folders, text):
    """Of what the first block's MLP adds to the calibration tokens that it sees in the dense model."""
    name = "model.layers.0.mlp"
    outputs = {"dense": mlp_output(Path(tiny_folders("llama")), name, text)}
    calibration = {"data": str(text), "samples": 128, "length": 32}  # many more tokens than channels
    for how in ("none", "least_squares"):
        folder, _ = run_here("llama", CHANNELS | {"ratio": 0.5, "compensate": how}, calibration=calibration)
        outputs[how] = mlp_output(folder, name, text)
    errors = {how: float((outputs[how] - outputs["dense"]).norm() / outputs["dense"].norm()) for how in outputs}
    assert 0 < errors["least_squares"] < 0.95 * errors["none"]


def mlp_output(folder: Path, name: str, text: Path) -> torch.Tensor:
    """What an MLP of a model adds for windows of a text [n, 32, width]; what is before it is dense."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt").input_ids[:, :4096]
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(tokens.view(-1, 32))
    return seen[0]


def test_least_squares_does_not_fill_the_zeros_of_a_model_that_was_pruned_elsewhere(run_here, tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    for block in model.model.layers:
        block.mlp.down_proj.weight.data[:, ::2] = 0
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    with pytest.raises(PlanError, match=r"mlp.down_proj has 50% of zeros, which least_squares would fill; use none"):
        run_here(str(tmp_path / "pruned"), CHANNELS)
    run_here(str(tmp_path / "pruned"), CHANNELS | {"compensate": "none"})


def test_rounding_is_measured_where_its_estimate_does_not_suffice(run_here, monkeypatch):
    """An estimate of next to nothing stands for a model that amplifies errors; another result is still refused."""
    monkeypatch.setattr(proof, "tolerance_of", lambda plan, blocks: 1e-9)
    found = run_here("llama", HIDDEN)[1]["proof"]
    assert 0 < found["relative_rms"] <= found["tolerance"] == 2 * found["rounding_rms"] < 0.1

    def damaged(plan: Any, folder: Path, expected: Path, blocks: int) -> dict[str, Any]:
        with safe_open(expected, "pt") as file:
            metadata = file.metadata()
        stored = load_file(expected)
        noise = torch.randn(stored["logits"].shape, generator=torch.Generator().manual_seed(0))
        stored["logits"] += 0.1 * stored["logits"].float().std() * noise
        save_file(stored, expected, metadata)
        return proof.prove(plan, folder, expected, blocks)

    monkeypatch.setattr(run_module, "prove", damaged)
    with pytest.raises(FormatError, match=r"logits after reloading .* differ by 0.1 .*rounding to bfloat16 explains"):
        run_here("llama", HIDDEN)


@pytest.mark.parametrize(
    ("kind", "step", "message"),
    [
        ("llama", CHANNELS | {"structure": "kv_group", "ratio": 0.2}, "ratios of the group that exist: 0.5 .keeps 1."),
        (
            "gpt2",
            CHANNELS | {"structure": "kv_group", "ratio": 0.5},
            "heads cannot be removed; use mlp_channel or block",
        ),
        ("opt", CHANNELS | {"structure": "query_head"}, "has no query_head: its attention heads do not share"),
        ("llama", BLOCKS | {"ratio": 0.1}, "rounds to none"),
        ("qwen2", CHANNELS | {"compensate": "mean"}, "mean is a bias, and mlp.down_proj of Qwen2ForCausalLM has none"),
        ("llama", BLOCKS | {"protect_first": 1, "protect_last": 1}, "leave none of the 2 blocks"),
        ("llama", CHANNELS | {"ratio": None, "parameters": 10**9, "of": "model"}, "is small enough"),
        ("llama", CHANNELS | {"multiple": 512}, "512 leaves no smaller width of the 160 units"),
        ("llama", BLOCKS | {"rounds": 3}, "3 rounds, but only 1 of 2 units go"),
    ],
)
def test_what_cannot_be_removed_is_a_plan_error(kind, step, message, run_here, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_here(kind, step)
    assert not list(tmp_path.iterdir())


def test_a_refusal_names_the_numbers_of_heads_that_the_config_takes(run_here, tmp_path):
    """Llama wants its width to be a multiple of the number of heads, though their size is given."""
    model = write_tiny(tmp_path / "eight", "llama", num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1)
    with pytest.raises(PlanError, match=r"it takes 1, 2, 3, 4, 6 of the 8 units of kv_group"):
        run_here(str(model), CHANNELS | {"structure": "kv_group", "ratio": 0.1})


def test_what_is_kept_is_not_made_smaller(run_here):
    with pytest.raises(PlanError, match=r"is kept, and .* would make it narrower"):
        run_here("llama", CHANNELS, keep=["model.layers.0.mlp.*"])
    with pytest.raises(PlanError, match="'nonsense' matches nothing"):
        run_here("llama", CHANNELS, keep=["nonsense"])


def test_a_mean_bias_and_an_export_of_a_smaller_model(run_here, tmp_path):
    folder, results = run_here("gpt2", CHANNELS | {"compensate": "mean", "score": "fluctuation"})
    errors = [row["error"] for row in results["layers"] if row["name"].endswith("mlp.c_proj")]
    assert len(errors) == 2
    assert all(0 < error < 1 for error in errors)
    export(folder, "dense", tmp_path / "again")
    assert {name: t.shape for name, t in tensors(folder).items()} == {
        name: t.shape for name, t in tensors(tmp_path / "again").items()
    }


@pytest.mark.parametrize(("structure", "key"), [("mlp_channel", "mlp_bias"), ("kv_group", "attention_bias")])
def test_a_mean_brings_a_bias_where_a_setting_allows_one(structure, key, run_here, tiny_folders):
    """The setting gives biases to all linears of its kind; those beside the consumer's are zero."""
    step = {"structure": structure, "compensate": "mean", "score": "fluctuation", "ratio": 0.5, "of": "group"}
    folder, results = run_here("llama", step)
    assert results["proof"]["passed"]
    assert config_of(folder)[key]
    biases = {name: value for name, value in tensors(folder).items() if name.endswith(".bias")}
    consumer = {"mlp_channel": "down_proj", "kv_group": "o_proj"}[structure]
    assert {bool(value.any()) for name, value in biases.items() if consumer in name} == {True}
    assert {bool(value.any()) for name, value in biases.items() if consumer not in name} == {False}
    generated = reloaded(folder).generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 3


def test_structure_leaves_dense_weights(run_here):
    with pytest.raises(PlanError, match="remove it, or quantize in a later step"):
        run_here("llama", CHANNELS, output={"format": "pack-quantized"})
    with pytest.raises(PlanError, match="needs `calibration` data"):
        run_here("llama", CHANNELS, calibration=None)
