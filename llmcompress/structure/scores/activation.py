"""Activation norms: how large what a unit puts out is over calibration tokens.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), arXiv:2407.14679,
section 2.2, with the L2 norm over tokens:

    score(u) = sqrt( sum over the unit's outputs j of E[x_j²] )
"""

from typing import TYPE_CHECKING, ClassVar

from llmcompress.lazy import Tensor
from llmcompress.structure.scores.base import Seen, UnitScore, Walk, of_columns

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group


class Activation(UnitScore):
    """Options of `score: activation`."""

    walk: ClassVar[Walk] = "inputs"

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """The norm for each unit, [units]."""
        return of_columns(group, seen.inputs[group.consumer].square).sqrt()
