"""What every method is: frozen options, the statistics it needs, and a pure function from weight to result."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from llmcompress.grid import IntGrid, fit_range
from llmcompress.options import Options
from llmcompress.stats import InputGram
from llmcompress.weight import CompressedWeight


class Method(Options):
    """Base of every method; subclasses add their options as fields.

    A method knows one weight: no model, no names, no files. `compress` must treat output rows independently, so that
    weights that share their input can be stacked and share one factorization of its Gram matrix.
    """

    needs: ClassVar[type[InputGram] | None] = None  # statistics gathered for `compress`; None for data-free methods
    rescales: ClassVar[bool] = False  # True: `link_scale` is asked before `compress`, for every link

    def compress(self, weight: Tensor, gram: Tensor | None, dtype: torch.dtype) -> CompressedWeight:
        """weight [out, in] float32, gram [in, in] float32 or None -> the weight as a checkpoint of `dtype` holds it."""
        raise NotImplementedError(f"{type(self).__name__}.compress")

    def link_scale(self, weights: list[Tensor], gram: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Factors to move from consumers to their producer before `compress`; see `methods/awq.py`."""
        raise NotImplementedError(f"{type(self).__name__}.link_scale")


class IntMethod(Method):
    """A method whose result lies on an integer grid."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | Literal["row"] = Field(64, description="input columns per scale, or 'row' for whole rows")
    symmetric: bool = True

    @field_validator("group_size")
    @classmethod
    def _known_group(cls, value: Any) -> Any:
        if value not in (32, 64, 128, "row"):
            raise ValueError("group_size must be 32, 64, 128 or 'row' (one scale per output row)")
        return value

    def group(self, columns: int) -> int:
        """Columns per scale for a weight of `columns` input features."""
        return columns if self.group_size == "row" else int(self.group_size)

    def fit(
        self, weight: Tensor, dtype: torch.dtype, *, search: bool = True, importance: Tensor | None = None
    ) -> IntGrid:
        """The grid of these options for weight [out, in]; see `grid.fit_range`."""
        return fit_range(
            weight,
            bits=self.bits,
            group=self.group(weight.shape[1]),
            symmetric=self.symmetric,
            dtype=dtype,
            search=search,
            importance=importance,
        )
