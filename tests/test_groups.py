"""A model from which units were cut out computes exactly what the same model computes with these units masked."""

import copy
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from llmcompress.arch import discover, find_couplings, match_names
from llmcompress.errors import PlanError
from llmcompress.structure import groups
from llmcompress.structure.groups import (
    ATTENTION_LAYER,
    KV,
    MLP,
    MLP_LAYER,
    QUERY,
    cut,
    groups_of,
    kept_positions,
    mask_units,
    zero_units,
)
from llmcompress.structure.reshape import build_smaller, narrower

FIXED_HEADS = {"gpt2", "gpt_neox", "opt"}  # the size of a head follows from the width
SOME = {"llama", "phi3", "gemma2", "gpt_neox", "opt"}  # the layout of their blocks differs most
UNGROUPED = {"gpt2", "gpt_neox", "opt"}  # every query head has its own key and value


@pytest.fixture(autouse=True, scope="module")
def _observed_once():
    """What couples which rows is seen on a tiny model of the same class, whatever the sizes are."""
    known: dict[str, Any] = {}

    def found(model: Any) -> Any:
        return known.setdefault(type(model).__name__, known.get(type(model).__name__) or find_couplings(model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "find_couplings", found)
        yield


def shrink(model: Any, kind: str, removed: list[torch.Tensor], config: Any = None) -> tuple[Any, Any, Any]:
    """The model with units of blocks masked (removed: of each), the smaller one, and its config.json."""
    found = discover(model)
    groups = groups_of(model, found, kind)
    masked = copy.deepcopy(model)
    state = dict(model.named_parameters())
    for index, group in groups.items():
        name = found.block(index)
        block = masked.get_submodule(name)
        mask_units(block, group, removed[index])
        assert zero_units(block, group).nonzero().flatten().tolist() == removed[index].tolist()
        shapes = {key: tuple(value.shape) for key, value in block.named_parameters()}
        kept = kept_positions(group, removed[index], shapes)
        for key in shapes:
            state[f"{name}.{key}"] = cut(key, state[f"{name}.{key}"], kept)
    widths = {index: group.units - len(removed[index]) for index, group in groups.items()}
    config = narrower(config or model.config.to_dict(), model, kind, groups, widths)
    state = {key: value.data for key, value in state.items() if value.numel()}
    smaller = build_smaller(config, {key: tuple(value.shape) for key, value in state.items()}, "tiny")
    assert set(match_names(smaller, state)) == {name for name, _ in smaller.named_parameters()}
    smaller.load_state_dict(state, strict=False, assign=True)
    smaller.tie_weights()
    return masked, smaller.eval(), config


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def assert_same(model: Any, masked: Any, smaller: Any) -> None:
    """And something else than before anything was masked."""
    expected, found = logits(masked), logits(smaller)
    assert not torch.equal(logits(model), expected)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [MLP, KV, QUERY])
def test_the_smaller_model_computes_what_the_masked_one_does(architecture, kind):
    model = tiny_model(architecture)
    removed = [torch.tensor([1, 5, 6, 150]) if kind == MLP else torch.tensor([0])] * 2
    if kind == QUERY and architecture in UNGROUPED:
        assert not groups_of(model, discover(model), QUERY)
        return
    if kind == KV and architecture in FIXED_HEADS:
        with pytest.raises(PlanError, match="heads cannot be removed"):
            shrink(model, kind, removed)
        return
    masked, smaller, config = shrink(model, kind, removed)
    assert "per_layer_config" not in config
    assert_same(model, masked, smaller)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [MLP, KV])
def test_rows_of_a_unit_make_its_columns_and_no_others(architecture, kind):
    """Also where heads cannot be removed, as in GPT-NeoX, whose queries, keys and values are interleaved."""
    model = tiny_model(architecture)
    found = discover(model)
    block = model.get_submodule(found.block(0))
    group, seen = groups_of(model, found, kind)[0], []
    block.get_submodule(group.consumer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    with torch.no_grad():
        for member in group.members:
            if not member.parameter.startswith(group.consumer):
                block.get_parameter(member.parameter).index_fill_(member.dim, member.index[1], 0)
    logits(model)
    before, after = (x.flatten(0, -2) for x in seen)
    own = torch.zeros(before.shape[1], dtype=torch.bool)
    own[group.columns[1]] = True
    assert not after[:, own].any()
    assert before[:, own].any()
    torch.testing.assert_close(after[:, ~own], before[:, ~own])


@pytest.mark.parametrize(
    "architecture", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
@pytest.mark.parametrize("kind", [MLP, KV, ATTENTION_LAYER, MLP_LAYER])
def test_blocks_of_unlike_width_compute_what_the_masked_ones_do(architecture, kind):
    """Units go from the second block only; as whole sub-layers too, which leave nothing of their parameters."""
    model = tiny_model(architecture)
    removed = [torch.tensor([], dtype=torch.int64), torch.tensor([1, 5, 6, 150] if kind == MLP else [0])]
    if kind == KV and architecture in FIXED_HEADS:
        with pytest.raises(PlanError, match="heads cannot be removed"):
            shrink(model, kind, removed)
        return
    masked, smaller, config = shrink(model, kind, removed)
    assert list(config["per_layer_config"]) == ["1"]
    assert_same(model, masked, smaller)


def test_what_differs_is_said_block_by_block_and_gathered_again_where_blocks_agree():
    model = tiny_model("llama")
    _, smaller, config = shrink(model, MLP, [torch.arange(0), torch.arange(10)])
    assert config["intermediate_size"] == 160
    assert config["per_layer_config"] == {"1": {"intermediate_size": 150}}
    masked, heads, both = shrink(smaller, KV, [torch.tensor([0]), torch.arange(0)], config)
    assert both["num_key_value_heads"] == 2
    assert both["per_layer_config"] == {
        "0": {"num_attention_heads": 3, "num_key_value_heads": 1},
        "1": {"intermediate_size": 150},
    }
    assert_same(smaller, masked, heads)
    _, _, alike = shrink(smaller, MLP, [torch.arange(20), torch.arange(10)], config)
    assert alike["intermediate_size"] == 140
    assert not {"per_layer_config", "auto_map"} & set(alike)
