"""Tiles, splits and launches of `teal_linear` on a GPU. Imports triton through kernel.py, so it is imported late.

    tokens M     kernel             why
    1            teal_gemv          columns of small inputs are not read
    more         masked, then BLAS  each token has columns of its own, and together they need nearly all

Tiles are chosen by what the compiler reports (kernels/resources/teal_linear.json): no spills, loads of 128 bits.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..configuration import Configuration
from ..launching import Tiles, configured, device_of, planned, result_dtype
from .kernel import reduce_splits, teal_gemv
from .reference import teal_linear_reference

GEMV = Tiles(rows=128, tokens=1, warps=4, stages=3)
INPUTS = 32  # of a tile
REDUCE = Tiles(rows=512, tokens=1, warps=4, stages=3)


def teal_linear_triton(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None, processors: int) -> Tensor:
    """x [..., in] with any strides -> [..., out]. processors: streaming multiprocessors of the GPU."""
    rows = columns.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_zeros(*x.shape[:-1], rows) if bias is None else bias.expand(*x.shape[:-1], rows).contiguous()
    with device_of(x):
        if x.numel() > x.shape[-1]:
            return teal_linear_reference(x, columns, threshold, bias)
        return product(x.reshape(-1).contiguous(), columns, threshold, bias, processors).view(*x.shape[:-1], rows)


def product(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None, processors: int) -> Tensor:
    """x [in] -> [out], by one kernel or by one kernel and the reduce of its splits."""
    inner, rows = columns.shape
    plan = planned((GEMV,), 1, rows, triton.cdiv(inner, INPUTS), processors)
    whole = plan.splits == 1
    y = torch.empty(rows, dtype=result_dtype(x.dtype), device=x.device)
    target = y if whole else torch.empty(plan.splits, rows, dtype=torch.float32, device=x.device)
    pointers = (x, columns, bias if whole else None, target)
    teal_gemv[plan.grid](*pointers, threshold, rows, inner, plan.span, BK=INPUTS, **plan.options)
    if not whole:
        grid = (triton.cdiv(rows, REDUCE.rows), 1)
        reduce_splits[grid](target, bias, y, 1, rows, plan.splits, BN=REDUCE.rows, num_warps=REDUCE.warps)
    return y.to(x.dtype)


def configurations() -> Iterator[Configuration]:
    """All that may run, with a bias: a split launch stores float32 without one, after the same loop."""
    yield configured("reduce_splits", REDUCE, 0)
    yield configured("teal_gemv", GEMV, INPUTS, BK=INPUTS)
