"""Int4 words in Triton: reading them and making weights of them, for the kernels of every operator that has them.

Layout of `words` and `zero`: int4_linear/layout.py. A tile is 128 input columns of one row: 16 words with 8 planes of
16 columns.

Dequantization without conversions. In a float32 of exponent 23 - s, bit s of the mantissa counts for 1: masking a
nibble where it stands and setting that exponent gives 2^(23 - s) + code, and one exact subtraction gives code - zero.
Planes 0 to 4 lie inside the 23 bits of the mantissa, planes 5 to 7 do after one shift by 12. Per weight that is one
logic operation and one addition; integer-to-float conversions run at a fraction of their rate. Factors of a tensor core
are made in 16 bits in the same way: bfloat16 counts in steps of 1 from 128 on, float16 from 1024 on.

Imported only when a kernel is about to run, since importing triton takes a second.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(128)
PLANES = tl.constexpr(8)
WIDTH = tl.constexpr(16)  # columns of a plane, words of a tile row


@triton.jit
def plane(words, zero, index: tl.constexpr):
    """Codes of one plane minus their zeros: int32 [BN, 16], float32 [BN, 1] or 8.0 -> float32 [BN, 16]."""
    shift: tl.constexpr = 4 * index if index < 5 else 4 * index - 12
    if index >= 5:
        words = words >> 12
    bits = (words & (0xF << shift)) | ((150 - shift) << 23)
    return bits.to(tl.float32, bitcast=True) - (zero + (1 << (23 - shift)) * 1.0)


@triton.jit
def plane16(words, zero, index: tl.constexpr, dtype: tl.constexpr):
    """The same as a factor of a dot, in `dtype`: bfloat16 or float16.

    Written as a float32 subtraction, since the interpreter's in bfloat16 is wrong; compiled, it is one in `dtype`.
    """
    base: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    bits = ((words >> (4 * index)) & 0xF) | (0x4300 if dtype == tl.bfloat16 else 0x6400)
    return (bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32) - (zero + base)).to(dtype)


@triton.jit
def group_of(tile, index, K, GROUP: tl.constexpr):
    """Group of a plane. Planes beyond K, whose x is zero, take the last one: it can be read, and they add nothing."""
    return min(tile * TILE + index * WIDTH, K - GROUP) // GROUP


@triton.jit
def group_zero(zero_ptr, at, mask):
    """Zeros of a group, at offsets [BN], as float32 [BN, 1]; 8.0 if there are none.

    Made from uint8 by the same construction as weights.
    """
    zero = 8.0
    if zero_ptr is not None:
        code = tl.load(zero_ptr + at, mask=mask, other=0).to(tl.int32)
        zero = ((code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0)[:, None]
    return zero


@triton.jit
def group_scale(scale_ptr, at, mask):
    """Scales of a group, at offsets [BN], as float32 [BN, 1]."""
    return tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def tile_words(words_ptr, tile, n, N):
    """The 16 words of each of the rows n of a tile, int32 [BN, 16]. Read once, so first to leave the cache."""
    at = (tile * N + n[:, None].to(tl.int64)) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(words_ptr + at, mask=(n < N)[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def dot(left, right, total, INTERPRETED: tl.constexpr):
    """left @ right + total, in float32.

    INTERPRETED is set for Triton's interpreter, whose tl.dot is wrong for bfloat16: factors are then cast to float32,
    which is exact.
    """
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total)
