"""SNIP: what goes is what changes the loss least when it goes, to first order.

Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv:1810.02340, equations 4 to
6, without the normalization over all weights, which changes no order. L is the next-token loss of the dense model:

    S_ij = |W_ij mean(dL/dW_ij)|

Gradients of opposite sign cancel over the calibration windows; `taylor` is the score in which they do not.
"""

from typing import ClassVar

from llmcompress.lazy import Tensor
from llmcompress.methods.base import ScoreMethod, required
from llmcompress.shelf import HALVES, Shelf
from llmcompress.stats import GradientMean, Statistics


class SNIP(ScoreMethod):
    """Options of `method: snip`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights, or two of four",
        HALVES,
        "exact counts of each pattern; masks survive every later step",
    )

    needs: ClassVar[Statistics | None] = GradientMean

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """|W g| for weight and mean gradient [out, in] float32."""
        return (weight * required(self, statistics)).abs()
