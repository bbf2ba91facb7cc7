"""Models whose blocks differ: made by one ranking, loaded by the file that goes with them, trained and quantized."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from safetensors.torch import load_file, save_file
from tiny_runs import logits, proof_inside, recipe, reloaded, tensors

from llmcompress.errors import PlanError
from llmcompress.evaluate import evaluate
from llmcompress.pad import pad
from llmcompress.run import run
from llmcompress.source import CODE, has_own_code, is_own_code
from llmcompress.suite import suite_from_options

Run = tuple[Path, dict[str, Any]]
RANKED = {"structure": "mlp_channel", "score": "magnitude", "widths": "global", "ratio": 0.3, "of": "group"}
NO_ATTENTION = {"structure": "attention", "score": "random", "ratio": 0.5, "of": "group"}
NO_MLP = NO_ATTENTION | {"structure": "mlp"}


@pytest.fixture(scope="module")
def ranked(tiny_folders: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Folder and results of one ranking over the blocks of a tiny model, made once; who changes a folder copies it."""
    made: dict[str, Run] = {}

    def get(kind: str) -> Run:
        if kind not in made:
            folder = tmp_path_factory.mktemp("ranked") / kind
            with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
                made[kind] = folder, run(recipe(tiny_folders(kind), text, RANKED | {"multiple": 8}), folder)
        return made[kind]

    return get


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def generates(model: Any) -> bool:
    """The same with a cache and without."""
    tokens = torch.tensor([[3, 4, 5, 6]])
    cached = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=True)
    return torch.equal(cached, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_one_ranking_gives_every_block_a_width_of_its_own(kind, ranked):
    folder, results = ranked(kind)
    assert results["proof"]["passed"]
    assert (folder / CODE).is_file()
    assert has_own_code(folder)
    rows = {row["name"]: row["shape"] for row in results["layers"]}
    name = {"gpt2": "transformer.h.{}.mlp.c_proj"}.get(kind, "model.layers.{}.mlp.down_proj")
    widths = [rows[name.format(index)][1] for index in (0, 1)]
    units = 384 if kind == "gpt2" else 160
    assert widths[0] != widths[1]
    assert sum(widths) == 2 * units - round(0.3 * 2 * units / 8) * 8
    assert all(width % 8 == 0 for width in widths)
    model = reloaded(folder, trust_remote_code=True)
    assert "PerLayer" in [made.__name__ for made in type(model).__mro__]
    assert generates(model)


SOME = {"llama", "gpt_neox", "gemma2", "opt"}  # the layout of their blocks differs most


@pytest.mark.parametrize(
    "kind", [kind if kind in SOME else pytest.param(kind, marks=pytest.mark.slow) for kind in ARCHITECTURES]
)
@pytest.mark.parametrize("step", [NO_ATTENTION, NO_MLP], ids=["attention", "mlp"])
def test_blocks_without_attention_or_mlp(kind, step, run_here):
    folder, results = run_here(kind, step)
    assert results["proof"]["passed"]
    assert [note for note in results["notes"] if note.endswith(f"its {step['structure']} is gone")]
    assert len(config_of(folder)["per_layer_config"]) == 1
    model = reloaded(folder, trust_remote_code=True)
    assert any(type(module).__name__ == "Gone" for module in model.modules())
    inside = {name for name in tensors(folder) if re.search(r"\.\d+\.", name)}
    assert inside == {name for name, _ in model.named_parameters() if re.search(r"\.\d+\.", name)}
    assert generates(model)


def test_protected_blocks_keep_their_width(run_here):
    folder, _ = run_here("llama", RANKED | {"widths": "uniform", "ratio": 0.25, "protect_first": 1})
    assert config_of(folder)["intermediate_size"] == 160
    assert config_of(folder)["per_layer_config"] == {"1": {"intermediate_size": 80}}


def test_unlike_blocks_are_narrowed_again_trained_and_quantized(run_here, text):
    """Two rounds of one ranking, an attention less, training, and 4 bits: each stage proved."""
    train = {"train": "recover", "steps": 2, "batch": 2, "warmup": 0, "loss": "distillation"}
    steps = [RANKED | {"multiple": 32, "rounds": 2}, NO_ATTENTION, train, {"method": "awq", "group_size": 32}]
    folder, results = run_here("llama", *steps)
    assert [stage["name"] for stage in results["stages"]][1:] == [
        "mlp_channel",
        "mlp_channel",
        "attention",
        "recover",
        "awq",
    ]
    assert results["format"] == "pack-quantized"
    assert results["proof"]["passed"]
    config = config_of(folder)
    assert sum("skip" in own for own in config["per_layer_config"].values()) == 1
    assert (folder / CODE).is_file()


def test_fewer_blocks_of_unlike_width_are_numbered_anew(run_here):
    block = {"structure": "block", "score": "block_influence", "ratio": 0.5, "of": "decoder"}
    folder, results = run_here("llama", RANKED | {"multiple": 8}, block)
    config = config_of(folder)
    assert config["num_hidden_layers"] == 1
    assert "per_layer_config" not in config  # a single block differs from none
    assert config["intermediate_size"] == tensors(folder)["model.layers.0.mlp.down_proj.weight"].shape[1]
    assert results["proof"]["passed"]


def test_sub_layers_of_unlike_size_count_with_their_own_parameters(run_here):
    """The larger MLP has the larger norm, but each of its parameters is worth less, so it goes."""
    unlike = {"structure": "mlp_channel", "score": "magnitude", "ratio": 0.25, "of": "group", "protect_first": 1}
    step = NO_MLP | {"score": {"method": "magnitude", "norm": "l1"}, "ratio": 0.6}
    _, results = run_here("llama", unlike, step)
    narrow, last = results["stages"][1:]
    assert narrow["parameters"] - last["parameters"] == 3 * 96 * 160
    told = [note for note in results["notes"] if note.startswith("mlp: 2 -> 1 in 2 blocks")]
    assert f"removes {3 * 96 * 160:,} parameters" in told[-1]


def test_rounds_may_take_every_sub_layer(run_here):
    folder, results = run_here("llama", NO_ATTENTION | {"ratio": 0.99, "rounds": 2})
    assert [stage["name"] for stage in results["stages"]] == ["before", "attention", "attention"]
    assert len(config_of(folder)["per_layer_config"]) == 2
    assert results["proof"]["passed"]


def test_other_code_in_the_folder_is_not_run(ranked, run_here, tmp_path):
    folder = shutil.copytree(ranked("llama")[0], tmp_path / "theirs")
    with (folder / CODE).open("a") as file:
        file.write("raise SystemExit('foreign code ran')\n")
    assert not has_own_code(folder)
    with pytest.raises(PlanError, match="asks for Python code from the repository"):
        run_here(str(folder), {"method": "rtn", "group_size": 32})


def test_what_a_ranking_cannot_do(run_here):
    with pytest.raises(PlanError, match=r"from 1 to 2 can go"):
        run_here("llama", RANKED | {"structure": "kv_group", "ratio": 0.9})
    with pytest.raises(PlanError, match="rounds to 0"):
        run_here("llama", NO_MLP | {"ratio": 0.1})


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("llama", None),
        ("gpt2", None),
        ("phi3", {"structure": "kv_group", "score": "random", "widths": "global", "ratio": 0.25, "of": "group"}),
        ("qwen2", {"structure": "query_head", "score": "random", "widths": "global", "ratio": 0.17, "of": "group"}),
        ("qwen3", NO_ATTENTION),
        ("opt", NO_MLP),
    ],
)
def test_padded_blocks_compute_the_same_and_load_anywhere(kind, step, ranked, run_here, tmp_path):
    folder, results = run_here(kind, step) if step else ranked(kind)
    pad(folder, tmp_path / "padded")
    model = reloaded(tmp_path / "padded")  # nothing is trusted
    narrow = reloaded(folder, trust_remote_code=True)
    expected, found = logits(narrow.float()), logits(model.float())
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not (tmp_path / "padded" / CODE).exists()
    assert "per_layer_config" not in config_of(tmp_path / "padded")
    told = json.loads((tmp_path / "padded" / "results.json").read_text())
    assert told["size"]["after_bytes"] > results["size"]["after_bytes"]
    assert all(engine["loads"] for engine in told["engines"])
    assert "trust_remote_code" in (folder / "README.md").read_text()
    assert "trust_remote_code" not in (tmp_path / "padded" / "README.md").read_text()


def test_what_cannot_be_padded(run_here, tmp_path):
    folder, _ = run_here("llama", {"method": "rtn", "group_size": 32})
    with pytest.raises(PlanError, match="all alike, so there is nothing to pad"):
        pad(folder, tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_scoring_runs_no_code_of_the_folder(ranked, text, tmp_path):
    """Not the modelling file, of which this package has its own, nor what transformers imports where it trusts."""
    folder = shutil.copytree(ranked("llama")[0], tmp_path / "theirs")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('foreign code ran')\n")
    suite = suite_from_options(text=text, length=32, windows=2)
    scores = evaluate(folder, suite)
    assert scores["perplexity"][0]["compressed"]["value"] > 1


@pytest.mark.parametrize(
    "asked",
    [
        {"AutoModelForCausalLM": "modeling_llmcompress.x--evil.Evil"},
        {"AutoModelForCausalLM": "modeling_llmcompress.PerLayerA.B"},
        {"AutoModelForCausalLM": "modeling_llmcompress.PerLayerLlamaForCausalLM", "AutoConfig": "evil.Config"},
        {"AutoModelForCausalLM": ["modeling_llmcompress.PerLayerLlamaForCausalLM"]},
        "modeling_llmcompress.PerLayerLlamaForCausalLM",
        None,
    ],
)
def test_other_names_are_other_code(asked):
    assert is_own_code({"AutoModelForCausalLM": "modeling_llmcompress.PerLayerLlamaForCausalLM"})
    assert not is_own_code(asked)


def test_a_mean_brings_biases_to_protected_blocks_too(run_here):
    """The setting holds for all blocks; what is not made smaller has zeros. A second round starts from these."""
    step = RANKED | {"score": "fluctuation", "compensate": "mean", "multiple": 8}
    folder, _ = run_here("llama", step | {"protect_first": 1, "widths": "uniform", "ratio": 0.25})
    biases = {name: value for name, value in tensors(folder).items() if name.endswith(".bias")}
    assert len(biases) == 2 * 3
    assert [name for name, value in biases.items() if value.any()] == ["model.layers.1.mlp.down_proj.bias"]
    assert run_here("llama", step | {"rounds": 2})[1]["proof"]["passed"]


def test_checkpoints_without_the_prefix_of_the_base_model_are_padded(run_here, tiny_folders, tmp_path):
    old = shutil.copytree(tiny_folders("gpt2"), tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    save_file({name.removeprefix("transformer."): w for name, w in weights.items()}, old / "model.safetensors")
    folder, _ = run_here(str(old), RANKED | {"multiple": 8})
    assert "h.0.mlp.c_fc.weight" in tensors(folder)
    pad(folder, tmp_path / "padded")
    model = reloaded(tmp_path / "padded").float()
    expected = logits(reloaded(folder, trust_remote_code=True).float())
    assert float((logits(model) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_results_tell_what_the_ranking_decided(ranked):
    _, results = ranked("llama")
    kept = sum(row["after_bytes"] for row in results["layers"])
    mlp = next(part for part in results["size"]["parts"] if part["part"] == "mlp")
    assert mlp["after_bytes"] == kept
