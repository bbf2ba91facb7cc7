"""RIA: relative importance and activations.

Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
equations 3 and 4. A weight counts by its share of its row and of its column, so that no channel is lost as a whole:

    S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) ||x_j||^a
"""

from typing import ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.methods.base import ScoreMethod, required
from llmcompress.shelf import HALVES, Shelf
from llmcompress.stats import InputSquares, Statistics


class RIA(ScoreMethod):
    """Options of `method: ria`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights, or two of four",
        HALVES,
        "exact counts of each pattern; masks survive every later step",
    )

    a: float = Field(0.5, ge=0, le=2, description="weight of the activations")
    needs: ClassVar[Statistics | None] = InputSquares

    @property
    def stacks(self) -> bool:
        """Never: column sums are over the rows of one matrix."""
        return False

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """The equation above for weight [out, in] and mean squared inputs [in] float32, with RMS inputs."""
        size = weight.abs()
        tiny = torch.finfo(size.dtype).tiny  # an all-zero row or column has scores of zero
        share = size / size.sum(0).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
        return share * required(self, statistics).pow(self.a / 2)
