"""Tiles, splits and launches of `teal_linear` on a GPU. Imports triton through kernel.py, so it is imported late.

    tokens M     kernel             why
    1            teal_gemv          columns of small inputs are not read
    more         masked, then BLAS  each token has columns of its own, and together they need nearly all

Tiles are chosen by what the compiler reports (kernels/resources/teal_linear.json): no spills, loads of 128 bits.
"""

from collections.abc import Iterator

import triton
from torch import Tensor

from ..configuration import Configuration
from ..launching import Tiles, configured, device_of, planned, summed
from .kernel import teal_gemv
from .reference import teal_linear_reference

GEMV = Tiles(rows=128, tokens=1, warps=4, stages=3)
INPUTS = 32  # of a tile


def teal_linear_triton(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None, processors: int) -> Tensor:
    """x [..., in] with any strides -> [..., out]. processors: streaming multiprocessors of the GPU."""
    rows = columns.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_zeros(*x.shape[:-1], rows) if bias is None else bias.expand(*x.shape[:-1], rows).contiguous()
    with device_of(x):
        if x.numel() > x.shape[-1]:
            return teal_linear_reference(x, columns, threshold, bias)
        return product(x.reshape(1, -1).contiguous(), columns, threshold, bias, processors).view(*x.shape[:-1], rows)


def product(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None, processors: int) -> Tensor:
    """x [1, in] -> [1, out]."""
    inner, rows = columns.shape
    plan = planned((GEMV,), 1, rows, triton.cdiv(inner, INPUTS), processors)

    def start(bias: Tensor | None, target: Tensor) -> None:
        pointers = (x, columns, bias, target)
        teal_gemv[plan.grid](*pointers, threshold, rows, inner, plan.span, BK=INPUTS, **plan.options)

    return summed(plan, x, rows, bias, start)


def configurations() -> Iterator[Configuration]:
    """With a bias, and parts of splits; the reduce of splits is that of `int4_linear`, and compiled there."""
    for parts in (False, True):
        yield configured("teal_gemv", GEMV, INPUTS, parts, BK=INPUTS)
