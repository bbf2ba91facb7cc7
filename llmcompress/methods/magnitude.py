"""Magnitude pruning: the smallest weights go. Han et al. 2015, arXiv:1506.02626. S_ij = |W_ij|"""

from llmcompress.lazy import Tensor
from llmcompress.methods.base import ScoreMethod


class Magnitude(ScoreMethod):
    """Options of `method: magnitude`."""

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """|W| for weight [out, in] float32; `statistics` are not used."""
        return weight.abs()
