"""`sparse24_linear` on a CPU: which code multiplies how many tokens.

    few tokens, bfloat16    csrc/sparse24.h: weights are put at their columns in registers
    many, bfloat16          the same, as factors of matrix instructions, on CPUs with AMX
    else                    panels of the weight, expanded by C++ and multiplied by torch
    without a compiler      the reference, which expands the whole weight

"Many" begins where it was measured to be faster (crossover.py).
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ..crossover import SIDE, crossover
from ..native import library
from .layout import PLANE, TILE, WIDTH, Sparse24Weight
from .reference import sparse24_linear_reference

PANEL_BYTES = 1 << 21  # of expanded weight that torch multiplies at once: about the second cache
P, N, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "sparse24_has": [],
    "sparse24_product": [I, P, N, P, P, P, P, N, N, N, I],
    "sparse24_spread": [P, P, P, N, N, N, N, I],
}
FEW, MANY = 1, 2  # bits of `sparse24_has`


def sparse24_linear_cpu(x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias; shapes as in `sparse24_linear`."""
    kernels, rows = native(), weight.values.shape[1]
    if kernels is None:
        return sparse24_linear_reference(x, *weight, bias)
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return kernels.product(tokens, weight, bias).view(*x.shape[:-1], rows)


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("sparse24_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels:
    """csrc/sparse24_linear.cpp. Tokens are [M, in] with neighbouring columns, M and out at least 1."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        for name, types in SIGNATURES.items():
            getattr(compiled, name).argtypes = types
        self._compiled = compiled
        self._has: int = compiled.sparse24_has()

    def product(self, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        """[M, out], by the fastest way for this number of tokens."""
        if x.dtype != torch.bfloat16 or not self._has & FEW:
            return self.by_panels(x, weight, bias)
        name = f"sparse24_linear {self._has}"
        if x.shape[0] == 1 or x.shape[0] < crossover(name, x.dtype, self.by_rows, self.of_many, sample_weight):
            return self.by_rows(x, weight, bias)
        return self.of_many(x, weight, bias)

    def by_rows(self, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        """Weights expanded in registers and used for up to four tokens."""
        return self._product(0, x, weight, bias)

    def of_many(self, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        """By matrix instructions, or by torch."""
        return self._product(1, x, weight, bias) if self._has & MANY else self.by_panels(x, weight, bias)

    def _product(self, many: int, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        (tokens, columns), rows = x.shape, weight.values.shape[1]
        y = x.new_empty(tokens, rows)
        failed = self._compiled.sparse24_product(
            many, x.data_ptr(), x.stride(0), weight.values.data_ptr(), weight.index.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), tokens, rows, columns, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"sparse24_linear: no memory for the tokens of an output {list(y.shape)}")
        return y

    def by_panels(self, x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
        """Rows of the weight are expanded, as many as a cache holds, and multiplied by torch."""
        columns, rows = x.shape[1], weight.values.shape[1]
        count = min(max(PANEL_BYTES // (2 * columns), 1), rows)
        panel, y = x.new_empty(count, columns), x.new_empty(x.shape[0], rows)
        for first in range(0, rows, count):
            some = slice(first, min(first + count, rows))
            part = panel[: some.stop - first]
            self._compiled.sparse24_spread(
                weight.values.data_ptr(), weight.index.data_ptr(), part.data_ptr(), first, part.shape[0], rows,
                columns, torch.get_num_threads(),
            )  # fmt: skip
            y[:, some] = torch.nn.functional.linear(x, part, None if bias is None else bias[some])
        return y


def sample_weight(dtype: torch.dtype) -> Sparse24Weight:
    """A random weight of SIDE by SIDE that keeps columns 1 and 2 of every four, to measure with."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SIDE // PLANE, SIDE, 2 * WIDTH, generator=generator).to(dtype)
    return Sparse24Weight(values, torch.full((SIDE // TILE, SIDE, WIDTH), 0x9999 - 0x10000, dtype=torch.int16))
