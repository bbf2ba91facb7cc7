"""Triton kernels of `sparse24_linear`. Imported only when a kernel is about to run.

Layout of `values` and `index`: layout.py. A tile is 256 input columns of a row: four planes of 16 fours of columns, and
16 words of the index, whose nibble i belongs to plane i. How fours are multiplied: two_of_four.py.

What happens where a sum ends, and how sums are split: outputs.py.

Names: BN rows of the weight (outputs) and BM rows of x (tokens) per program. Rows of x must start at multiples of 8
bytes, and K is a multiple of 8.
"""

import triton
import triton.language as tl

from ..outputs import store_token, store_tokens
from ..two_of_four import as_float, dot_fours, fours_of, picked, spread

TILE = tl.constexpr(256)
PLANES = tl.constexpr(4)
WIDTH = tl.constexpr(16)  # fours of columns of a plane


@triton.jit
def plane_values(values_ptr, plane, n, N, K):
    """Kept pairs of the rows n of a plane, int32 [BN, 16]. Read once, so first to leave the cache."""
    at = (plane * N + n[:, None].to(tl.int64)) * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (n < N)[:, None] & (plane * WIDTH * 4 < K)
    return tl.load(values_ptr.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def tile_index(index_ptr, tile, n, N):
    """The words of the index of the rows n of a tile, int32 [BN, 16]."""
    at = (tile * N + n[:, None].to(tl.int64)) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(index_ptr + at, mask=(n < N)[:, None], other=0).to(tl.int32)


@triton.jit
def plane_weights(pairs, nibble):
    """All weights of a plane: int32 pairs -> fours, int64."""
    return spread(pairs & 0xFFFF, (pairs >> 16) & 0xFFFF, nibble)


@triton.jit
def sparse24_gemv(x_ptr, values_ptr, index_ptr, bias_ptr, y_ptr, N, K, span, BN: tl.constexpr):
    """y[n] of one token, or parts [splits, n]. Grid (1, ceil(N / BN), splits), `span` tiles per program."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    total = tl.zeros((BN, WIDTH), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        index = tile_index(index_ptr, tile, n, N)
        for i in tl.static_range(PLANES):
            pairs = plane_values(values_ptr, tile * PLANES + i, n, N, K)
            at = (tile * PLANES + i) * WIDTH + tl.arange(0, WIDTH)
            x = tl.load(fours_of(x_ptr) + at, mask=at * 4 < K, other=0)[None, :]
            total += as_products(pairs, x, index >> (4 * i), dtype)
    store_token(y_ptr, bias_ptr, tl.sum(total, axis=1), n, split, N)


@triton.jit
def as_products(pairs, x, nibble, dtype: tl.constexpr):
    """The sum of the two products of every four columns: pairs [BN, 16], x int64 [1, 16] -> float32 [BN, 16]."""
    first = as_float(pairs, dtype) * picked(x, nibble, dtype)
    return first + as_float(pairs >> 16, dtype) * picked(x, nibble >> 2, dtype)


@triton.jit
def sparse24_gemm(
    x_ptr, values_ptr, index_ptr, bias_ptr, y_ptr, M, N, K, stride, span,
    BN: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[m, n], or parts [splits, m, n], from expanded weights. Grid (ceil(M / BM), ceil(N / BN), splits)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    rows = fours_of(x_ptr) + m.to(tl.int64)[None, :] * (stride // 4)
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, TILE))):
        index = tile_index(index_ptr, tile, n, N)
        for i in tl.static_range(PLANES):
            weights = plane_weights(plane_values(values_ptr, tile * PLANES + i, n, N, K), index >> (4 * i))
            at = (tile * PLANES + i) * WIDTH + tl.arange(0, WIDTH)
            x = tl.load(rows + at[:, None], mask=(m < M)[None, :] & (at * 4 < K)[:, None], other=0)
            total = dot_fours(weights, x, total, dtype, INTERPRETED)
    store_tokens(y_ptr, bias_ptr, total, n, m, split, M, N)


@triton.jit
def sparse24_expand(values_ptr, index_ptr, w_ptr, N, K, BN: tl.constexpr):
    """W [N, K], the same bits. Grid (ceil(N / BN), tiles)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.program_id(1)
    index = tile_index(index_ptr, tile, n, N)
    for i in tl.static_range(PLANES):
        weights = plane_weights(plane_values(values_ptr, tile * PLANES + i, n, N, K), index >> (4 * i))
        at = (tile * PLANES + i) * WIDTH + tl.arange(0, WIDTH)
        at_w = n.to(tl.int64)[:, None] * (K // 4) + at[None, :]
        tl.store(fours_of(w_ptr) + at_w, weights, mask=(n < N)[:, None] & (at * 4 < K)[None, :])
