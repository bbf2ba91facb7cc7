"""Magnitude: the size of everything that goes with a unit. The classic baseline, and a weak one for language models.

    l1    score(u) = sum |w|              l2    score(u) = sqrt(sum w²)

Sums are over all weights that are coupled in the unit, or that have the channel of the residual stream.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.structure.scores.base import Seen, UnitScore, summed
from llmcompress.structure.scores.channels import ChannelScore, Stream

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


class ChannelMagnitude(ChannelScore):
    """Options of `score: magnitude` for the hidden dimension."""

    norm: Literal["l1", "l2"] = Field("l2", description="sum of sizes, or root of the sum of squares")

    def score(self, stream: Stream) -> Tensor:
        """The norm of each channel's weights in the whole model, [width]."""
        total = torch.zeros(stream.width)
        for piece in stream.slices():
            total += (piece.abs() if self.norm == "l1" else piece.square()).sum(1).cpu()
        return total if self.norm == "l1" else total.sqrt()
