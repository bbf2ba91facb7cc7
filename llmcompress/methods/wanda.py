"""Wanda: prune by weights and activations, without an update.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695, equation 1.
With ||x_j|| the norm of input j over the calibration tokens, here the root mean square:

    S_ij = |W_ij| ||x_j||          compared within each output row
"""

from typing import ClassVar

from llmcompress.lazy import Tensor
from llmcompress.methods.base import ScoreMethod, required
from llmcompress.shelf import HALVES, Shelf
from llmcompress.stats import InputSquares, Statistics


class Wanda(ScoreMethod):
    """Options of `method: wanda`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights, or two of four",
        HALVES,
        "exact counts of each pattern; masks survive every later step; better than magnitude",
    )

    needs: ClassVar[Statistics | None] = InputSquares

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """|W_ij| ||x_j|| for weight [out, in] and mean squared inputs [in] float32."""
        return weight.abs() * required(self, statistics).sqrt()
