"""Geometric median: units that are most like all others go, since the others can stand in for them.

He et al. 2019, "Filter Pruning via Geometric Median" (FPGM), arXiv:1811.00250, equation 6. c_u is everything that goes
with unit u, each matrix scaled to the same total size so that none decides alone:

    score(u) = sum over v of || c_u - c_v ||
"""

from typing import TYPE_CHECKING, ClassVar

from llmcompress.lazy import Tensor, torch
from llmcompress.structure.scores.base import Seen, UnitScore

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group

ROWS = 1024  # distances of so many units to all others at once


class GeometricMedian(UnitScore):
    """Options of `score: geometric_median`."""

    within_block: ClassVar[bool] = True

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """The sum of distances of each unit, [units]."""
        parts = [seen.weights[group.consumer].T[group.columns].flatten(1)]
        parts += [seen.weights[name][table].flatten(1) for name, table in group.rows.items()]
        vectors = torch.cat([part / part.norm().clamp(min=torch.finfo(part.dtype).tiny) for part in parts], 1)
        return torch.cat([torch.cdist(some, vectors).sum(1) for some in vectors.split(ROWS)])
