"""The ways in which a CPU multiplies with a packed weight, whatever its format, and which one it takes.

    few tokens                      `by_rows`: weights are made in registers
    many, bfloat16, CPUs with AMX   `by_matrix`: they are made as factors of matrix instructions
    many, else                      `by_panels`: rows of the weight are unpacked, as many as a cache holds, for torch

An operator's `cpu.py` says how each of them calls its C++. "Many" begins where it was measured to be faster, for
small, medium and large weights (crossover.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from .crossover import crossover

W = TypeVar("W")
PANEL_BYTES = 1 << 21  # of unpacked weight that torch multiplies at once: about the second cache


class Ways(ABC, Generic[W]):
    """Tokens are [M, in] with neighbouring columns; M and out are at least 1."""

    name: ClassVar[str]  # of the operator
    matrix: bool  # whether `by_matrix` can be called for bfloat16

    @abstractmethod
    def rows_of(self, weight: W) -> int:
        """Outputs."""

    @abstractmethod
    def by_rows(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor: ...

    @abstractmethod
    def by_matrix(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor: ...

    @abstractmethod
    def unpack(self, weight: W, first: int, out: Tensor) -> None:
        """out [count, in], contiguous = rows first .. first + count of the weight, rounded to its dtype."""

    @staticmethod
    @abstractmethod
    def sample(dtype: torch.dtype, rows: int, columns: int) -> W:
        """A random weight [rows, columns], multiples of 64, to measure with."""

    def has_rows(self, dtype: torch.dtype) -> bool:
        """Whether `by_rows` takes this dtype."""
        return True

    def product(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        """[M, out], by the fastest way for this number of tokens."""
        shape = self.rows_of(weight), x.shape[1]
        if self.has_rows(x.dtype) and (x.shape[0] == 1 or x.shape[0] < self.many(x.dtype, shape)):
            return self.by_rows(x, weight, bias)
        return self.of_many(x, weight, bias)

    def many(self, dtype: torch.dtype, shape: tuple[int, int]) -> int:
        """Tokens from which `of_many` is faster than `by_rows`, for a weight [out, in]."""
        name = f"{self.name} {dtype} matrix={self.matrix}"
        return crossover(name, dtype, self.by_rows, self.of_many, self.sample, shape)

    def of_many(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        """Weights rounded to the dtype of x, by matrix instructions or by torch."""
        way = self.by_matrix if self.matrix and x.dtype == torch.bfloat16 else self.by_panels
        return way(x, weight, bias)

    def by_panels(self, x: Tensor, weight: W, bias: Tensor | None) -> Tensor:
        """Rows of the weight are unpacked, some at a time, and multiplied by torch."""
        x = x.contiguous()  # torch's product may read beyond a row, and a NaN there spoils it
        columns, rows = x.shape[1], self.rows_of(weight)
        count = min(max(PANEL_BYTES // (2 * columns), 1), rows)
        panel, y = x.new_empty(count, columns), x.new_empty(x.shape[0], rows)
        for first in range(0, rows, count):
            some = slice(first, min(first + count, rows))
            part = panel[: some.stop - first]
            self.unpack(weight, first, part)
            y[:, some] = torch.nn.functional.linear(x, part, None if bias is None else bias[some])
        return y

    def finished(self, y: Tensor, failed: int) -> Tensor:
        """y. Raises MemoryError if a kernel had no memory to work in."""
        if failed:
            raise MemoryError(f"{self.name}: no memory for the tokens of an output {list(y.shape)}")
        return y


def by_tokens(x: Tensor, rows: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """x [..., in] with any strides -> [..., rows], by `compute` of [M, in] with neighbouring columns."""
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return compute(tokens).view(*x.shape[:-1], rows)


def address(tensor: Tensor | None) -> int | None:
    """Where its first element lies; None without a tensor."""
    return None if tensor is None else tensor.data_ptr()


def is_half(tensor: Tensor) -> int:
    """The kernels' name of a dtype: 0 bfloat16, 1 float16."""
    return int(tensor.dtype == torch.float16)


def declare(compiled: Any, signatures: dict[str, list[Any]]) -> None:
    """Types of the arguments of C functions, by their names."""
    for name, types in signatures.items():
        getattr(compiled, name).argtypes = types
