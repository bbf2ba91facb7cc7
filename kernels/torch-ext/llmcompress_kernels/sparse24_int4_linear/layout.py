"""Where the bits of a 2:4 weight of 4-bit codes lie: in the order in which sparse tensor cores take them.

The instruction `mma.sp.m16n8k32` multiplies a *strip* of 16 rows and 32 columns, half of them stored, by 8 tokens. It
wants its operands in registers of the 32 lanes of a warp. Lane 4 g + t has

    A  four registers of two kept weights, r = h + 2 q: those of row g + 8 h, columns 16 q + 4 t .. 16 q + 4 t + 3
    E  the positions of 16 columns of row g (low half) and of row g + 8 (high half). The lanes t = 2 u and 2 u + 1 give
       columns 0 .. 15 and 16 .. 31, where u is the selector of the instruction; the other lanes may hold another E

So that a lane gets all of that by loads of 16 bytes and without shuffles, a weight [out, in] with groups of g is

    words     int32  [ceil(in / 128), ceil(out / 16), 32, 4]
              word s of a lane is A of columns 32 s .. 32 s + 31 of a block of 128; nibble r + 4 v is kept weight v of
              register r
    metadata  int32  [ceil(in / 256), ceil(out / 16), 32, 4]
              word p of a lane is E of columns 64 p + 32 u .. 64 p + 32 u + 31 of a tile of 256, u = t // 2; nibble
              i + 4 h is first | second << 2
    scale     bf16 or fp16  [in / g, out]

    weight[n, k] = (code - 8) * scale[k // g, n] where a code is stored, 0 elsewhere

A nibble is code ^ 8, which is code - 8 in two's complement: so words of zeros are weights of zero. Rows and columns
beyond those of the weight have code 8 and positions 0 and 1. That is 3 bits per weight and the scales, 3.125 in all
with groups of 128.

Other kernels read the same words row by row: the words of a block that belong to row g of a strip, and to row g + 8,
are 16 that lie together.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import FLOATS, check_dtype, check_shape, refuse_unless
from ..int4_linear.layout import GROUPS
from ..stored24 import (
    BOTH_LOWEST,
    check_index,
    gather_nibbles,
    index_of,
    nibbles_of,
    split_nibbles,
    spread_reference,
)

STRIP = 16  # rows of one instruction
BLOCK = 128  # columns of the words that a lane loads at once: four instructions
TILE = 256  # columns of the metadata that a lane loads at once
LANES = 32
ZERO = 8  # the code of 0.0


class Sparse24Int4Weight(NamedTuple):
    """A 2:4 weight of 4-bit codes in the layout of the kernels; the shapes are in the module's docstring."""

    words: Tensor
    metadata: Tensor
    scale: Tensor


def from_sparse24_int4(weight: Tensor, weight_index: Tensor, weight_scale: Tensor) -> Sparse24Int4Weight:
    """Repack a stored weight.

    weight        uint8 [out, in / 4], two codes a byte, in a multiple of 8
    weight_index  uint8 [out, in / 8]
    weight_scale  bfloat16 or float16 [out, in / g], g one of 32, 64, 128

    Raises ValueError if sizes, dtypes or positions contradict the format: they come from somebody's file.
    """
    name = "from_sparse24_int4"
    refuse_unless(weight.dim() == 2, name, "weight", list(weight.shape), "a matrix [out, in / 4]")
    refuse_unless(weight_scale.dim() == 2, name, "weight_scale", list(weight_scale.shape), "a matrix [out, in / group]")
    check_dtype(name, "weight", weight, torch.uint8)
    check_dtype(name, "weight_scale", weight_scale, *FLOATS)
    out, columns, groups = weight.shape[0], 4 * weight.shape[1], weight_scale.shape[1]
    check_index(name, weight_index, out, columns)
    fits = groups > 0 and columns % groups == 0 and columns // groups in GROUPS
    refuse_unless(fits, name, "weight_scale", f"{groups} groups of {columns} columns", f"groups of {GROUPS} columns")
    check_shape(name, "weight_scale", weight_scale, out, groups)
    words = to_words(nibbles_of(weight))
    return Sparse24Int4Weight(words, to_metadata(nibbles_of(weight_index)), weight_scale.T.contiguous())


def to_sparse24_int4(weight: Sparse24Int4Weight, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stored tensors (weight, weight_index, weight_scale) again, bit for bit."""
    codes, nibbles = kept_codes(weight, in_features)
    return index_of(codes), index_of(nibbles), weight.scale.T.contiguous()


def kept_codes(weight: Sparse24Int4Weight, in_features: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in / 2] and positions, nibbles uint8 [out, in / 4]."""
    rows = weight.scale.shape[1]
    codes, nibbles = from_words(weight.words), from_metadata(weight.metadata)
    return codes[:rows, : in_features // 2].contiguous(), nibbles[:rows, : in_features // 4].contiguous()


def dequantize_reference(weight: Sparse24Int4Weight, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(code - 8) * scale in `dtype`, zeros where nothing is stored, [out, in]; float32 holds every product exactly."""
    codes, nibbles = kept_codes(weight, in_features)
    whole = spread_reference(codes.to(dtype) - ZERO, nibbles)
    return whole * weight.scale.T.repeat_interleave(in_features // weight.scale.shape[0], 1).to(dtype)


def to_words(codes: Tensor) -> Tensor:
    """uint8 [out, in / 2] -> int32 [blocks, strips, 32, 4]."""
    rows, kept = codes.shape
    padded = pad(codes ^ ZERO, (0, -kept % (BLOCK // 2), 0, -rows % STRIP))
    strip, h, g, block, s, q, t, v = range(8)
    split = padded.reshape(len(padded) // STRIP, 2, 8, padded.shape[1] // (BLOCK // 2), 4, 2, 4, 2)
    return gather_nibbles(split.permute(block, strip, g, t, s, v, q, h).flatten(5), torch.int32).flatten(2, 3)


def from_words(words: Tensor) -> Tensor:
    """The reverse of `to_words`, with the rows and columns that fill up."""
    blocks, strips = words.shape[:2]
    nibbles = split_nibbles(words, 8).view(blocks, strips, 8, 4, 4, 2, 2, 2)
    block, strip, g, t, s, v, q, h = range(8)
    return nibbles.permute(strip, h, g, block, s, q, t, v).reshape(strips * STRIP, -1) ^ ZERO


def to_metadata(nibbles: Tensor) -> Tensor:
    """uint8 [out, in / 4] -> int32 [tiles, strips, 32, 4]."""
    rows, fours = nibbles.shape
    padded = pad(nibbles, (0, -fours % (TILE // 4), 0, -rows % STRIP), value=BOTH_LOWEST)
    strip, h, g, tile, p, u, q, i = range(8)
    split = padded.reshape(len(padded) // STRIP, 2, 8, padded.shape[1] // (TILE // 4), 4, 2, 2, 4)
    return gather_nibbles(split.permute(tile, strip, g, u, q, p, h, i).flatten(6), torch.int32).flatten(2, 4)


def from_metadata(metadata: Tensor) -> Tensor:
    """The reverse of `to_metadata`, with the rows and columns that fill up."""
    tiles, strips = metadata.shape[:2]
    nibbles = split_nibbles(metadata, 8).view(tiles, strips, 8, 2, 2, 4, 2, 4)
    tile, strip, g, u, q, p, h, i = range(8)
    return nibbles.permute(strip, h, g, tile, p, u, q, i).reshape(strips * STRIP, -1)
