"""Tiles, splits and launches of `sparse24_int4_linear` on a GPU. Imports triton through kernel.py, so imported late.

    tokens M     kernel                      why
    1 .. 256     sparse24_int4_gemm_sp       where a GPU has sparse tensor cores: a sixth of the instructions per weight
                 elsewhere
    1            sparse24_int4_gemv          a tensor core would do nothing in 15 of its 16 columns
    2 .. 256     sparse24_int4_gemm          the packed weight is read once per BM tokens, and expanded in registers
    above        sparse24_int4_dequantize    the weight is made once, and the BLAS does the rest

Tiles are chosen by what the compiler reports (kernels/resources/sparse24_int4_linear.json): no spills, weight loads of
128 bits. Programs of all tokens of the same rows run side by side, so the packed weight comes from memory once whatever
M is. BLAS_TOKENS is declared, not measured.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
from torch import Tensor

from ..configuration import Configuration
from ..int4_linear.launch import BLAS_TOKENS
from ..int4_linear.layout import GROUPS
from ..launching import Plan, Tiles, configured, device_of, interpreted, planned, summed
from ..sparse24_linear.launch import aligned_rows
from .kernel import (
    sparse24_int4_dequantize,
    sparse24_int4_gemm,
    sparse24_int4_gemm_sp,
    sparse24_int4_gemv,
    token_fragments,
)
from .layout import BLOCK, TILE, Sparse24Int4Weight

FRAGMENT = (  # by rising tokens; the last one serves all that is larger
    Tiles(rows=64, tokens=8, warps=4, stages=1),
    Tiles(rows=64, tokens=16, warps=4, stages=1),
    Tiles(rows=64, tokens=32, warps=4, stages=1),
)
GEMV = Tiles(rows=64, tokens=1, warps=2, stages=3)
GEMM = (  # by rising tokens; the last one serves all that is larger
    Tiles(rows=64, tokens=16, warps=4, stages=3),
    Tiles(rows=64, tokens=32, warps=4, stages=3),
)
DEQUANTIZE = Tiles(rows=64, tokens=0, warps=4, stages=1)
FRAGMENT_WARPS = 4  # of the kernel that orders x


def has_sparse_cores(x: Tensor) -> bool:
    """Whether x is on a GPU that executes `mma.sp`: NVIDIA's, from compute capability 8 on."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 8


def sparse24_int4_linear_triton(
    x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None, processors: int, sparse_cores: bool
) -> Tensor:
    """x [..., in] with any strides -> [..., out].

    processors: streaming multiprocessors of the GPU; sparse_cores: whether it executes `mma.sp`.
    """
    rows = weight.scale.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)  # a grid must not be empty
    tokens = aligned_rows(x)
    with device_of(x):
        if tokens.shape[0] > BLAS_TOKENS:
            y = torch.nn.functional.linear(tokens, dequantize(weight, tokens.shape[1]), bias)
        elif sparse_cores:
            y = product_of_fragments(tokens, weight, bias, processors)
        else:
            y = product(tokens, weight, bias, processors)
    return y.view(*x.shape[:-1], rows)


def product(x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None, processors: int) -> Tensor:
    """x [M, in] -> [M, out]."""
    (tokens, columns), rows = x.shape, weight.scale.shape[1]
    plan = planned((GEMV, *GEMM), tokens, rows, triton.cdiv(columns, BLOCK), processors)
    return summed(plan, x, rows, bias, lambda bias, target: start(plan, x, weight, bias, target))


def start(plan: Plan, x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None, target: Tensor) -> None:
    """Start the kernel that the plan names."""
    (tokens, columns), rows = x.shape, weight.scale.shape[1]
    pointers = (x, *weight, bias, target)
    options = plan.options | {"GROUP": columns // weight.scale.shape[0]}
    if tokens == 1:
        sparse24_int4_gemv[plan.grid](*pointers, rows, columns, plan.span, **options)
    else:
        options |= {"BM": plan.tiles.tokens, "INTERPRETED": interpreted()}
        sparse24_int4_gemm[plan.grid](*pointers, tokens, rows, columns, x.stride(0), plan.span, **options)


def product_of_fragments(x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None, processors: int) -> Tensor:
    """x [M, in] -> [M, out], on sparse tensor cores."""
    (tokens, columns), rows = x.shape, weight.scale.shape[1]
    tiles = triton.cdiv(columns, TILE)
    plan = planned(FRAGMENT, tokens, rows, tiles, processors)
    size = plan.tiles.tokens
    grid = (tiles * TILE // BLOCK, plan.grid[0])
    fragments = torch.empty(*grid, 64 * size, dtype=torch.int32, device=x.device)
    token_fragments[grid](x, fragments, tokens, columns, x.stride(0), BM=size, num_warps=FRAGMENT_WARPS)

    def start(bias: Tensor | None, target: Tensor) -> None:
        pointers = (fragments, *weight, bias, target)
        options = plan.options | {"GROUP": columns // weight.scale.shape[0], "BM": size}
        sparse24_int4_gemm_sp[plan.grid](*pointers, tokens, rows, columns, plan.span, **options)

    return summed(plan, x, rows, bias, start)


def dequantize(weight: Sparse24Int4Weight, columns: int) -> Tensor:
    """The weight [out, in], each product rounded to the dtype of the scale once: what unpacking the file gives."""
    rows = weight.scale.shape[1]
    values = torch.empty(rows, columns, dtype=weight.scale.dtype, device=weight.scale.device)
    sparse24_int4_dequantize[(triton.cdiv(rows, DEQUANTIZE.rows), triton.cdiv(columns, BLOCK))](
        *weight, values, rows, columns, GROUP=columns // weight.scale.shape[0], BN=DEQUANTIZE.rows,
        INTERPRETED=interpreted(), num_warps=DEQUANTIZE.warps, num_stages=DEQUANTIZE.stages,
    )  # fmt: skip
    return values


def configurations() -> Iterator[Configuration]:
    """All groups and tiles, with a bias; parts of splits where a loop leaves the fewest registers.

    They end in another store after the same loop. Their reduce is that of `int4_linear`, and compiled there.
    """
    for tiles in FRAGMENT:
        yield Configuration("token_fragments", {"BM": tiles.tokens}, FRAGMENT_WARPS, stages=3)
        for group in GROUPS:
            yield on_sparse_cores(tiles, group)
    yield on_sparse_cores(FRAGMENT[-1], 64, parts=True)
    for group in GROUPS:
        yield configured("sparse24_int4_dequantize", DEQUANTIZE, BLOCK, GROUP=group, INTERPRETED=False)
        yield configured("sparse24_int4_gemv", GEMV, BLOCK, GROUP=group)
        for tiles in GEMM:
            yield configured("sparse24_int4_gemm", tiles, BLOCK, GROUP=group)
    yield configured("sparse24_int4_gemv", GEMV, BLOCK, parts=True, GROUP=64)
    yield configured("sparse24_int4_gemm", GEMM[-1], BLOCK, parts=True, GROUP=64)


def on_sparse_cores(tiles: Tiles, group: int, parts: bool = False) -> Configuration:
    """The kernel with inline assembly, which is the same in Triton's interpreter."""
    made = configured("sparse24_int4_gemm_sp", tiles, TILE, parts, GROUP=group)
    return replace(made, constants={name: value for name, value in made.constants.items() if name != "INTERPRETED"})
