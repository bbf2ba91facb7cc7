"""Scores of whole blocks against models from which the blocks were really taken, and losses of these."""

import copy
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tiny_runs import streamed
from torch import nn

from llmcompress.structure.scores import BLOCK_SCORES

TOKENS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "opt"])
def model(request) -> Any:
    """Four blocks, of which the second hardly does anything."""
    made = tiny_model(request.param, num_hidden_layers=4).float().eval()
    with torch.no_grad():
        for name, parameter in blocks_of(made)[1].named_parameters():
            if "norm" not in name:
                parameter.mul_(0.3)
    return made


def blocks_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers)


def loss_without(model: Any, gone: list[int]) -> float:
    """Mean next-token loss over windows of the model without these blocks."""
    left = copy.deepcopy(model)
    kept = [i for i in range(len(blocks_of(left))) if i not in gone]
    parent = next(m for m in left.modules() if blocks_of(left) in m.children())
    name = next(n for n, child in parent.named_children() if child is blocks_of(left))
    types = getattr(left.config, "layer_types", None)
    setattr(parent, name, nn.ModuleList(blocks_of(left)[i] for i in kept))
    left.config.num_hidden_layers = len(kept)
    if types:
        left.config.layer_types = [types[i] for i in kept]
    with torch.no_grad():
        losses = [left(input_ids=row[None], labels=row[None], use_cache=False).loss for row in TOKENS]
    return float(torch.stack(losses).mean())


def choose(name: str, model: Any, count: int, allowed: set[int], **options: Any) -> Any:
    score = BLOCK_SCORES[name](**options)
    return score.choose(streamed(model), TOKENS, count, allowed, lambda done, total: None)


def test_greedy_takes_the_block_whose_absence_costs_least_again_and_again(model):
    """As removing each candidate from the model and scoring what is left says; protected ones are no candidates."""
    for allowed in ({0, 1, 2, 3}, {0, 2, 3}):
        gone: list[int] = []
        for _ in range(2):
            losses = {block: loss_without(model, [*gone, block]) for block in sorted(allowed - set(gone))}
            gone.append(min(losses, key=lambda block: losses[block]))
        found = choose("greedy", model, 2, allowed)
        assert found.blocks == sorted(gone)
        assert found.scores[gone[-1]] == pytest.approx(losses[gone[-1]], rel=1e-4)


def test_block_influence_is_one_minus_the_cosine_of_what_goes_in_and_out(model):
    seen: dict[int, float] = {}

    def note(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output if isinstance(output, torch.Tensor) else output[0]
            seen[index] = 1 - float(torch.cosine_similarity(x, y, dim=-1).mean())

        return hook

    hooks = [b.register_forward_hook(note(i), with_kwargs=True) for i, b in enumerate(blocks_of(model))]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = choose("block_influence", model, 2, {0, 1, 2, 3})
    assert found.scores == pytest.approx(seen, rel=1e-3, abs=1e-5)
    assert found.blocks == sorted(sorted(seen, key=lambda block: seen[block])[:2])
    assert set(choose("block_influence", model, 1, {2, 3}).blocks) <= {2, 3}
