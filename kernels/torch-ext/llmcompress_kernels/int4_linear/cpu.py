"""`int4_linear` on a CPU: csrc/int4_linear.cpp, or torch's own operators where it cannot be compiled (torch_cpu.py).

Few tokens do not round the product (code - zero) * scale; many round it to the dtype of x, as unpacking a stored file
does. See ways.py.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ..native import library
from ..ways import Ways, address, by_tokens, declare, is_half
from .layout import Int4Weight, sample_weight
from .torch_cpu import int4_linear_torch

P, N, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "int4_has_matrix": [],
    "int4_rows": [I, P, N, P, P, P, P, P, N, N, N, N, I],
    "int4_matrix": [P, N, P, P, P, P, P, N, N, N, N, I],
    "int4_unpack": [I, P, P, P, P, N, N, N, N, N, I],
}


def int4_linear_cpu(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [..., in] with any strides -> [..., out]; arguments as `int4_linear` checks them."""
    kernels = native()
    compute = int4_linear_torch if kernels is None else kernels.product
    return by_tokens(x, weight.words.shape[1], lambda tokens: compute(tokens, weight, bias))


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("int4_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels(Ways[Int4Weight]):
    """The functions of csrc/int4_linear.cpp."""

    name = "int4_linear"
    sample = staticmethod(sample_weight)

    def __init__(self, compiled: ctypes.CDLL) -> None:
        declare(compiled, SIGNATURES)
        self._compiled = compiled
        self._rows = compiled.int4_rows
        self.matrix = bool(compiled.int4_has_matrix())

    def rows_of(self, weight: Int4Weight) -> int:
        return weight.words.shape[1]

    def by_rows(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        """Weights made in registers and used for up to four tokens."""
        y = x.new_empty(x.shape[0], weight.words.shape[1])
        failed = self._rows(is_half(x), *operands(x, weight, bias, y))
        return self.finished(y, failed)

    def by_matrix(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        """Weights made as factors of matrix instructions."""
        y = x.new_empty(x.shape[0], weight.words.shape[1])
        failed = self._compiled.int4_matrix(*operands(x, weight, bias, y))
        return self.finished(y, failed)

    def unpack(self, weight: Int4Weight, first: int, out: Tensor) -> None:
        (count, columns), (words, scale, zero) = out.shape, weight
        self._compiled.int4_unpack(
            is_half(out), words.data_ptr(), scale.data_ptr(), address(zero), out.data_ptr(), first, count,
            words.shape[1], columns, columns // scale.shape[0], torch.get_num_threads(),
        )  # fmt: skip


def operands(x: Tensor, weight: Int4Weight, bias: Tensor | None, y: Tensor) -> tuple[int | None, ...]:
    """Arguments that both products have: addresses, tokens, rows, columns, columns per group, threads."""
    (tokens, columns), (words, scale, zero) = x.shape, weight
    return (
        x.data_ptr(), x.stride(0), words.data_ptr(), scale.data_ptr(), address(zero), address(bias), y.data_ptr(),
        tokens, words.shape[1], columns, columns // scale.shape[0], torch.get_num_threads(),
    )  # fmt: skip
