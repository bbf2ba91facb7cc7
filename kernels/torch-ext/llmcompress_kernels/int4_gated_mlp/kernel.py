"""Triton kernels of `int4_gated_mlp`. Imported only when a kernel is about to run.

How words become weights: words.py; the loops are those of int4_linear/kernel.py with two weights, gate and up. Each
column of x is read once for both. What follows the sums needs no further kernel, since a program has the same outputs n
of both in the same registers. Where the inner dimension is split, programs store the two sums apart, float32
[splits, 2, M, N], and `reduce_gated` adds them in the order of the splits before it applies the activation.

Arguments: y_ptr is None in a split launch, and parts_ptr in one that is not.
"""

import triton
import triton.language as tl

from ..words import PLANES, TILE, WIDTH, dot, group_of, group_zero, plane, plane16, tile_words


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """The activation in float32. 0.5 (1 + tanh z) is the logistic function of 2 z, which serves `gelu_tanh`."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2 sqrt(2 / pi)
    else:
        share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * gate)
    return gate * share


@triton.jit
def bias_of(bias_ptr, n, N):
    """bias[n] as float32 [BN]; zeros if there is none."""
    bias = tl.zeros(n.shape, dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    return bias


@triton.jit
def gated_gemv(
    x_ptr, gate_words_ptr, gate_scale_ptr, gate_zero_ptr, gate_bias_ptr,
    up_words_ptr, up_scale_ptr, up_zero_ptr, up_bias_ptr, y_ptr, parts_ptr, N, K, span,
    GROUP: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y[n] of one token, or its parts. Grid (ceil(N / BN), 1, splits), `span` tiles per program."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    k = tl.arange(0, WIDTH)
    planes_of_group: tl.constexpr = GROUP // WIDTH
    gates = tl.zeros((BN, WIDTH), dtype=tl.float32)
    ups = tl.zeros((BN, WIDTH), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        gate_words = tile_words(gate_words_ptr, tile, n, N)
        up_words = tile_words(up_words_ptr, tile, n, N)
        for first in tl.static_range(0, PLANES, planes_of_group):
            at = group_of(tile, first, K, GROUP) * N + n
            gate_zero = 8.0 if gate_zero_ptr is None else group_zero(gate_zero_ptr, at, n < N)[:, None]
            up_zero = 8.0 if up_zero_ptr is None else group_zero(up_zero_ptr, at, n < N)[:, None]
            gate_part = tl.zeros((BN, WIDTH), dtype=tl.float32)
            up_part = tl.zeros((BN, WIDTH), dtype=tl.float32)
            for index in tl.static_range(first, first + planes_of_group):
                at_k = tile * TILE + index * WIDTH + k
                x = tl.load(x_ptr + at_k, mask=at_k < K, other=0.0).to(tl.float32)[None, :]
                gate_part += x * plane(gate_words, gate_zero, index)
                up_part += x * plane(up_words, up_zero, index)
            gates += gate_part * tl.load(gate_scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)[:, None]
            ups += up_part * tl.load(up_scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)[:, None]
    gate = tl.sum(gates, axis=1)
    up = tl.sum(ups, axis=1)
    if parts_ptr is None:
        y = activated(gate + bias_of(gate_bias_ptr, n, N), ACTIVATION) * (up + bias_of(up_bias_ptr, n, N))
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
    else:
        at = 2 * split.to(tl.int64) * N + n
        tl.store(parts_ptr + at, gate, mask=n < N)
        tl.store(parts_ptr + at + N, up, mask=n < N)


@triton.jit
def gated_gemm(
    x_ptr, gate_words_ptr, gate_scale_ptr, gate_zero_ptr, gate_bias_ptr,
    up_words_ptr, up_scale_ptr, up_zero_ptr, up_bias_ptr, y_ptr, parts_ptr, M, N, K, stride, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, ACTIVATION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[m, n], or its parts, by tensor cores. Grid (ceil(N / BN), ceil(M / BM), splits); stride of x's rows."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    k = tl.arange(0, WIDTH)
    planes_of_group: tl.constexpr = GROUP // WIDTH
    gates = tl.zeros((BN, BM), dtype=tl.float32)
    ups = tl.zeros((BN, BM), dtype=tl.float32)
    rows = x_ptr + m.to(tl.int64)[None, :] * stride
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        gate_words = tile_words(gate_words_ptr, tile, n, N)
        up_words = tile_words(up_words_ptr, tile, n, N)
        for first in tl.static_range(0, PLANES, planes_of_group):
            at = group_of(tile, first, K, GROUP) * N + n
            gate_zero = 8.0 if gate_zero_ptr is None else group_zero(gate_zero_ptr, at, n < N)[:, None]
            up_zero = 8.0 if up_zero_ptr is None else group_zero(up_zero_ptr, at, n < N)[:, None]
            gate_part = tl.zeros((BN, BM), dtype=tl.float32)
            up_part = tl.zeros((BN, BM), dtype=tl.float32)
            for index in tl.static_range(first, first + planes_of_group):
                at_k = tile * TILE + index * WIDTH + k
                x = tl.load(rows + at_k[:, None], mask=(m < M)[None, :] & (at_k < K)[:, None], other=0.0)
                gate_part = dot(plane16(gate_words, gate_zero, index, x.dtype), x, gate_part, INTERPRETED)
                up_part = dot(plane16(up_words, up_zero, index, x.dtype), x, up_part, INTERPRETED)
            gates += gate_part * tl.load(gate_scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)[:, None]
            ups += up_part * tl.load(up_scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    if parts_ptr is None:
        gate_bias, up_bias = bias_of(gate_bias_ptr, n, N), bias_of(up_bias_ptr, n, N)
        y = activated(gates + gate_bias[:, None], ACTIVATION) * (ups + up_bias[:, None])
        at = m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        for_gate = (2 * split * M + m).to(tl.int64)[None, :] * N + n[:, None]
        for_up = ((2 * split + 1) * M + m).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(parts_ptr + for_gate, gates, mask=mask)
        tl.store(parts_ptr + for_up, ups, mask=mask)


@triton.jit
def reduce_gated(
    parts_ptr, gate_bias_ptr, up_bias_ptr, y_ptr, M, N, splits, BN: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """y [M, N] of parts [splits, 2, M, N], added in the order of the splits. Grid (ceil(N / BN), M)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1)
    gate = tl.zeros((BN,), dtype=tl.float32)
    up = tl.zeros((BN,), dtype=tl.float32)
    for split in range(splits):
        gate += tl.load(parts_ptr + (2 * split * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
        up += tl.load(parts_ptr + ((2 * split + 1) * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
    y = activated(gate + bias_of(gate_bias_ptr, n, N), ACTIVATION) * (up + bias_of(up_bias_ptr, n, N))
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
