"""Fluctuation: how far a unit's output strays from its mean, which alone a bias could replace.

An et al. 2023, "Fluctuation-based Adaptive Structured Pruning" (FLAP), arXiv:2312.11983, equation 4. With x the inputs
of the consumer W:

    score(u) = sum over the unit's columns j of Var(x_j) ||W_:j||²
"""

from typing import TYPE_CHECKING, ClassVar

from llmcompress.lazy import Tensor
from llmcompress.structure.scores.base import Seen, UnitScore, Walk, of_columns

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group


class Fluctuation(UnitScore):
    """Options of `score: fluctuation`."""

    walk: ClassVar[Walk] = "inputs"

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """The fluctuation of each unit, [units]."""
        strength = seen.weights[group.consumer].square().sum(0)
        return of_columns(group, seen.inputs[group.consumer].variance * strength)
