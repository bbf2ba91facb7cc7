"""Activation norms: how large what a unit puts out is over calibration tokens.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), arXiv:2407.14679,
section 2.2, with the L2 norm over tokens for units; for channels of the residual stream x are the outputs of the norms
that blocks read it through:

    units       score(u) = sqrt( sum over the unit's outputs j of E[x_j²] )
    channels    score(i) = sum over norms of E[|x_i|]
"""

from typing import TYPE_CHECKING, ClassVar

from llmcompress.lazy import Tensor, torch
from llmcompress.structure.scores.base import Seen, UnitScore, Walk, of_columns
from llmcompress.structure.scores.channels import ChannelScore, Stream

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group


class Activation(UnitScore):
    """Options of `score: activation`."""

    walk: ClassVar[Walk] = "inputs"

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """The norm for each unit, [units]."""
        return of_columns(group, seen.inputs[group.consumer].square).sqrt()


class ChannelActivation(ChannelScore):
    """Options of `score: activation` for the hidden dimension."""

    looks_at_data: ClassVar[bool] = True

    def score(self, stream: Stream) -> Tensor:
        """The sum for each channel, [width]."""
        total = torch.zeros(stream.width)
        for sizes in stream.inputs():
            total += sizes.cpu()
        return total
