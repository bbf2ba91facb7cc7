"""Tiles, splits and launches of `int4_linear` on a GPU. Imports triton through kernel.py, so it is imported late.

    tokens M     kernel             why
    1            int4_gemv          a tensor core would do nothing in 15 of its 16 columns
    2 .. 256     int4_gemm          the packed weight is read once per BM tokens
    above        int4_dequantize    the weight is unpacked once, and the BLAS does the rest; from compute capability
                                    10 on above 64 tokens: tensor cores and memory are faster there, instructions not

Tiles are chosen by what the compiler reports (kernels/resources/int4_linear.json): no spills, weight loads of 128 bits,
few instructions per weight. What bounds many tokens are the instructions that unpack a weight, as often as there are
tiles of tokens; so tiles are as large as registers allow. On sm_100 Triton makes a kernel of WIDE that only traps.
The limits follow from the model of kernels/tools/roofline.py; nothing was measured.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..configuration import ARCHITECTURES, Configuration
from ..launching import (
    REDUCE,
    Plan,
    Tiles,
    capability_of,
    configured,
    device_of,
    interpreted,
    planned,
    result_dtype,
    rows_of_tokens,
    summed,
)
from .kernel import int4_dequantize, int4_gemm, int4_gemv
from .layout import GROUPS, TILE, Int4Weight

BLAS_TOKENS = 256  # above this M the weight is dequantized
BLAS_TOKENS_10 = 64  # the same from compute capability 10 on

GEMV = Tiles(rows=64, tokens=1, warps=2, stages=3)
GEMM = (  # by rising tokens; the last one serves all that is larger where there is no WIDE
    Tiles(rows=128, tokens=16, warps=4, stages=3),
    Tiles(rows=64, tokens=32, warps=4, stages=3),
    Tiles(rows=64, tokens=64, warps=4, stages=3),
)
WIDE = Tiles(rows=128, tokens=128, warps=8, stages=2, architectures=(80, 89, 90), float16=(80, 89, 90))
# of groups of 64: without a limit, ptxas spills on sm_80 to have 128 registers and a fourth program on a processor
HELD = replace(GEMM[-1], registers=168, float16=ARCHITECTURES)
WIDE_GROUPS = (64, 128)  # scales and zero points of smaller groups take more registers than there are
DEQUANTIZE = Tiles(rows=64, tokens=0, warps=4, stages=1)

WEIGHTS: tuple[dict[str, Any], ...] = (  # every group, with zeros and without
    *({"GROUP": group} for group in GROUPS),
    *({"GROUP": group, "zero_ptr": None} for group in GROUPS),
)


def int4_linear_triton(x: Tensor, weight: Int4Weight, bias: Tensor | None, processors: int) -> Tensor:
    """x [..., in] with any strides -> [..., out]. processors: streaming multiprocessors of the GPU."""
    rows = weight.words.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)  # a grid must not be empty
    tokens = rows_of_tokens(x)
    with device_of(x):
        return multiplied(tokens, weight, bias, processors).view(*x.shape[:-1], rows)


def multiplied(x: Tensor, weight: Int4Weight, bias: Tensor | None, processors: int) -> Tensor:
    """x [M, in] -> [M, out], with the packed weight or, for many tokens, the unpacked one."""
    if x.shape[0] > blas_tokens(capability_of(x)):
        return torch.nn.functional.linear(x, dequantize(weight, x.shape[1], x.dtype), bias)
    return product(x, weight, bias, processors)


def blas_tokens(capability: int) -> int:
    """The most tokens that the packed weight is multiplied with, by the first number of a compute capability."""
    return BLAS_TOKENS_10 if capability >= 10 else BLAS_TOKENS


def product(x: Tensor, weight: Int4Weight, bias: Tensor | None, processors: int) -> Tensor:
    """x [M, in] -> [M, out]."""
    plan = plan_of(x, weight, processors)
    return summed(plan, x, weight.words.shape[1], bias, lambda bias, target: start(plan, x, weight, bias, target))


def plan_of(x: Tensor, weight: Int4Weight, processors: int) -> Plan:
    """Of the product of x [M, in] with a weight."""
    tiles, rows, _ = weight.words.shape
    group = x.shape[1] // weight.scale.shape[0]
    return planned(choices(capability_of(x), group), x.shape[0], rows, tiles, processors)


def choices(capability: int, group: int) -> tuple[Tiles, ...]:
    """Tiles by rising tokens, for the first number of a compute capability and the columns of a scale."""
    wide = (WIDE,) if capability < 10 and group in WIDE_GROUPS else ()
    return (GEMV, *narrow(group), *wide)


def narrow(group: int) -> tuple[Tiles, ...]:
    """GEMM for the columns of a scale."""
    return (*GEMM[:-1], HELD) if group == 64 else GEMM


def partial_sums(plan: Plan, x: Tensor, weight: Int4Weight) -> Tensor:
    """Float32 [splits, M, out], to be added up."""
    shape = (plan.splits, x.shape[0], weight.words.shape[1])
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    start(plan, x, weight, None, parts)
    return parts


def start(plan: Plan, x: Tensor, weight: Int4Weight, bias: Tensor | None, target: Tensor) -> None:
    """Start the kernel that the plan names on a target [M, out], or on one [splits, M, out] without a bias."""
    (tokens, columns), rows = x.shape, weight.words.shape[1]
    pointers = (x, weight.words, weight.scale, weight.zero, bias, target)
    options = plan.options | {"GROUP": columns // weight.scale.shape[0]}
    if tokens == 1:
        int4_gemv[plan.grid](*pointers, rows, columns, plan.span, **options)
    else:
        options |= {"BM": plan.tiles.tokens, "INTERPRETED": interpreted()}
        int4_gemm[plan.grid](*pointers, tokens, rows, columns, x.stride(0), plan.span, **options)


def dequantize(weight: Int4Weight, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], each product rounded to `dtype` once: the values that unpacking the stored file gives."""
    tiles, rows, _ = weight.words.shape
    values = torch.empty(rows, columns, dtype=result_dtype(dtype), device=weight.words.device)
    int4_dequantize[(triton.cdiv(rows, DEQUANTIZE.rows), tiles)](
        weight.words, weight.scale, weight.zero, values, rows, columns, GROUP=columns // weight.scale.shape[0],
        BN=DEQUANTIZE.rows, num_warps=DEQUANTIZE.warps, num_stages=DEQUANTIZE.stages,
    )  # fmt: skip
    return values.to(dtype)


def configurations() -> Iterator[Configuration]:
    """All tiles and WEIGHTS, with a bias; parts of splits of groups of 64, and wherever registers are scarce."""
    yield configured("reduce_splits", REDUCE, 0)
    for weight in WEIGHTS:
        group = weight["GROUP"]
        yield configured("int4_dequantize", DEQUANTIZE, TILE, **weight)
        for parts in (False, True) if group == 64 else (False,):
            yield configured("int4_gemv", GEMV, TILE, parts, **weight)
            for tiles in narrow(group):
                yield configured("int4_gemm", tiles, TILE, parts, **weight)
        for parts in (False, True) if group in WIDE_GROUPS else ():
            yield configured("int4_gemm", WIDE, TILE, parts, **weight)
