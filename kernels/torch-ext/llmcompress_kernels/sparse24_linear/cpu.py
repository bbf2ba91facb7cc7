"""`sparse24_linear` on a CPU: csrc/sparse24_linear.cpp, or the reference where it cannot be compiled. See ways.py."""

import functools

import torch
from torch import Tensor

from ..compiled import Compiled
from ..native import library
from .layout import PLANE, TILE, WIDTH, Sparse24Weight
from .reference import sparse24_linear_reference

POSITIONS = 0x9999 - 0x10000  # columns 1 and 2 of all fours, int16


def sparse24_linear_cpu(x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias; shapes as in `sparse24_linear`."""
    kernels = native()
    if kernels is None:
        return sparse24_linear_reference(x, *weight, bias)
    return kernels.linear(x, weight, bias)


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("sparse24_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels(Compiled[Sparse24Weight]):
    """The functions of csrc/sparse24_linear.cpp."""

    name = "sparse24_linear"

    @staticmethod
    def sample(dtype: torch.dtype, rows: int, columns: int) -> Sparse24Weight:
        planes, tiles = -(-columns // PLANE), -(-columns // TILE)
        values = torch.randn(planes, rows, 2 * WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
        return Sparse24Weight(values, torch.full((tiles, rows, WIDTH), POSITIONS, dtype=torch.int16))

    def tensors_of(self, weight: Sparse24Weight) -> tuple[Tensor, Tensor, Tensor | None]:
        return weight.values, weight.positions, None

    def rows_of(self, weight: Sparse24Weight) -> int:
        return weight.values.shape[1]

    def group_of(self, weight: Sparse24Weight, columns: int) -> int:
        return 0
