"""`sparse24_linear` on a CPU: csrc/sparse24_linear.cpp, or the reference where it cannot be compiled. See ways.py."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ..native import library
from ..ways import Ways, address, by_tokens, declare
from .layout import PLANE, TILE, WIDTH, Sparse24Weight
from .reference import sparse24_linear_reference

P, N, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "sparse24_has": [],
    "sparse24_product": [I, P, N, P, P, P, P, N, N, N, I],
    "sparse24_spread": [P, P, P, N, N, N, N, I],
}
FEW, MANY = 1, 2  # bits of `sparse24_has`
POSITIONS = 0x9999 - 0x10000  # columns 1 and 2 of all fours, int16


def sparse24_linear_cpu(x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias; shapes as in `sparse24_linear`."""
    kernels = native()
    if kernels is None:
        return sparse24_linear_reference(x, *weight, bias)
    return by_tokens(x, weight.values.shape[1], lambda tokens: kernels.product(tokens, weight, bias))


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("sparse24_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels(Ways[Sparse24Weight]):
    """The functions of csrc/sparse24_linear.cpp."""

    name = "sparse24_linear"

    def __init__(self, compiled: ctypes.CDLL) -> None:
        declare(compiled, SIGNATURES)
        self._compiled = compiled
        self._has: int = compiled.sparse24_has()
        self.matrix = bool(self._has & MANY)

    @staticmethod
    def sample(dtype: torch.dtype, rows: int, columns: int) -> Sparse24Weight:
        planes, tiles = -(-columns // PLANE), -(-columns // TILE)
        values = torch.randn(planes, rows, 2 * WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
        return Sparse24Weight(values, torch.full((tiles, rows, WIDTH), POSITIONS, dtype=torch.int16))

    def has_rows(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and bool(self._has & FEW)

    def rows_of(self, weight: Sparse24Weight) -> int:
        return weight.values.shape[1]

    def by_rows(self, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        """Weights put at their columns in registers and used for up to four tokens."""
        return self._product(0, x, weight, bias)

    def by_matrix(self, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        """The same as factors of matrix instructions."""
        return self._product(1, x, weight, bias)

    def _product(self, many: int, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        (tokens, columns), rows = x.shape, weight.values.shape[1]
        y = x.new_empty(tokens, rows)
        failed = self._compiled.sparse24_product(
            many, x.data_ptr(), x.stride(0), weight.values.data_ptr(), weight.positions.data_ptr(), address(bias),
            y.data_ptr(), tokens, rows, columns, torch.get_num_threads(),
        )  # fmt: skip
        return self.finished(y, failed)

    def unpack(self, weight: Sparse24Weight, first: int, out: Tensor) -> None:
        count, columns = out.shape
        self._compiled.sparse24_spread(
            weight.values.data_ptr(), weight.positions.data_ptr(), out.data_ptr(), first, count, weight.values.shape[1],
            columns, torch.get_num_threads(),
        )  # fmt: skip
