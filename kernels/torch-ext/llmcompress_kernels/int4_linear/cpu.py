"""`int4_linear` on a CPU: csrc/int4_linear.cpp, or torch's own operators where it cannot be compiled (torch_cpu.py).

Few tokens, and all without matrix instructions, do not round the product (code - zero) * scale; they turn x into
integers of 16 bits (csrc/int4.h). Matrix instructions and panels round it to the dtype of x, as unpacking a stored file
does. See ways.py.
"""

import functools

from torch import Tensor

from ..compiled import Compiled
from ..native import library
from ..ways import by_tokens
from .layout import Int4Weight, sample_weight
from .torch_cpu import int4_linear_torch


def int4_linear_cpu(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [..., in] with any strides -> [..., out]; arguments as `int4_linear` checks them."""
    kernels = native()
    if kernels is None:
        return by_tokens(x, weight.words.shape[1], lambda tokens: int4_linear_torch(tokens, weight, bias))
    return kernels.linear(x, weight, bias)


@functools.cache
def native() -> "Kernels | None":
    """The compiled kernels, or None without them."""
    compiled = library("int4_linear")
    return None if compiled is None else Kernels(compiled)


class Kernels(Compiled[Int4Weight]):
    """The functions of csrc/int4_linear.cpp."""

    name = "int4_linear"
    sample = staticmethod(sample_weight)
    rows_suit_many = True

    def tensors_of(self, weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor | None]:
        return weight

    def rows_of(self, weight: Int4Weight) -> int:
        return weight.words.shape[1]

    def group_of(self, weight: Int4Weight, columns: int) -> int:
        return columns // weight.scale.shape[0]
