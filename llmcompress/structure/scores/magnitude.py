"""Magnitude: the size of everything that goes with a unit. The classic baseline, and a weak one for language models.

l1   sum |w|              l2   sqrt(sum w²)
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmcompress.lazy import Tensor
from llmcompress.structure.scores.base import Seen, UnitScore, summed

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group


class Magnitude(UnitScore):
    """Options of `score: magnitude`."""

    norm: Literal["l1", "l2"] = Field("l2", description="sum of sizes, or root of the sum of squares")

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """The norm of each unit's weights, [units]."""
        if self.norm == "l1":
            return summed(group, {name: w.abs() for name, w in seen.weights.items()})
        return summed(group, {name: w.square() for name, w in seen.weights.items()}).sqrt()
