"""What every score of units has in common, and how values of weights become values of units.

A score says how much a unit matters; the lowest go. Those of width judge the units of one block from its weights and
from what was gathered in a walk over the dense model. Those of depth judge whole blocks, see `depth.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from llmcompress.lazy import Tensor
from llmcompress.options import Options
from llmcompress.stats import GradientMoments, InputMoments

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group

Walk = Literal["weights", "inputs", "gradients"]


@dataclass(frozen=True, slots=True)
class Seen:
    """A block of the dense model, and what a walk gathered of it."""

    block: int
    weights: dict[str, Tensor]  # linear -> [out, in] float32, of those in the group
    inputs: dict[str, InputMoments] = field(default_factory=dict)  # by linear
    gradients: dict[str, GradientMoments] = field(default_factory=dict)  # by linear

    def forget(self) -> None:
        """Let go of all tensors, here and in the walk that gathered them: the next block needs the room."""
        for part in (self.weights, self.inputs, self.gradients):
            part.clear()


class UnitScore(Options):
    """Base of scores for the units of a group within a block."""

    walk: ClassVar[Walk] = "weights"  # what must be gathered first
    across_blocks: ClassVar[bool] = False  # scores of different blocks are in one unit, such as the loss
    per_parameter: ClassVar[bool] = True  # of units that matter as much, the larger one should go
    within_block: ClassVar[bool] = False  # a unit is judged by the others of its block, so there must be some

    def windows(self, samples: int) -> int:
        """How many of the calibration windows the walk takes."""
        return samples

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """How much each unit matters, [units] float32 >= 0; higher is better."""
        raise NotImplementedError(f"{type(self).__name__}.score")


def summed(group: "Group", values: Mapping[str, Tensor]) -> Tensor:
    """Sum over everything that goes with a unit; values: linear -> [out, in]. Returns [units]."""
    total = values[group.consumer].sum(0)[group.columns].sum(1)
    for name, table in group.rows.items():
        total = total + values[name].sum(1)[table].sum(1)
    return total


def of_columns(group: "Group", values: Tensor) -> Tensor:
    """Sum over the consumer's input columns of a unit; values [in]. Returns [units]."""
    return values[group.columns].sum(1)
