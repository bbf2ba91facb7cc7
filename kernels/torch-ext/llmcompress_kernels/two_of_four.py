"""2:4 weights in Triton: four neighbouring columns as one 64-bit element, for the kernels of every operator on them.

Columns 4k .. 4k + 3 of a row of x are 8 bytes, read as one int64 of four 16-bit fields. Their two weights become such
fields too, where they are multiplied by tensor cores: each is shifted by 16 times its position, which is two shifts
where selections would take six comparisons and six moves (`spread`). With one token it is the other way round: the two
fields of x that have a weight are shifted down, and half of the multiplications remain (`picked`).

`nibble` is the pair of positions, first | second << 2, in the lowest bits of an int32 whose other bits do not matter.

Imported only when a kernel is about to run, since importing triton takes a second.
"""

import triton
import triton.language as tl

from .words import dot


@triton.jit
def fours_of(ptr):
    """A pointer to 16-bit values as one to fours of them. They must lie at multiples of 8 bytes."""
    return ptr.to(tl.pointer_type(tl.int64))


@triton.jit
def spread(first, second, nibble):
    """Two 16-bit fields (int32 below 65536) at their positions among four, zeros elsewhere: int64."""
    low = first.to(tl.int64) << ((nibble & 3) * 16).to(tl.int64)
    high = second.to(tl.int64) << (((nibble >> 2) & 3) * 16).to(tl.int64)
    return low | high


@triton.jit
def as_float(bits, dtype: tl.constexpr):
    """The low 16 bits of int32, a bfloat16 or float16, as float32; exact and without a conversion of integers."""
    if dtype == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def picked(fours, position, dtype: tl.constexpr):
    """The field at a position (int32, bits above the second do not matter) as float32."""
    return as_float((fours >> ((position & 3) * 16).to(tl.int64)).to(tl.int32), dtype)


@triton.jit
def factor(fours, column: tl.constexpr, dtype: tl.constexpr):
    """One of the four columns as a factor of a dot, in `dtype`."""
    return (fours >> (16 * column)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def dot_fours(weights, x, total, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + weights x: int64 fours [BN, 16] and [16, BM] -> float32 [BN, BM].

    The columns 4k + c, c fixed, are the inner dimension of one dot: fields of elements that a thread has.
    """
    for column in tl.static_range(4):
        total = dot(factor(weights, column, dtype), factor(x, column, dtype), total, INTERPRETED)
    return total


@triton.jit
def rounded_bits(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 rounded to `dtype`, as the low 16 bits of int32. The interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
