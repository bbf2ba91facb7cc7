"""Triton kernels of `sparse24_int4_linear`. Imported only when a kernel is about to run.

Layout of `words` and `metadata`: layout.py. There are two forms of the product:

- `sparse24_int4_gemm_sp` multiplies on sparse tensor cores, by inline assembly (assembly.py). Its tensors are
  [threads, 4] in the order of registers: row i is thread i, since Triton gives every thread 16 bytes of a load that is
  contiguous along 4 elements, and tests hold that it does. It computes W xᵀ, because the sparse operand is the left
  one, and `token_fragments` brings x into the order of the right one first.
- `sparse24_int4_gemv` and `sparse24_int4_gemm` use nothing but Triton's language, and expand the weights in registers
  (two_of_four.py). They read the words by pairs of rows n, n + 8: word j = 4 t + s of a pair has columns 32 s + 16 q +
  4 t and up of a block, nibbles h + 2 q and h + 2 q + 4 those of row n + 8 h.

Codes become numbers without conversions, as in words.py; here they are stored as code ^ 8, and one exclusive or with
the exponent and 8 restores the code where it stands. Scales multiply float32 sums of a group, except in
`sparse24_int4_gemm`.

Names: BN rows of the weight (outputs) and BM rows of x (tokens) per program.
"""

import triton
import triton.language as tl

from ..outputs import store_token, store_tokens
from ..two_of_four import dot_fours, fours_of, picked, rounded_bits, spread
from .assembly import MULTIPLY_CONSTRAINTS, less_eight, multiply

STRIP = tl.constexpr(16)
BLOCK = tl.constexpr(128)
WIDTH = tl.constexpr(16)  # words of a pair of rows and block
CONSTRAINTS = tl.constexpr(MULTIPLY_CONSTRAINTS)


# by pairs of rows


@triton.jit
def upper_row(pair):
    """The upper row of a pair; the lower one is 8 further."""
    return pair // 8 * STRIP + pair % 8


@triton.jit
def pair_words(words_ptr, block, pair, N):
    """The words of each pair of rows of a block, int32 [pairs, 16]. Read once, so first to leave the cache."""
    pairs = tl.cdiv(N, STRIP) * 8
    at = (block * pairs + pair[:, None].to(tl.int64)) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(words_ptr + at, mask=(pair < pairs)[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def pair_nibbles(metadata_ptr, block, q: tl.constexpr, pair, N):
    """For the words of a block, columns 16 q and up: positions in the row n from bit 0, in the row n + 8 from bit 16.

    int32 [pairs, 16]. They are in other lanes' words: each of the eight words of a pair is read by four threads.
    """
    pairs = tl.cdiv(N, STRIP) * 8
    j = tl.arange(0, WIDTH)
    s = j % 4
    word = 4 * (2 * (s % 2) + q) + block % 2 * 2 + s // 2
    at = (block // 2 * pairs + pair[:, None].to(tl.int64)) * WIDTH + word[None, :]
    return tl.load(metadata_ptr + at, mask=(pair < pairs)[:, None], other=0) >> (j // 4 * 4)[None, :]


@triton.jit
def four_of(block, q: tl.constexpr):
    """Which four of columns each of the words of a pair has: [16]."""
    j = tl.arange(0, WIDTH)
    return block * (BLOCK // 4) + j % 4 * 8 + q * 4 + j // 4


@triton.jit
def code_float(words, nibble: tl.constexpr):
    """Kept weights before their scale, float32. Nibbles 0 to 4 lie inside the mantissa, the others after a shift."""
    shift: tl.constexpr = 4 * nibble if nibble < 5 else 4 * nibble - 12
    if nibble >= 5:
        words = words >> 12
    bits = (words & (0xF << shift)) ^ (((150 - shift) << 23) | (8 << shift))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - shift)) + 8) * 1.0


@triton.jit
def group_scale(scale_ptr, column, n, N, K, GROUP: tl.constexpr):
    """Scales of rows n in the group of a column, float32. Columns beyond K, which add nothing, take the last group."""
    at = min(column, K - GROUP) // GROUP * N + n
    return tl.load(scale_ptr + at, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def word_scales(scale_ptr, block, n, N, K, GROUP: tl.constexpr):
    """Scales for the words of rows n: [pairs, 1], or [pairs, 16] where a block has several groups."""
    if GROUP == BLOCK:
        scales = group_scale(scale_ptr, block * BLOCK, n, N, K, GROUP)[:, None]
    else:
        column = block * BLOCK + tl.arange(0, WIDTH) % 4 * 32
        at = tl.minimum(column, K - GROUP) // GROUP * N
        scales = tl.load(scale_ptr + at[None, :] + n[:, None], mask=(n < N)[:, None], other=0.0).to(tl.float32)
    return scales


@triton.jit
def sparse24_int4_gemv(
    x_ptr, words_ptr, metadata_ptr, scale_ptr, bias_ptr, y_ptr, N, K, span,
    GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[n] of one token, or parts [splits, n]. Grid (1, ceil(N / BN), splits), `span` blocks per program."""
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    pair = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
    n = upper_row(pair)
    split = tl.program_id(2)
    upper = tl.zeros((BN // 2, WIDTH), dtype=tl.float32)
    lower = tl.zeros((BN // 2, WIDTH), dtype=tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(K, BLOCK))):
        words = pair_words(words_ptr, block, pair, N)
        upper_part = tl.zeros((BN // 2, WIDTH), dtype=tl.float32)
        lower_part = tl.zeros((BN // 2, WIDTH), dtype=tl.float32)
        for q in tl.static_range(2):
            at = four_of(block, q)
            x = tl.load(fours_of(x_ptr) + at, mask=at * 4 < K, other=0)[None, :]
            nibbles = pair_nibbles(metadata_ptr, block, q, pair, N)
            upper_part += code_float(words, 2 * q) * picked(x, nibbles, dtype)
            upper_part += code_float(words, 2 * q + 4) * picked(x, nibbles >> 2, dtype)
            lower_part += code_float(words, 2 * q + 1) * picked(x, nibbles >> 16, dtype)
            lower_part += code_float(words, 2 * q + 5) * picked(x, nibbles >> 18, dtype)
        upper += upper_part * word_scales(scale_ptr, block, n, N, K, GROUP)
        lower += lower_part * word_scales(scale_ptr, block, n + 8, N, K, GROUP)
    store_token(y_ptr, bias_ptr, tl.sum(upper, axis=1), n, split, N)
    store_token(y_ptr, bias_ptr, tl.sum(lower, axis=1), n + 8, split, N)


@triton.jit
def register_fours(words, nibbles, scales, register: tl.constexpr, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """The weights of one register of all words, each product rounded once: int64 fours [pairs, 16]."""
    first = rounded_bits(code_float(words, register) * scales, dtype, INTERPRETED)
    second = rounded_bits(code_float(words, register + 4) * scales, dtype, INTERPRETED)
    return spread(first, second, nibbles >> (16 * (register % 2)))


@triton.jit
def sparse24_int4_gemm(
    x_ptr, words_ptr, metadata_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, stride, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[m, n], or parts [splits, m, n], by tensor cores on expanded weights. Grid (ceil(M / BM), ceil(N / BN), splits).

    The words of a pair of rows have columns of all groups of a block, so that scales multiply weights and not sums.
    """
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    pair = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
    n = upper_row(pair)
    split = tl.program_id(2)
    rows = fours_of(x_ptr) + m.to(tl.int64)[None, :] * (stride // 4)
    upper = tl.zeros((BN // 2, BM), dtype=tl.float32)
    lower = tl.zeros((BN // 2, BM), dtype=tl.float32)
    for block in range(split * span, min((split + 1) * span, tl.cdiv(K, BLOCK))):
        words = pair_words(words_ptr, block, pair, N)
        upper_scales = word_scales(scale_ptr, block, n, N, K, GROUP)
        lower_scales = word_scales(scale_ptr, block, n + 8, N, K, GROUP)
        for q in tl.static_range(2):
            nibbles = pair_nibbles(metadata_ptr, block, q, pair, N)
            at = four_of(block, q)
            x = tl.load(rows + at[:, None], mask=(m < M)[None, :] & (at * 4 < K)[:, None], other=0)
            weights = register_fours(words, nibbles, upper_scales, 2 * q, dtype, INTERPRETED)
            upper = dot_fours(weights, x, upper, dtype, INTERPRETED)
            weights = register_fours(words, nibbles, lower_scales, 2 * q + 1, dtype, INTERPRETED)
            lower = dot_fours(weights, x, lower, dtype, INTERPRETED)
    store_tokens(y_ptr, bias_ptr, upper, n[:, None], m[None, :], split, M, N)
    store_tokens(y_ptr, bias_ptr, lower, n[:, None] + 8, m[None, :], split, M, N)


@triton.jit
def store_weights(w_ptr, weights, block, q: tl.constexpr, n, N, K):
    """Fours of rows n of W: those of the columns 16 q and up of each word's 32."""
    four = four_of(block, q)
    at = n.to(tl.int64)[:, None] * (K // 4) + four[None, :]
    tl.store(fours_of(w_ptr) + at, weights, mask=(n < N)[:, None] & (four * 4 < K)[None, :])


@triton.jit
def sparse24_int4_dequantize(
    words_ptr, metadata_ptr, scale_ptr, w_ptr, N, K, GROUP: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr
):
    """W [N, K], every product rounded once. Grid (ceil(N / BN), blocks)."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    pair = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    n = upper_row(pair)
    block = tl.program_id(1)
    words = pair_words(words_ptr, block, pair, N)
    upper = word_scales(scale_ptr, block, n, N, K, GROUP)
    lower = word_scales(scale_ptr, block, n + 8, N, K, GROUP)
    for q in tl.static_range(2):
        nibbles = pair_nibbles(metadata_ptr, block, q, pair, N)
        weights = register_fours(words, nibbles, upper, 2 * q, dtype, INTERPRETED)
        store_weights(w_ptr, weights, block, q, n, N, K)
        weights = register_fours(words, nibbles, lower, 2 * q + 1, dtype, INTERPRETED)
        store_weights(w_ptr, weights, block, q, n + 8, N, K)


# by fragments


@triton.jit
def token_fragments(x_ptr, fragments_ptr, M, K, stride, BM: tl.constexpr):
    """x [M, K] as right operands: int32 [ceil(M / BM), blocks, 4, BM / 8, 32, 4], zeros beyond M and K.

    Register b of lane 4 g + t, for the product s of a block and tokens 8 i and up: columns 32 s + 8 b + 2 t and the
    next of token 8 i + g. Grid (blocks, ceil(M / BM)).
    """
    block = tl.program_id(0)
    at = tl.arange(0, 64 * BM)
    lane = at // 4 % 32
    k = block * BLOCK + at // (16 * BM) * 32 + at % 4 * 8 + lane % 4 * 2
    m = tl.program_id(1) * BM + at // 128 % (BM // 8) * 8 + lane // 4
    columns = x_ptr.to(tl.pointer_type(tl.int32)) + (m.to(tl.int64) * stride + k) // 2
    place = (tl.program_id(1) * tl.num_programs(0) + block) * (64 * BM) + at
    tl.store(fragments_ptr + place, tl.load(columns, mask=(m < M) & (k < K), other=0))


@triton.jit
def register_of(words, register: tl.constexpr, BFLOAT16: tl.constexpr):
    """A register of the left operand for each of the four products of a block: pairs of 16-bit floats, int32."""
    pairs = ((words >> (4 * register)) & 0x000F000F) ^ (0x43084308 if BFLOAT16 else 0x64086408)
    return tl.inline_asm_elementwise(less_eight(BFLOAT16), "=r,r", [pairs], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def block_sum(
    total, fragments_ptr, a0, a1, a2, a3, metadata, scale_ptr, block, n, N, K,
    half: tl.constexpr, tokens: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """total + the product of a block, half 0 or 1 of its tile, with eight tokens: float32 [threads, 4].

    fragments_ptr: [threads, 4], to the right operand of the block's first product with the first eight tokens.
    """
    b0 = tl.load(fragments_ptr + tokens * 128)
    b1 = tl.load(fragments_ptr + (BM // 8 + tokens) * 128)
    b2 = tl.load(fragments_ptr + (2 * (BM // 8) + tokens) * 128)
    b3 = tl.load(fragments_ptr + (3 * (BM // 8) + tokens) * 128)
    lower = (tl.arange(0, 4) >= 2)[None, :]
    for group in tl.static_range(BLOCK // GROUP):
        part = tl.inline_asm_elementwise(
            multiply(BFLOAT16, group * (GROUP // 32), GROUP // 32, half),
            CONSTRAINTS,
            [a0, a1, a2, a3, metadata, b0, b1, b2, b3],
            dtype=tl.float32,
            is_pure=False,
            pack=4,
        )
        column = block * BLOCK + group * GROUP
        scale0 = group_scale(scale_ptr, column, n, N, K, GROUP)[:, None]
        scale1 = group_scale(scale_ptr, column, n + 8, N, K, GROUP)[:, None]
        total += part * tl.where(lower, scale1, scale0)
    return total


@triton.jit
def sparse24_int4_gemm_sp(
    fragments_ptr, words_ptr, metadata_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y[m, n], or parts [splits, m, n], by sparse tensor cores. Grid (ceil(M / BM), ceil(N / BN), splits).

    A warp has the 16 rows of a strip, and BM is 8, 16 or 32. No operand passes through shared memory: all are loaded as
    the instruction takes them.
    """
    BFLOAT16: tl.constexpr = scale_ptr.dtype.element_ty == tl.bfloat16
    thread = tl.arange(0, 2 * BN)
    lane = thread % 32
    strip = tl.program_id(1) * (BN // STRIP) + thread // 32
    strips = tl.cdiv(N, STRIP)
    split = tl.program_id(2)
    tiles = tl.cdiv(K, 2 * BLOCK)
    n = strip * STRIP + lane // 4
    at = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    mine = strip.to(tl.int64)[:, None] * 128 + at
    fragments = fragments_ptr + tl.program_id(0) * tiles * (128 * BM) + at
    total0 = tl.zeros((2 * BN, 4), dtype=tl.float32)
    total1 = tl.zeros((2 * BN, 4), dtype=tl.float32)
    total2 = tl.zeros((2 * BN, 4), dtype=tl.float32)
    total3 = tl.zeros((2 * BN, 4), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tiles)):
        metadata = tl.load(
            metadata_ptr + (tile * strips * 128 + mine),
            mask=(strip < strips)[:, None], other=0x44444444, eviction_policy="evict_first",
        )  # fmt: skip
        for half in tl.static_range(2):
            block = tile * 2 + half
            words = tl.load(
                words_ptr + (block * strips * 128 + mine),
                mask=(strip < strips)[:, None] & (block * BLOCK < K), other=0, eviction_policy="evict_first",
            )  # fmt: skip
            a0 = register_of(words, 0, BFLOAT16)
            a1 = register_of(words, 1, BFLOAT16)
            a2 = register_of(words, 2, BFLOAT16)
            a3 = register_of(words, 3, BFLOAT16)
            b = fragments + block * (64 * BM)
            total0 = block_sum(
                total0, b, a0, a1, a2, a3, metadata, scale_ptr, block, n, N, K, half, 0, GROUP, BM, BFLOAT16
            )  # fmt: skip
            if BM >= 16:
                total1 = block_sum(
                    total1, b, a0, a1, a2, a3, metadata, scale_ptr, block, n, N, K, half, 1, GROUP, BM, BFLOAT16
                )  # fmt: skip
            if BM >= 32:
                total2 = block_sum(
                    total2, b, a0, a1, a2, a3, metadata, scale_ptr, block, n, N, K, half, 2, GROUP, BM, BFLOAT16
                )  # fmt: skip
                total3 = block_sum(
                    total3, b, a0, a1, a2, a3, metadata, scale_ptr, block, n, N, K, half, 3, GROUP, BM, BFLOAT16
                )  # fmt: skip
    element = tl.arange(0, 4)[None, :]
    row = n[:, None] + element // 2 * 8
    token = tl.program_id(0) * BM + (lane % 4 * 2)[:, None] + element % 2
    store_tokens(y_ptr, bias_ptr, total0, row, token, split, M, N)
    if BM >= 16:
        store_tokens(y_ptr, bias_ptr, total1, row, token + 8, split, M, N)
    if BM >= 32:
        store_tokens(y_ptr, bias_ptr, total2, row, token + 16, split, M, N)
        store_tokens(y_ptr, bias_ptr, total3, row, token + 24, split, M, N)
