"""Greedy: remove the block without which the model predicts calibration text best, then look again.

Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
arXiv:2402.09025, algorithm 1. With R the blocks that are gone and L the mean next-token loss over calibration windows:

    score(b) = L(model without R and b)          R <- R and the b of least score, again and again

One round is one walk over the model: every candidate's hidden states, which lack one block, go through the remaining
blocks beside each other, so a block is loaded once per round whatever their number.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.structure.scores.depth import BlockScore, Dropped, Told

if TYPE_CHECKING:
    from llmcompress.stream import Block, StreamedModel


class Greedy(BlockScore):
    """Options of `score: greedy`."""

    looks_at_losses: ClassVar[bool] = True

    samples: int = Field(8, ge=1, description="calibration windows that candidates are judged on")

    def effort(self, count: int, drop: int, samples: int) -> tuple[float, float]:
        """Every candidate's hidden states at once; on average each goes through half of the blocks, round by round."""
        windows = float(min(self.samples, samples))
        return (count + 1) * windows, drop * (1 + count / 2) * windows

    def choose(self, model: "StreamedModel", tokens: Tensor, count: int, allowed: set[int], tell: Told) -> Dropped:
        """One block after another, each with the least mean next-token loss (nats) of the model without it."""
        tokens, gone, scores = tokens[: self.samples], list[int](), dict[int, float]()
        steps = model.architecture.count
        for done in range(count):
            losses = self._round(model, tokens, gone, allowed, partial(told, tell, done * steps, count * steps))
            scores |= losses
            gone.append(min(losses, key=lambda block: (losses[block], -block)))
        return Dropped(sorted(gone), scores)

    def _round(
        self, model: "StreamedModel", tokens: Tensor, gone: list[int], allowed: set[int], tell: Callable[[int], None]
    ) -> dict[int, float]:
        """Loss without each candidate, in the model that lacks the blocks in `gone` already."""
        hidden, without = model.embed(tokens), dict[int, Tensor]()
        for index in range(model.architecture.count):
            if index in gone:
                continue
            block = model.load_block(index, hidden)
            for other in without.values():
                advance(replace(block, hidden=other))
            if index in allowed:
                without[index] = hidden.clone()
            advance(block)
            model.free_block(index)
            tell(index + 1)
        with model.head() as logits:
            return {index: loss(logits, states.to(model.device), tokens) for index, states in without.items()}


def told(tell: Told, before: int, total: int, done: int) -> None:
    """Tell how far all rounds are when this one has `done` steps behind it."""
    tell(before + done, total)


def advance(block: "Block") -> None:
    """Replace the hidden states that a block holds by its outputs."""
    for rows in block.batches():
        block.hidden[rows] = block.forward(rows).to(block.hidden.device)


def loss(logits: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor) -> float:
    """Mean next-token loss over windows, in nats."""
    total = 0.0
    for row, window in zip(hidden, tokens, strict=True):
        found = logits(row[None])[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(found, window[1:].to(found.device)))
    return total / len(tokens)
