"""Geometric median, soft: units that the others can stand in for are silenced now and then, and go on learning. FPGM,
He et al. 2019, arXiv:1811.00250.

    d(u) = Σ_v ||c_u - c_v||        c_u: everything that goes with unit u, each matrix scaled to the same total size

The units of a block with the smallest d, those nearest to its geometric median, are the most replaceable; norms play no
part. (`small` is the paper's filter before it: that share of the units goes for its norm, the smallest first, and
distances choose the rest of `ratio` among those that are left. With `by: norm` all go for their norm, which is what the
paper compares with: soft filter pruning, He et al. 2018, arXiv:1808.06866.) Every `every` steps a share `ratio` is
silenced: what they give to the rest of the model is set to zero, their columns of the down or output projection. The
paper zeroes a filter's weights and keeps the next layer's, through which it may recover; here a unit's own rows stay,
for the same reason, as a unit of which everything is zero gets no gradient. The last time, those that are chosen go for
good, as a whole.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.lazy import Tensor, torch
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
    small: float = Field(0.0, ge=0, description="share of the units, out of `ratio`, that goes for its small norm")

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        if self.small and self.by == "norm":
            raise ValueError("small: with `by: norm` all units go for their norm; leave one of both out")
        if self.small >= self.ratio:
            raise ValueError(
                f"small: norms would choose {self.small:g} of the units, and {self.ratio:g} are to go, so that none is "
                "left for distances; use a smaller share"
            )
        return self

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
            share = self.options.ratio if self.options.by == "norm" else self.options.small
            stay = staying(units, self.options.ratio, share)
            if step == self.options.end:
                units.mask(self.masks, stay)
            else:
                units.scale_outputs(stay.float())


def staying(units: Units, ratio: float, small: float = 0.0) -> Tensor:
    """Which units stay, [units] bool, when a share `ratio` goes, of which `small` for their norms."""
    large = lowest(units.norms(), round(small * units.count))
    left = large.nonzero().flatten()
    gone = round(ratio * units.count) - (units.count - len(left))
    if gone == 0:
        return large
    stay = torch.zeros_like(large)
    stay[left] = lowest(distances(units, left), gone)
    return stay


def distances(units: Units, some: Tensor) -> Tensor:
    """The sum of distances of each of some units [n] int64 to the others of these, [n]."""
    at = some.to(units.group.columns.device)
    rows = {name: table[at] for name, table in units.group.rows.items()}
    group = replace(units.group, rows=rows, columns=units.group.columns[at])
    return GeometricMedian().score(group, Seen(units.block, units.weights()))
