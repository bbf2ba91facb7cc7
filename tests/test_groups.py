"""A model from which units were cut out computes exactly what the same model computes with these units masked."""

import copy
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from llmcompress.arch import discover, find_couplings
from llmcompress.errors import PlanError
from llmcompress.structure.groups import KV, MLP, QUERY, WIDTHS, cut, find_groups, kept_positions, mask_units
from llmcompress.structure.reshape import build_smaller, narrower

FIXED_HEADS = {"gpt2", "gpt_neox", "opt"}  # the size of a head follows from the width
UNGROUPED = {"gpt2", "gpt_neox", "opt"}  # every query head has its own key and value


def groups_of(model: Any) -> tuple[Any, dict[str, Any]]:
    found = discover(model)
    return found, find_groups(model.get_submodule(found.block(0)), find_couplings(model, found.linears))


def shrink(model: Any, kind: str, removed: torch.Tensor) -> tuple[Any, Any]:
    """The model with units of all blocks masked, and the smaller one built from what is left."""
    found, groups = groups_of(model)
    masked = copy.deepcopy(model)
    state = dict(model.named_parameters())
    for index in range(found.count):
        name = found.block(index)
        block = masked.get_submodule(name)
        mask_units(block, groups[kind], removed)
        shapes = {key: tuple(value.shape) for key, value in block.named_parameters()}
        kept = kept_positions(groups[kind], removed, shapes)
        for key in shapes:
            state[f"{name}.{key}"] = cut(key, state[f"{name}.{key}"], kept)
    units = groups[kind].units - len(removed)
    config = narrower(model.config.to_dict(), model, kind, units)
    smaller = build_smaller(config, {key: tuple(value.shape) for key, value in state.items()}, "tiny")
    smaller.load_state_dict({key: value.data for key, value in state.items()}, strict=False, assign=True)
    smaller.tie_weights()
    return masked, smaller.eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", WIDTHS)
def test_the_smaller_model_computes_what_the_masked_one_does(architecture, kind):
    model = tiny_model(architecture)
    removed = torch.tensor([1, 5, 6, 150]) if kind == MLP else torch.tensor([0])
    if kind == QUERY and architecture in UNGROUPED:
        assert QUERY not in groups_of(model)[1]
        return
    if kind == KV and architecture in FIXED_HEADS:
        with pytest.raises(PlanError, match="heads cannot be removed"):
            shrink(model, kind, removed)
        return
    masked, smaller = shrink(model, kind, removed)
    expected, found = logits(masked), logits(smaller)
    assert not torch.equal(logits(model), expected)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
