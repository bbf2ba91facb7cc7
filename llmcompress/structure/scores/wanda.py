"""Wanda for units: the sum over everything that goes with a unit of |W_ij| ||x_j||.

The score of Sun et al. 2023 (arXiv:2306.11695) for single weights, with ||x_j|| the root mean square of input j over
calibration tokens, added up over the coupled weights.
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
