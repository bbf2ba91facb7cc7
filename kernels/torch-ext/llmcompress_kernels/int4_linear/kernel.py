"""Triton kernels of `int4_linear`. Imported only when a kernel is about to run, since importing triton takes a second.

How words become weights: words.py. Scales multiply float32 sums of a group, not single weights: fewer operations, and
no rounding of the products.

Split-K: program (n, m, s) sums a span of tiles into its own slice of a float32 workspace, and `reduce_splits` adds the
slices in the order of s. No atomics, so the same inputs give the same bits.

Names: BN rows of the weight (outputs) n and BM rows of x (tokens) m per program. Sums are functions of their own, which
other operators end in other ways.
"""

import triton
import triton.language as tl

from ..words import PLANES, TILE, WIDTH, dot, group_of, group_zero, plane, plane16, tile_words


@triton.jit
def gemv_sum(
    x_ptr, words_ptr, scale_ptr, zero_ptr, n, split, N, K, span, GROUP: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """sum_k x[k] W[n, k] over the `span` tiles of a split, of one token, without tensor cores: float32 [BN].

    Each word is read once. Three instructions per weight are the product itself: mask, subtract, multiply and add.
    """
    k = tl.arange(0, WIDTH)
    planes_of_group: tl.constexpr = GROUP // WIDTH
    total = tl.zeros((BN, WIDTH), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        words = tile_words(words_ptr, tile, n, N)
        for first in tl.static_range(0, PLANES, planes_of_group):
            at = group_of(tile, first, K, GROUP) * N + n
            zero = 8.0 if zero_ptr is None else group_zero(zero_ptr, at, n < N)[:, None]
            part = tl.zeros((BN, WIDTH), dtype=tl.float32)
            for index in tl.static_range(first, first + planes_of_group):
                at_k = tile * TILE + index * WIDTH + k
                x = tl.load(x_ptr + at_k, mask=at_k < K, other=0.0).to(tl.float32)
                part += x[None, :] * plane(words, zero, index)
            scale = tl.load(scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)
            total += part * scale[:, None]
    return tl.sum(total, axis=1)


@triton.jit
def gemm_sum(
    x_ptr, words_ptr, scale_ptr, zero_ptr, n, m, split, M, N, K, stride, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_k W[n, k] x[m, k] over the tiles of a split, by tensor cores: float32 [BN, BM]; stride of x's rows.

    Computes Wxᵀ: the weights are made in registers, and the left factor is the one that may stay there.
    """
    k = tl.arange(0, WIDTH)
    planes_of_group: tl.constexpr = GROUP // WIDTH
    total = tl.zeros((BN, BM), dtype=tl.float32)
    rows = x_ptr + m.to(tl.int64)[None, :] * stride
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        words = tile_words(words_ptr, tile, n, N)
        for first in tl.static_range(0, PLANES, planes_of_group):
            at = group_of(tile, first, K, GROUP) * N + n
            zero = 8.0 if zero_ptr is None else group_zero(zero_ptr, at, n < N)[:, None]
            part = tl.zeros((BN, BM), dtype=tl.float32)
            for index in tl.static_range(first, first + planes_of_group):
                at_k = tile * TILE + index * WIDTH + k
                x = tl.load(rows + at_k[:, None], mask=(m < M)[None, :] & (at_k < K)[:, None], other=0.0)
                part = dot(plane16(words, zero, index, x.dtype), x, part, INTERPRETED)
            scale = tl.load(scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)
            total += part * scale[:, None]
    return total


@triton.jit
def int4_gemv(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, N, K, span,
    GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[n] of one token, or parts [splits, n]. Grid (ceil(N / BN), 1, splits), `span` tiles per program."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    y = gemv_sum(x_ptr, words_ptr, scale_ptr, zero_ptr, n, split, N, K, span, GROUP, BN)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + split.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def int4_gemm(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, M, N, K, stride, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[m, n], or parts [splits, m, n]. Grid (ceil(N / BN), ceil(M / BM), splits)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    y = gemm_sum(
        x_ptr, words_ptr, scale_ptr, zero_ptr, n, m, split, M, N, K, stride, span, GROUP, BN, BM, INTERPRETED
    )  # fmt: skip
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def reduce_splits(parts_ptr, bias_ptr, y_ptr, M, N, splits, BN: tl.constexpr):
    """y [M, N] = sum over splits of parts [splits, M, N] + bias, always in the same order. Grid (ceil(N / BN), M)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1)
    total = tl.zeros((BN,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (split * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def int4_dequantize(words_ptr, scale_ptr, zero_ptr, w_ptr, N, K, GROUP: tl.constexpr, BN: tl.constexpr):
    """W [N, K], every product rounded once. Grid (ceil(N / BN), tiles)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.program_id(1)
    words = tile_words(words_ptr, tile, n, N)
    for index in tl.static_range(PLANES):
        at = group_of(tile, index, K, GROUP) * N + n
        zero = 8.0 if zero_ptr is None else group_zero(zero_ptr, at, n < N)[:, None]
        scale = tl.load(scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)
        w = plane(words, zero, index) * scale[:, None]
        k = tile * TILE + index * WIDTH + tl.arange(0, WIDTH)
        at_w = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(w_ptr + at_w, w.to(w_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
