"""Block influence: how much a block turns what passes through it.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv:2403.03853,
equation 1. With x a token's vector before the block and y after it, averaged over calibration tokens:

    BI = 1 - E[ xᵀ y / (||x|| ||y||) ]

All blocks are judged in one walk over the dense model.
"""

from typing import TYPE_CHECKING

from llmcompress.lazy import Tensor, torch
from llmcompress.structure.scores.depth import BlockScore, Dropped, Told, lowest

if TYPE_CHECKING:
    from llmcompress.stream import StreamedModel


class BlockInfluence(BlockScore):
    """Options of `score: block_influence`."""

    def choose(self, model: "StreamedModel", tokens: Tensor, count: int, allowed: set[int], tell: Told) -> Dropped:
        """The blocks of least influence."""
        hidden, scores = model.embed(tokens), {}
        for index in range(model.architecture.count):
            block, total = model.load_block(index, hidden), 0.0
            for rows in block.batches():
                before, after = hidden[rows].float(), block.forward(rows).cpu()
                total += float(torch.cosine_similarity(before, after.float(), dim=-1).sum())
                hidden[rows] = after
            model.free_block(index)
            scores[index] = 1 - total / tokens.numel()
            tell(index + 1, model.architecture.count)
        return lowest({index: scores[index] for index in allowed}, count)
