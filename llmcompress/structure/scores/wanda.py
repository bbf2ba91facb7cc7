"""Wanda for units: weights by their size and that of what they meet, added up over all that goes with a unit.

The score of Sun et al. 2023 (arXiv:2306.11695) for single weights, with ||x_j|| the root mean square of input j over
calibration tokens:

    score(u) = sum over the coupled weights of |W_ij| ||x_j||
"""

from typing import TYPE_CHECKING, ClassVar

from llmcompress.lazy import Tensor
from llmcompress.structure.scores.base import Seen, UnitScore, Walk, summed

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group


class Wanda(UnitScore):
    """Options of `score: wanda`."""

    walk: ClassVar[Walk] = "inputs"

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """The sum for each unit, [units]."""
        return summed(group, {name: w.abs() * seen.inputs[name].square.sqrt() for name, w in seen.weights.items()})
