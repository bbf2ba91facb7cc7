"""Launches of `int4_lora_linear` on a GPU. Imports triton through kernel.py, so it is imported late.

h = x Aᵀ goes first, by the BLAS; its result is at most 64 wide. Then tokens M choose as in int4_linear/launch.py, with
its tiles: `lora_gemv`, `lora_gemm`, or for many the unpacked weight. Where the inner dimension is split, the
kernels of `int4_linear` make the parts and `lora_gemm_reduce` adds them up, for one token too: it reads little. So it
does, with one part, where the update would need registers that are not there: for several tokens and ranks above
WIDEST, and for the widest tiles.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..configuration import Configuration
from ..int4_linear.launch import GEMV, WEIGHTS, WIDE, blas_tokens, dequantize, narrow, partial_sums, plan_of
from ..int4_linear.layout import TILE, Int4Weight
from ..launching import Plan, Tiles, capability_of, configured, device_of, interpreted, result_dtype, rows_of_tokens
from .kernel import lora_gemm, lora_gemm_reduce, lora_gemv
from .reference import Adapter

RANKS = (16, 32, 64)  # to which a rank is padded
WIDEST = 32  # rank that lora_gemm adds itself: at 64 it spills registers on sm_89, and the reduce adds the update
REDUCE = Tiles(rows=64, tokens=16, warps=4, stages=3)


def int4_lora_linear_triton(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, adapter: Adapter, processors: int
) -> Tensor:
    """x [..., in] with any strides -> [..., out]. processors: streaming multiprocessors of the GPU."""
    columns, rows = x.shape[-1], weight.words.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)  # a grid must not be empty
    tokens, linear = rows_of_tokens(x), torch.nn.functional.linear
    with device_of(x):
        h = linear(tokens, adapter.a)
        if tokens.shape[0] > blas_tokens(capability_of(x)):
            y = linear(tokens, dequantize(weight, columns, x.dtype), bias)
            y = y.addmm_(h, adapter.b.T, alpha=adapter.scaling)
        else:
            y = product(tokens, weight, bias, adapter, h, plan_of(tokens, weight, processors))
    return y.view(*x.shape[:-1], rows)


def product(x: Tensor, weight: Int4Weight, bias: Tensor | None, adapter: Adapter, h: Tensor, plan: Plan) -> Tensor:
    """x [M, in] and h [M, rank] -> [M, out], by one kernel or by one kernel and the reduce of its splits."""
    (tokens, columns), rows = x.shape, weight.words.shape[1]
    y = torch.empty(tokens, rows, dtype=result_dtype(x.dtype), device=x.device)
    update = (h.shape[1], adapter.scaling)
    options = plan.options | {"GROUP": columns // weight.scale.shape[0], "R": padded(h.shape[1])}
    pointers = (x, *weight, bias, adapter.b, h, y)
    if plan.splits > 1 or plan.tiles == WIDE or (tokens > 1 and options["R"] > WIDEST):
        reduce(partial_sums(plan, x, weight), bias, adapter, h, y)
    elif tokens == 1:
        lora_gemv[plan.grid](*pointers, rows, columns, plan.span, *update, **options)
    else:
        options |= {"BM": plan.tiles.tokens, "INTERPRETED": interpreted()}
        lora_gemm[plan.grid](*pointers, tokens, rows, columns, x.stride(0), plan.span, *update, **options)
    return y.to(x.dtype)


def reduce(parts: Tensor, bias: Tensor | None, adapter: Adapter, h: Tensor, y: Tensor) -> None:
    """y [M, out] of parts [splits, M, out]."""
    splits, tokens, rows = parts.shape
    grid = (triton.cdiv(rows, REDUCE.rows), triton.cdiv(tokens, REDUCE.tokens))
    options: dict[str, Any] = {"BN": REDUCE.rows, "BM": REDUCE.tokens, "num_warps": REDUCE.warps}
    lora_gemm_reduce[grid](
        parts, bias, adapter.b, h, y, tokens, rows, splits, h.shape[1], adapter.scaling,
        R=padded(h.shape[1]), INTERPRETED=interpreted(), num_stages=REDUCE.stages, **options,
    )  # fmt: skip


def padded(rank: int) -> int:
    """The smallest of RANKS that holds a rank."""
    return next(padded for padded in RANKS if rank <= padded)


def configurations() -> Iterator[Configuration]:
    """All ranks, tiles and groups, with a bias; without zeros all groups of the lowest rank, and of 128 of the others.

    The update follows a loop that is that of `int4_linear`, of which all groups are compiled with and without zeros.
    Parts of splits are made by kernels of `int4_linear`.
    """
    for rank in RANKS:
        yield configured("lora_gemm_reduce", REDUCE, 0, R=rank)
        for weight in (one for one in WEIGHTS if rank == RANKS[0] or "zero_ptr" not in one or one["GROUP"] == 128):
            yield configured("lora_gemv", GEMV, TILE, R=rank, **weight)
            for tiles in narrow(weight["GROUP"]) if rank <= WIDEST else ():
                yield configured("lora_gemm", tiles, TILE, R=rank, **weight)
