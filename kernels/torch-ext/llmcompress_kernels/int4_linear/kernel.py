"""Triton kernels of `int4_linear`. Imported only when a kernel is about to run, since importing triton takes a second.

How words become weights: words.py; what happens where a sum ends, and how sums are split: outputs.py. Scales multiply
float32 sums of a group, not single weights: fewer operations, and no rounding of the products.

The loops are functions of their own, which other operators end in other ways. They take one weight or two of the same
shape: with a second one, every column of x is read once for both.

Names: BN rows of the weight (outputs) n and BM rows of x (tokens) m per program.
"""

import triton
import triton.language as tl

from ..outputs import reduce_splits, store_token, store_tokens
from ..words import PLANES, TILE, WIDTH, dot, group_of, group_scale, group_zero, plane, plane16, tile_words

__all__ = ["gemm_sums", "gemv_sums", "int4_dequantize", "int4_gemm", "int4_gemv", "reduce_splits"]


@triton.jit
def gemv_sums(
    x_ptr, words_ptr, scale_ptr, zero_ptr, words2_ptr, scale2_ptr, zero2_ptr, n, split, N, K, span,
    GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """sum_k x[k] W[n, k] over the `span` tiles of a split, of one token: float32 [BN], and the same of W2.

    Without tensor cores. Each word is read once. Three instructions per weight are the product itself: mask, subtract,
    multiply and add. words2_ptr None: there is one weight, and the second result means nothing.
    """
    k = tl.arange(0, WIDTH)
    planes_of_group: tl.constexpr = GROUP // WIDTH
    total = tl.zeros((BN, WIDTH), dtype=tl.float32)
    total2 = tl.zeros((BN, WIDTH), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        words = tile_words(words_ptr, tile, n, N)
        if words2_ptr is not None:
            words2 = tile_words(words2_ptr, tile, n, N)
        for first in tl.static_range(0, PLANES, planes_of_group):
            at = group_of(tile, first, K, GROUP) * N + n
            zero = group_zero(zero_ptr, at, n < N)
            part = tl.zeros((BN, WIDTH), dtype=tl.float32)
            if words2_ptr is not None:
                zero2 = group_zero(zero2_ptr, at, n < N)
                part2 = tl.zeros((BN, WIDTH), dtype=tl.float32)
            for index in tl.static_range(first, first + planes_of_group):
                at_k = tile * TILE + index * WIDTH + k
                x = tl.load(x_ptr + at_k, mask=at_k < K, other=0.0).to(tl.float32)[None, :]
                part += x * plane(words, zero, index)
                if words2_ptr is not None:
                    part2 += x * plane(words2, zero2, index)
            total += part * group_scale(scale_ptr, at, n < N)
            if words2_ptr is not None:
                total2 += part2 * group_scale(scale2_ptr, at, n < N)
    return tl.sum(total, axis=1), tl.sum(total2, axis=1)


@triton.jit
def gemm_sums(
    x_ptr, words_ptr, scale_ptr, zero_ptr, words2_ptr, scale2_ptr, zero2_ptr, n, m, split, M, N, K, stride, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_k W[n, k] x[m, k] over the tiles of a split, by tensor cores: float32 [BN, BM], and the same of W2.

    Computes Wxᵀ: the weights are made in registers, and the left factor is the one that may stay there. stride: of x's
    rows. words2_ptr None: there is one weight, and the second result means nothing.
    """
    k = tl.arange(0, WIDTH)
    planes_of_group: tl.constexpr = GROUP // WIDTH
    total = tl.zeros((BN, BM), dtype=tl.float32)
    total2 = tl.zeros((BN, BM), dtype=tl.float32)
    rows = x_ptr + m.to(tl.int64)[None, :] * stride
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        words = tile_words(words_ptr, tile, n, N)
        if words2_ptr is not None:
            words2 = tile_words(words2_ptr, tile, n, N)
        for first in tl.static_range(0, PLANES, planes_of_group):
            at = group_of(tile, first, K, GROUP) * N + n
            zero = group_zero(zero_ptr, at, n < N)
            part = tl.zeros((BN, BM), dtype=tl.float32)
            if words2_ptr is not None:
                zero2 = group_zero(zero2_ptr, at, n < N)
                part2 = tl.zeros((BN, BM), dtype=tl.float32)
            for index in tl.static_range(first, first + planes_of_group):
                at_k = tile * TILE + index * WIDTH + k
                x = tl.load(rows + at_k[:, None], mask=(m < M)[None, :] & (at_k < K)[:, None], other=0.0)
                part = dot(plane16(words, zero, index, x.dtype), x, part, INTERPRETED)
                if words2_ptr is not None:
                    part2 = dot(plane16(words2, zero2, index, x.dtype), x, part2, INTERPRETED)
            total += part * group_scale(scale_ptr, at, n < N)
            if words2_ptr is not None:
                total2 += part2 * group_scale(scale2_ptr, at, n < N)
    return total, total2


@triton.jit
def int4_gemv(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, N, K, span,
    GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[n] of one token, or parts [splits, n]. Grid (1, ceil(N / BN), splits), `span` tiles per program."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    y, _ = gemv_sums(x_ptr, words_ptr, scale_ptr, zero_ptr, None, None, None, n, split, N, K, span, GROUP, BN)
    store_token(y_ptr, bias_ptr, y, n, split, N)


@triton.jit
def int4_gemm(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, M, N, K, stride, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[m, n], or parts [splits, m, n]. Grid (ceil(M / BM), ceil(N / BN), splits)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    y, _ = gemm_sums(
        x_ptr, words_ptr, scale_ptr, zero_ptr, None, None, None, n, m, split, M, N, K, stride, span,
        GROUP, BN, BM, INTERPRETED,
    )  # fmt: skip
    store_tokens(y_ptr, bias_ptr, y, n, m, split, M, N)


@triton.jit
def int4_dequantize(words_ptr, scale_ptr, zero_ptr, w_ptr, N, K, GROUP: tl.constexpr, BN: tl.constexpr):
    """W [N, K], every product rounded once. Grid (ceil(N / BN), tiles)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.program_id(1)
    words = tile_words(words_ptr, tile, n, N)
    for index in tl.static_range(PLANES):
        at = group_of(tile, index, K, GROUP) * N + n
        w = plane(words, group_zero(zero_ptr, at, n < N), index) * group_scale(scale_ptr, at, n < N)
        k = tile * TILE + index * WIDTH + tl.arange(0, WIDTH)
        at_w = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(w_ptr + at_w, w.to(w_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
