"""RTN: round every weight to the nearest point of its group's grid. Needs no data.

    code = clamp(round(w / scale) + zero, 0, 2^bits - 1)

The range of a group is either its extremes (`range: minmax`) or the shrunken range with the least rounding
error (`range: search`). `range: auto` searches on symmetric grids only; asymmetric ones fit both ends already.
"""

from typing import Literal

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.methods.base import IntMethod
from llmcompress.weight import CompressedWeight


class RTN(IntMethod):
    """Options of `method: rtn`."""

    range: Literal["auto", "minmax", "search"] = Field("auto", description="auto: search on symmetric grids")

    def compress(
        self, weight: Tensor, statistics: Tensor | None, dtype: "torch.dtype", mask: Tensor | None = None
    ) -> CompressedWeight:
        """Round weight [out, in] float32; `statistics` are not used."""
        grid = self.fit(weight, dtype, search=self.searches)
        return CompressedWeight.on_grid(grid.encode(weight), grid, mask)

    @property
    def searches(self) -> bool:
        """Whether ranges are searched: an asymmetric one fits both ends already, and clipping it costs more."""
        return self.symmetric if self.range == "auto" else self.range == "search"
