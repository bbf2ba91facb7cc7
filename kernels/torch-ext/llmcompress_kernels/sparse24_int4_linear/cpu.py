"""`sparse24_int4_linear` on a CPU: csrc/sparse24_int4_linear.cpp, or the reference where it cannot be compiled.

Few tokens do not round the product (code - 8) * scale; many round it to the dtype of x. See ways.py.
"""

import functools

import torch
from torch import Tensor

from ..compiled import Compiled
from ..int4_linear.layout import GROUPS
from ..native import library
from .layout import BLOCK, LANES, STRIP, TILE, Sparse24Int4Weight
from .reference import sparse24_int4_linear_reference

POSITIONS = 0x99999999 - (1 << 32)  # columns 1 and 2 of all fours, int32


def sparse24_int4_linear_cpu(x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias; shapes as in `sparse24_int4_linear`."""
    kernels = native()
    if kernels is None:
        return sparse24_int4_linear_reference(x, *weight, bias)
    return kernels.linear(x, weight, bias)


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("sparse24_int4_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels(Compiled[Sparse24Int4Weight]):
    """The functions of csrc/sparse24_int4_linear.cpp."""

    name = "sparse24_int4_linear"

    @staticmethod
    def sample(dtype: torch.dtype, rows: int, columns: int) -> Sparse24Int4Weight:
        group = next(size for size in reversed(GROUPS) if columns % size == 0)
        shape = (-(-columns // BLOCK), -(-rows // STRIP), LANES, 4)
        words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        metadata = torch.full((-(-columns // TILE), *shape[1:]), POSITIONS, dtype=torch.int32)
        return Sparse24Int4Weight(words, metadata, torch.full((columns // group, rows), 0.01, dtype=dtype))

    def tensors_of(self, weight: Sparse24Int4Weight) -> tuple[Tensor, Tensor, Tensor | None]:
        return weight

    def rows_of(self, weight: Sparse24Int4Weight) -> int:
        return weight.scale.shape[1]

    def group_of(self, weight: Sparse24Int4Weight, columns: int) -> int:
        return columns // weight.scale.shape[0]
