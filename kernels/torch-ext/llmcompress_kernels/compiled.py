"""What the compiled kernels of every format have in common: one C interface (csrc/interface.h), called by ctypes.

An operator's `cpu.py` derives a class from `Compiled` that names the tensors of its weight. A small product takes some
microseconds, as long as a few lines of Python: so x is neither reshaped nor is y when that can be left out, and what
crossover.py found is looked up here.
"""

import ctypes
import sys
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .crossover import NONE
from .ways import W, Ways, address, by_tokens, declare, is_half

P, N, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
WEIGHT: list[Any] = [I, P, P, P, N, N, N, I]  # dtype, three tensors, rows, columns, columns per scale; then threads
SIGNATURES: dict[str, list[Any]] = {
    "has_matrix": [],
    "multiply": [I, *WEIGHT, P, N, P, P, N],
    "unpack": [*WEIGHT, P, N, N],
}


class Compiled(Ways[W]):
    """The functions of one csrc/<operator>.cpp."""

    rows_suit_many: ClassVar[bool] = False  # whether `by_rows` that is faster for tens of tokens is so for thousands

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, SIGNATURES)
        self._multiply, self._unpack = library.multiply, library.unpack
        self.matrix = bool(library.has_matrix())
        self._many: dict[tuple[object, ...], int] = {}  # as many as there are shapes of weights

    @abstractmethod
    def tensors_of(self, weight: W) -> tuple[Tensor, Tensor, Tensor | None]:
        """In the order in which the C++ wants them."""

    @abstractmethod
    def group_of(self, weight: W, columns: int) -> int:
        """Columns per scale; 0 without scales."""

    def linear(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        """x [..., in] with any strides, of any number of tokens -> [..., out]."""
        rows, columns = self.rows_of(weight), x.shape[-1]
        tokens = x.numel() // columns
        if tokens and rows and x.is_contiguous():
            if self.takes_rows(tokens, x.dtype, rows, columns):
                return self.by_rows(x, weight, bias)
            if self.matrix and x.dtype == torch.bfloat16:
                return self.by_matrix(x, weight, bias)
        return by_tokens(x, rows, lambda tokens: self.product(tokens, weight, bias))

    def takes_rows(self, tokens: int, dtype: torch.dtype, rows: int, columns: int) -> bool:
        """Whether a product is of few tokens."""
        return tokens == 1 or tokens < self.many(dtype, (rows, columns))

    def many(self, dtype: torch.dtype, shape: tuple[int, int]) -> int:
        """As `Ways.many`; beyond all numbers where none was found and `by_rows` suits them."""
        key = dtype, shape, torch.get_num_threads()
        found = self._many.get(key)
        if found is None:
            measured = super().many(dtype, shape)
            none = measured == NONE and self.rows_suit_many and not (self.matrix and dtype == torch.bfloat16)
            found = self._many[key] = sys.maxsize if none else measured
        return found

    def by_rows(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        """Weights made in registers and used for up to four or eight tokens. x: [M, in], or contiguous."""
        return self._product(0, x, weight, bias)

    def by_matrix(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        """Weights made as factors of matrix instructions. x: as above."""
        return self._product(1, x, weight, bias)

    def _product(self, many: int, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        (a, b, c), rows, columns = self.tensors_of(weight), self.rows_of(weight), x.shape[-1]
        y = x.new_empty(*x.shape[:-1], rows)
        failed = self._multiply(
            many, is_half(x), a.data_ptr(), b.data_ptr(), address(c), rows, columns, self.group_of(weight, columns),
            torch.get_num_threads(), x.data_ptr(), x.stride(0) if x.dim() == 2 else columns, address(bias),
            y.data_ptr(), x.numel() // columns,
        )  # fmt: skip
        return self.finished(y, failed)

    def unpack(self, weight: W, first: int, out: Tensor) -> None:
        (a, b, c), (count, columns) = self.tensors_of(weight), out.shape
        self._unpack(
            is_half(out), a.data_ptr(), b.data_ptr(), address(c), self.rows_of(weight), columns,
            self.group_of(weight, columns), torch.get_num_threads(), out.data_ptr(), first, count,
        )  # fmt: skip
