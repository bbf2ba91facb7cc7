"""`int4_linear` on a CPU: which code multiplies how many tokens.

    tokens          with csrc/int4_linear.cpp compiled                without it (torch_cpu.py)
    few             int4_rows: weights made in registers              torch's int4 operator
    many, bfloat16  int4_matrix on CPUs with AMX: tiles               panels of the weight, unpacked by torch,
                                                                      and torch's product
    many, else      panels of the weight, unpacked by int4_unpack,
                    and torch's product

`int4_rows` does not round the product (code - zero) * scale; the others round it to the dtype of x, as unpacking a
stored file does. Where "many" begins is measured once per machine (crossover.py).
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ..crossover import crossover
from ..native import library
from .layout import Int4Weight, sample_weight
from .torch_cpu import int4_linear_torch

PANEL_BYTES = 1 << 21  # of unpacked weight that torch multiplies at once: about the second cache
P, N, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "int4_has_matrix": [],
    "int4_rows": [I, P, N, P, P, P, P, P, N, N, N, N, I],
    "int4_matrix": [P, N, P, P, P, P, P, N, N, N, N, I],
    "int4_unpack": [I, P, P, P, P, N, N, N, N, N, I],
}


def int4_linear_cpu(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [..., in] with any strides -> [..., out]; arguments as `int4_linear` checks them."""
    columns, rows = x.shape[-1], weight.words.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)
    tokens = x.reshape(-1, columns)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    kernels = native()
    y = int4_linear_torch(tokens, weight, bias) if kernels is None else kernels.product(tokens, weight, bias)
    return y.view(*x.shape[:-1], rows)


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("int4_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels:
    """csrc/int4_linear.cpp. Tokens are [M, in] with neighbouring columns, M and out at least 1."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        for name, types in SIGNATURES.items():
            getattr(compiled, name).argtypes = types
        self._compiled = compiled
        self._rows = compiled.int4_rows
        self._has_matrix = bool(compiled.int4_has_matrix())

    def product(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        """[M, out], by the fastest way for this number of tokens."""
        tokens = x.shape[0]
        if tokens == 1 or tokens < self.many(x.dtype):
            return self.by_rows(x, weight, bias)
        return self.of_many(x, weight, bias)

    def many(self, dtype: torch.dtype) -> int:
        """Tokens from which `of_many` is faster than `by_rows`."""
        name = f"int4_linear {dtype} matrix={self._has_matrix}"
        return crossover(name, dtype, self.by_rows, self.of_many, sample_weight)

    def by_rows(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        """Weights made in registers and used for up to four tokens."""
        y = x.new_empty(x.shape[0], weight.words.shape[1])
        failed = self._rows(is_half(x), x.data_ptr(), x.stride(0), *pointers(weight, bias), y.data_ptr(),
                            *sizes(x, weight), torch.get_num_threads())  # fmt: skip
        return finished(y, failed)

    def of_many(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        """Weights rounded to the dtype of x, by matrix instructions or by torch."""
        if x.dtype != torch.bfloat16 or not self._has_matrix:
            return self.by_panels(x, weight, bias)
        y = x.new_empty(x.shape[0], weight.words.shape[1])
        failed = self._compiled.int4_matrix(x.data_ptr(), x.stride(0), *pointers(weight, bias), y.data_ptr(),
                                            *sizes(x, weight), torch.get_num_threads())  # fmt: skip
        return finished(y, failed)

    def by_panels(self, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        """Rows of the weight are unpacked, as many as a cache holds, and multiplied by torch."""
        columns, rows = x.shape[1], weight.words.shape[1]
        count = min(max(PANEL_BYTES // (2 * columns), 1), rows)
        panel = x.new_empty(count, columns)
        y = x.new_empty(x.shape[0], rows)
        for first in range(0, rows, count):
            some = slice(first, min(first + count, rows))
            part = panel[: some.stop - first]
            self.unpack(weight, first, part)
            y[:, some] = torch.nn.functional.linear(x, part, None if bias is None else bias[some])
        return y

    def unpack(self, weight: Int4Weight, first: int, out: Tensor) -> None:
        """out [count, in], contiguous = rows first .. first + count of the weight, rounded to its dtype."""
        count, columns = out.shape
        words, scale, zero, _ = pointers(weight, None)
        self._compiled.int4_unpack(
            is_half(out), words, scale, zero, out.data_ptr(), first, count, weight.words.shape[1], columns,
            columns // weight.scale.shape[0], torch.get_num_threads(),
        )  # fmt: skip


def is_half(tensor: Tensor) -> int:
    """The kernels' name of a dtype: 0 bfloat16, 1 float16."""
    return int(tensor.dtype == torch.float16)


def pointers(weight: Int4Weight, bias: Tensor | None) -> tuple[int, int, int | None, int | None]:
    """Addresses of words, scale, zero and bias."""
    words, scale, zero = weight
    return (
        words.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )  # fmt: skip


def sizes(x: Tensor, weight: Int4Weight) -> tuple[int, int, int, int]:
    """Tokens, rows, columns, columns per group."""
    tokens, columns = x.shape
    return tokens, weight.words.shape[1], columns, columns // weight.scale.shape[0]


def finished(y: Tensor, failed: int) -> Tensor:
    """y. Raises MemoryError if a kernel had no memory to work in."""
    if failed:
        raise MemoryError(f"int4_linear: no memory for the tokens of an output {list(y.shape)}")
    return y
