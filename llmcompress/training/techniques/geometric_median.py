"""Geometric median, soft: units that the others can stand in for are silenced now and then, and go on learning. FPGM,
He et al. 2019, arXiv:1811.00250.

    d(u) = Σ_v ||c_u - c_v||        c_u: everything that goes with unit u, each matrix scaled to the same total size

The units of a block with the smallest d, those nearest to its geometric median, are the most replaceable; norms play no
part. Every `every` steps a share `ratio` of them is silenced: what they give to the rest of the model is set to zero,
their columns of the down or output projection. The paper zeroes a filter's weights and keeps the next layer's, through
which it may recover; here a unit's own rows stay, for the same reason, as a unit of which everything is zero gets no
gradient. The last time, those that are chosen go for good, as a whole. With `by: norm` the units of the smallest norm
go instead, which is what the paper compares with (soft filter pruning, He et al. 2018, arXiv:1808.06866).
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from llmcompress.lazy import Tensor
from llmcompress.shelf import UNITS, Shelf
from llmcompress.structure.scores.base import Seen
from llmcompress.structure.scores.geometric_median import GeometricMedian
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import Fewer, Units, UnitTechnique, lowest


class SoftGeometricMedian(Fewer):
    """Options of `train: geometric_median`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training",
        "MLP channels, KV groups, heads",
        UNITS,
        "copies go first, whatever their norm; every block loses the same share; the smaller model computes the same",
    )

    every: int = Field(20, ge=1, description="steps between choices")
    by: Literal["distance", "norm"] = Field(
        "distance", description="what the smallest go by: the distance to all others, or as a baseline their norm"
    )

    def technique(self) -> Technique:
        """Silence, and let learn."""
        return SoftPruning(self)


class SoftPruning(UnitTechnique):
    """Silence, and let learn."""

    options: Any

    def after_step(self, step: int, learner: Learner) -> None:
        """Choose if it is time, anew every time; at the end for good."""
        if not self.options.turn(step, self.options.every):
            return
        for units in self.units:
            scores = units.norms() if self.options.by == "norm" else distances(units)
            stay = lowest(scores, round(self.options.ratio * units.count))
            if step == self.options.end:
                units.mask(self.masks, stay)
            else:
                units.scale_outputs(stay.float())


def distances(units: Units) -> Tensor:
    """The sum of distances of each unit to all others, [units]."""
    return GeometricMedian().score(units.group, Seen(units.block, units.weights()))
