"""`sparse24_int4_linear` on a CPU: csrc/sparse24_int4_linear.cpp, or the reference where it cannot be compiled.

Few tokens do not round the product (code - 8) * scale; many round it to the dtype of x. See ways.py.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ..int4_linear.layout import GROUPS
from ..native import library
from ..ways import Ways, address, by_tokens, declare, is_half
from .layout import BLOCK, LANES, STRIP, TILE, Sparse24Int4Weight
from .reference import sparse24_int4_linear_reference

P, N, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "sparse24_int4_has": [],
    "sparse24_int4_product": [I, P, N, P, P, P, P, P, N, N, N, N, I],
    "sparse24_int4_spread": [I, P, P, P, P, N, N, N, N, N, I],
}
FEW, MANY = 1, 2  # bits of `sparse24_int4_has`
POSITIONS = 0x99999999 - (1 << 32)  # columns 1 and 2 of all fours, int32


def sparse24_int4_linear_cpu(x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias; shapes as in `sparse24_int4_linear`."""
    kernels = native()
    if kernels is None:
        return sparse24_int4_linear_reference(x, *weight, bias)
    return by_tokens(x, weight.scale.shape[1], lambda tokens: kernels.product(tokens, weight, bias))


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("sparse24_int4_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels(Ways[Sparse24Int4Weight]):
    """The functions of csrc/sparse24_int4_linear.cpp."""

    name = "sparse24_int4_linear"

    def __init__(self, compiled: ctypes.CDLL) -> None:
        declare(compiled, SIGNATURES)
        self._compiled = compiled
        self._has: int = compiled.sparse24_int4_has()
        self.matrix = bool(self._has & MANY)

    @staticmethod
    def sample(dtype: torch.dtype, rows: int, columns: int) -> Sparse24Int4Weight:
        group = next(size for size in reversed(GROUPS) if columns % size == 0)
        shape = (-(-columns // BLOCK), -(-rows // STRIP), LANES, 4)
        words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        metadata = torch.full((-(-columns // TILE), *shape[1:]), POSITIONS, dtype=torch.int32)
        return Sparse24Int4Weight(words, metadata, torch.full((columns // group, rows), 0.01, dtype=dtype))

    def has_rows(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and bool(self._has & FEW)

    def rows_of(self, weight: Sparse24Int4Weight) -> int:
        return weight.scale.shape[1]

    def by_rows(self, x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None) -> Tensor:
        """Weights put at their columns in registers and used for up to four tokens."""
        return self._product(0, x, weight, bias)

    def by_matrix(self, x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None) -> Tensor:
        """The same as factors of matrix instructions."""
        return self._product(1, x, weight, bias)

    def _product(self, many: int, x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None) -> Tensor:
        (tokens, columns), (words, metadata, scale) = x.shape, weight
        y = x.new_empty(tokens, scale.shape[1])
        failed = self._compiled.sparse24_int4_product(
            many, x.data_ptr(), x.stride(0), words.data_ptr(), metadata.data_ptr(), scale.data_ptr(), address(bias),
            y.data_ptr(), tokens, scale.shape[1], columns, columns // scale.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return self.finished(y, failed)

    def unpack(self, weight: Sparse24Int4Weight, first: int, out: Tensor) -> None:
        (count, columns), (words, metadata, scale) = out.shape, weight
        self._compiled.sparse24_int4_spread(
            is_half(out), words.data_ptr(), metadata.data_ptr(), scale.data_ptr(), out.data_ptr(), first, count,
            scale.shape[1], columns, columns // scale.shape[0], torch.get_num_threads(),
        )  # fmt: skip
