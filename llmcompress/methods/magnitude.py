"""Magnitude pruning: the smallest weights go. Han et al. 2015, arXiv:1506.02626.

    S_ij = |W_ij|

The highest scores stay, as for every method that scores; how many, and of which weights together, says the pattern.
"""

from typing import ClassVar

from llmcompress.lazy import Tensor
from llmcompress.methods.base import ScoreMethod
from llmcompress.shelf import HALVES, Shelf


class Magnitude(ScoreMethod):
    """Options of `method: magnitude`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights, or two of four",
        HALVES,
        "exact counts of each pattern; masks survive every later step",
    )

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """|W| for weight [out, in] float32; `statistics` are not used."""
        return weight.abs()
