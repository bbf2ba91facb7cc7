"""Tiles, splits and launches of `int4_gated_mlp` on a GPU. Imports triton through kernel.py, so it is imported late.

    tokens M     kernel             why
    1            gated_gemv         a tensor core would do nothing in 15 of its 16 columns
    2 .. 32      gated_gemm         every tile of both weights is unpacked once, and x is read once for both
    33 .. 256    int4_gemm          twice, then the activation and the product by torch
    above        int4_dequantize    the weights are unpacked one after the other, and the BLAS does the rest

A program holds the sums of two weights, so it has half the rows that one of `int4_linear` has. For 64 tokens there is
no room: that spills on sm_89, and on sm_100 Triton makes a kernel of it that only traps. So more than 32 tokens would
unpack every weight twice, and instructions are what bounds these kernels: the model of kernels/tools/roofline.py gives
two linears, with tiles of 64 and 128 tokens, the shorter time, though they read x twice. From compute capability 10 on,
where tiles of 64 rows take twice the instructions per weight that those of 128 rows do, it does so for all M above 1.

Tiles are chosen by what the compiler reports (kernels/resources/int4_gated_mlp.json).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..configuration import Configuration
from ..int4_linear.launch import multiplied
from ..int4_linear.layout import GROUPS, TILE
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
)
from .kernel import gated_gemm, gated_gemv, reduce_gated
from .reference import ACTIVATIONS, Gated

GEMV = Tiles(rows=32, tokens=1, warps=2, stages=3)
GEMM = (  # by rising tokens
    Tiles(rows=64, tokens=16, warps=4, stages=3, architectures=(80, 89, 90)),
    Tiles(rows=64, tokens=32, warps=4, stages=3, architectures=(80, 89, 90)),
)


def int4_gated_mlp_triton(x: Tensor, weights: Gated, activation: str, processors: int) -> Tensor:
    """x [..., in] with any strides -> [..., out]. processors: streaming multiprocessors of the GPU."""
    rows = weights.gate.words.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)  # a grid must not be empty
    tokens = rows_of_tokens(x)
    with device_of(x):
        if tokens.shape[0] <= fused_tokens(capability_of(x)):
            y = packed_product(tokens, weights, activation, processors)
        else:
            y = two_products(tokens, weights, activation, processors)
    return y.view(*x.shape[:-1], rows)


def fused_tokens(capability: int) -> int:
    """The most tokens for which both weights are multiplied at once, by the first number of a compute capability."""
    return 1 if capability >= 10 else GEMM[-1].tokens


def two_products(x: Tensor, weights: Gated, activation: str, processors: int) -> Tensor:
    """x [M, in] -> [M, out], by two linears, packed or unpacked as those choose; in the dtype of x from there on."""
    gate = multiplied(x, weights.gate, weights.gate_bias, processors)
    return ACTIVATIONS[activation](gate).mul_(multiplied(x, weights.up, weights.up_bias, processors))


def packed_product(x: Tensor, weights: Gated, activation: str, processors: int) -> Tensor:
    """x [M, in] -> [M, out], by one kernel or by one kernel and the reduce of its splits."""
    tokens, (tiles, rows, _) = x.shape[0], weights.gate.words.shape
    plan = planned((GEMV, *GEMM), tokens, rows, tiles, processors)
    y = torch.empty(tokens, rows, dtype=result_dtype(x.dtype), device=x.device)
    if plan.splits == 1:
        start(plan, x, weights, activation, y, None)
    else:
        parts = torch.empty(plan.splits, 2, tokens, rows, dtype=torch.float32, device=x.device)
        start(plan, x, weights, activation, None, parts)
        reduce_gated[triton.cdiv(rows, REDUCE.rows), tokens](
            parts, weights.gate_bias, weights.up_bias, y, tokens, rows, plan.splits,
            BN=REDUCE.rows, ACTIVATION=activation, num_warps=REDUCE.warps,
        )  # fmt: skip
    return y.to(x.dtype)


def start(plan: Plan, x: Tensor, weights: Gated, activation: str, y: Tensor | None, parts: Tensor | None) -> None:
    """Start the kernel that the plan names, on y [M, out] or on parts [splits, 2, M, out]."""
    (tokens, columns), rows = x.shape, weights.gate.words.shape[1]
    pointers = (x, *weights.gate, weights.gate_bias, *weights.up, weights.up_bias, y, parts)
    options: dict[str, Any] = plan.options | {
        "GROUP": columns // weights.gate.scale.shape[0],
        "ACTIVATION": activation,
    }
    if tokens == 1:
        gated_gemv[plan.grid](*pointers, rows, columns, plan.span, **options)
    else:
        options |= {"BM": plan.tiles.tokens, "INTERPRETED": interpreted()}
        gated_gemm[plan.grid](*pointers, tokens, rows, columns, x.stride(0), plan.span, **options)


def configurations() -> Iterator[Configuration]:
    """All tiles and groups, with and without zeros, with biases; in parts and with other activations where it is most.

    Sums in parts and other activations follow the same loop, so the largest tile, which leaves the fewest registers,
    stands for all.
    """
    for activation in ACTIVATIONS:
        yield configured("reduce_gated", REDUCE, 0, ACTIVATION=activation)
    silu, whole = {"ACTIVATION": "silu"}, {"parts_ptr": None}
    for group in GROUPS:
        yield from loops(GEMM, **silu, **whole, GROUP=group)
        yield from loops(GEMM, **silu, **whole, GROUP=group, gate_zero_ptr=None, up_zero_ptr=None)
    yield from loops(GEMM[-1:], **silu, y_ptr=None, GROUP=64)
    for activation in ("gelu", "gelu_tanh"):
        yield from loops(GEMM[-1:], **whole, ACTIVATION=activation, GROUP=64)


def loops(tiles: Sequence[Tiles], **constants: Any) -> Iterator[Configuration]:
    """The kernels that read weights, with further compile-time arguments; `tiles` of the one on tensor cores."""
    yield configured("gated_gemv", GEMV, 2 * TILE, **constants)
    for one in tiles:
        yield configured("gated_gemm", one, 2 * TILE, **constants)
