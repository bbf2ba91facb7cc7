"""A model without some channels of its residual stream computes exactly what the full one computes with zeros there."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from tiny_runs import digests, reloaded, tensors

from llmcompress.arch import find_blocks
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, RecipeError
from llmcompress.recipe import parse_step
from llmcompress.run import stages_folder
from llmcompress.stats import InputSizes
from llmcompress.structure.rescaling import find_rescaling
from llmcompress.structure.reshape import build_smaller
from llmcompress.structure.residual import Residual, find_residual, grain
from llmcompress.structure.scores import CHANNEL_SCORES, Stream

STEP = {"structure": "hidden", "score": "magnitude", "ratio": 0.25, "of": "group"}
FIXED_HEADS = {"gpt2", "gpt_neox", "opt"}  # the size of a head follows from the hidden size
SHARED_EPS = {"qwen3", "gemma3_text"}  # norms over each head have the same eps
OF_SUMS = 1e-5  # of float32 sums over some hundred products in another order


def residual_of(model: Any) -> Residual:
    config, blocks = model.config.to_dict(), find_blocks(model)[0]
    kept = model.config.hidden_size - grain(config, model)
    return find_residual(config, model, blocks, kept, find_rescaling(model))


def shrink(model: Any, removed: torch.Tensor) -> tuple[Any, Any]:
    """The model with channels masked, and the smaller one built from what is left."""
    found, masked, state = residual_of(model), copy.deepcopy(model), {}
    stays = torch.ones(found.width, dtype=torch.bool).index_fill_(0, removed, False).nonzero().flatten()
    for name, value in masked.named_parameters():
        state[name] = found.cut(name, value.data.clone(), stays)
        found.masked(name, value.data, removed)
    config = found.config(model.config.to_dict(), model, len(stays))
    smaller = build_smaller(config, {name: tuple(value.shape) for name, value in state.items()}, "tiny")
    smaller.load_state_dict(state, strict=False, assign=True)
    smaller.tie_weights()
    return masked, smaller.eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("architecture", [kind for kind in ARCHITECTURES if kind not in FIXED_HEADS])
@pytest.mark.parametrize("tied", [True, False])
def test_the_narrower_model_computes_what_zeros_do(architecture, tied):
    """With an eps that is large enough to matter."""
    model = tiny_model(architecture, rms_norm_eps=0.3, tie_word_embeddings=tied)
    removed = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:30].sort().values
    masked, smaller = shrink(model, removed)
    expected, found = logits(masked), logits(smaller)
    assert float((logits(model) - expected).abs().max()) > 0.1 * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= OF_SUMS * float(expected.abs().max())
    assert smaller.config.hidden_size == 66
    assert (smaller.config.rms_norm_eps == model.config.rms_norm_eps) == (architecture in SHARED_EPS)


@pytest.mark.parametrize("architecture", sorted(FIXED_HEADS))
def test_heads_that_follow_from_the_hidden_size_are_a_plan_error(architecture, run_here, tmp_path):
    with pytest.raises(PlanError, match=r"follows from the hidden size, .* mlp_channel and block work"):
        run_here(architecture, STEP)
    assert not list(tmp_path.iterdir())


def test_a_norm_that_subtracts_a_mean_is_a_plan_error():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = ARCHITECTURES["llama"] | {"tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("starcoder2", **sizes))
    with pytest.raises(PlanError, match="norms subtract a mean over all channels"):
        find_rescaling(model)


def test_norms_over_heads_and_equal_sizes_are_not_of_the_stream():
    """6 heads of 16 are 96, as many as there are channels."""
    dims = residual_of(tiny_model("qwen3", head_dim=16)).dims
    block = {name.removeprefix("model.layers.0."): dim for name, dim in dims.items() if ".0." in name}
    assert block == {
        **{f"self_attn.{name}_proj.weight": 1 for name in "qkv"},
        **{f"mlp.{name}_proj.weight": 1 for name in ("gate", "up")},
        **{"self_attn.o_proj.weight": 0, "mlp.down_proj.weight": 0},
        **{"input_layernorm.weight": 0, "post_attention_layernorm.weight": 0},
    }


def test_scores_are_sums_over_the_model():
    generator = torch.Generator().manual_seed(0)
    slices = [torch.randn(5, n, generator=generator) for n in (3, 1, 7)]
    sizes = [torch.rand(5, generator=generator) for _ in range(4)]
    stream = Stream(5, lambda: iter(slices), lambda: iter(sizes))
    whole = torch.cat(slices, 1)
    torch.testing.assert_close(CHANNEL_SCORES["magnitude"](norm="l1").score(stream), whole.abs().sum(1))
    torch.testing.assert_close(CHANNEL_SCORES["magnitude"]().score(stream), whole.norm(dim=1))
    torch.testing.assert_close(CHANNEL_SCORES["activation"]().score(stream), torch.stack(sizes).sum(0))
    drawn = CHANNEL_SCORES["random"](seed=3).score(stream)
    assert sorted(drawn.floor().tolist()) == [0, 1, 2, 3, 4]


def test_input_sizes_are_mean_absolute_values():
    x, total = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)), InputSizes(3)
    for part in x:
        total.update(part)
    torch.testing.assert_close(total.mean, x.flatten(0, 1).abs().mean(0))


def test_the_activation_score_sees_what_norms_return(run_here, tiny_folders, monkeypatch):
    """Against hooks on the norms of the stock model."""
    seen: list[torch.Tensor] = []
    real = CHANNEL_SCORES["activation"].score

    def score(self: Any, stream: Stream) -> torch.Tensor:
        seen.append(real(self, stream))
        return seen[0]

    monkeypatch.setattr(CHANNEL_SCORES["activation"], "score", score)
    folder, _ = run_here("llama", STEP | {"score": "activation"}, dtype="float32")
    tokens, total = calibration_tokens(folder), torch.zeros(96)
    model = reloaded(tiny_folders("llama")).float()

    def add(module: Any, arguments: Any, output: torch.Tensor) -> None:
        total.add_(output.abs().mean((0, 1)))

    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(add)
    with torch.no_grad():
        model(tokens)
    torch.testing.assert_close(seen[0], total, rtol=1e-4, atol=0)
    dense, left = tensors(Path(tiny_folders("llama"))), tensors(folder)
    name, highest = "model.layers.0.mlp.up_proj.weight", total.topk(72).indices.sort().values
    assert torch.equal(left[name], dense[name].float()[:, highest])


def calibration_tokens(folder: Path) -> torch.Tensor:
    """The tokens of a run's recipe."""
    from transformers import AutoTokenizer

    from llmcompress.calibrate import load_calibration
    from llmcompress.recipe import load_recipe

    options = load_recipe(folder / "recipe.yaml").calibration
    assert options is not None
    return load_calibration(options, AutoTokenizer.from_pretrained(folder)).tokens


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_narrower_model_is_proved_and_generates_with_a_cache(kind, run_here):
    folder, results = run_here(kind, STEP, dtype="float32")
    config = config_of(folder)
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (72, 16, 6)
    assert results["proof"]["relative_rms"] < OF_SUMS
    rows = {row["name"]: (row["shape_before"], row["shape"]) for row in results["layers"]}
    assert rows["model.layers.1.self_attn.q_proj"] == ([96, 96], [96, 72])
    assert rows["model.layers.1.self_attn.o_proj"] == ([96, 96], [72, 96])
    model, tokens = reloaded(folder), torch.tensor([[3, 4, 5, 6]])
    cached = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    note = "hidden: 96 -> 72 in the whole model removes "
    assert any(text.startswith(note) and "25.0% of this kind of group" in text for text in results["notes"])


def test_two_rounds_an_untied_head_and_integers_on_top(run_here):
    rounds = STEP | {"ratio": 0.34, "rounds": 2, "multiple": 32}
    folder, results = run_here("qwen3", rounds, {"method": "rtn", "group_size": 32})
    assert [stage["name"] for stage in results["stages"]] == ["before", "hidden", "hidden", "rtn"]
    assert results["stages"][1]["parameters"] > results["stages"][2]["parameters"] == results["stages"][3]["parameters"]
    assert config_of(folder)["hidden_size"] == 64
    assert tensors(folder)["lm_head.weight"].shape == (128, 64)
    assert not stages_folder(folder).exists()


def test_a_killed_run_continues_with_the_same_channels(run_here, monkeypatch, tmp_path):
    whole = run_here("mistral", STEP)[0]
    finish = Checkpoint.finish_block

    def dies(self: Checkpoint, index: int, *arguments: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        finish(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "finish_block", dies)
        with pytest.raises(KeyboardInterrupt):
            run_here("mistral", STEP)
    partial = next(path for path in tmp_path.iterdir() if path.name.endswith(".partial"))
    partial.rename(tmp_path / f"out{len(list(tmp_path.iterdir()))}.partial")
    monkeypatch.setattr(CHANNEL_SCORES["magnitude"], "score", lambda self, stream: 1 / 0)
    again, _ = run_here("mistral", STEP)
    assert digests(again) == digests(whole)


@pytest.mark.parametrize(
    ("step", "more", "message"),
    [
        ({"ratio": 0.01}, {}, "rounds to none; ratios of the group that exist: 0.0625 .keeps 90."),
        ({"multiple": 64, "ratio": 0.01}, {}, "192 leaves no smaller width of the 96 units"),
        ({"ratio": None, "parameters": 10**9, "of": "model"}, {}, "is small enough"),
        ({"score": "activation"}, {"calibration": None}, "needs `calibration` data"),
        ({"rounds": 9}, {}, "9 rounds, but only 24 of 96 units go, 6 at a time; use at most 4"),
        ({}, {"keep": ["*.o_proj"]}, r"o_proj is kept, and steps\[0\] .hidden. would make it narrower"),
        ({}, {"output": {"format": "pack-quantized"}}, "quantize in a later step"),
    ],
)
def test_what_does_not_fit_is_a_plan_error(step, more, message, run_here, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_here("llama", STEP | step, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "taylor"}, r"unknown score 'taylor' \(known: activation, magnitude, random\)"),
        ({"compensate": "none"}, "compensate: unknown option"),
    ],
)
def test_what_the_kind_does_not_know_is_a_recipe_error(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_step(STEP | changes, "steps[0]")


def test_a_budget_of_the_decoder_counts_the_decoder_alone(run_here):
    """A quarter of the decoder goes with a quarter of the channels, whatever goes outside."""
    folder, results = run_here("llama", STEP | {"of": "decoder", "ratio": 0.25})
    assert config_of(folder)["hidden_size"] == 72
    assert any("25.0% of its decoder blocks" in text for text in results["notes"])
