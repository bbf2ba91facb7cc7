"""Taylor: the expected squared change of the loss when a weight goes, to first order.

Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771, equation 8, averaged over
calibration windows. L is the next-token loss of the dense model on one window:

    S_ij = W_ij² mean((dL/dW_ij)²)
"""

from typing import ClassVar

from llmcompress.lazy import Tensor
from llmcompress.methods.base import ScoreMethod, required
from llmcompress.shelf import HALVES, Shelf
from llmcompress.stats import GradientSquare, Statistics


class Taylor(ScoreMethod):
    """Options of `method: taylor`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights, or two of four",
        HALVES,
        "exact counts of each pattern; masks survive every later step",
    )

    needs: ClassVar[Statistics | None] = GradientSquare

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """W² F for weight and mean squared gradient F [out, in] float32."""
        return weight.square() * required(self, statistics)
