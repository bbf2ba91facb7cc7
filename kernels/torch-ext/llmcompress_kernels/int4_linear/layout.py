"""Where the bits of an int4 weight lie: from the words of `pack-quantized` to those of the kernels, and back exactly.

Stored (compressed-tensors): a word of row n holds the codes of eight neighbouring columns, lowest nibble first. A
kernel that reads such words has to shuffle either weights or activations before it can multiply. So the kernels' words
hold columns that are 16 apart. For a weight [out, in] with groups of g columns:

    words  int32  [ceil(in / 128), out, 16]   tile t of row n is 128 columns, in 16 words that lie together (64 bytes);
                                              nibble i of word j is the code of column 128 t + 16 i + j
    scale  bf16 or fp16  [in / g, out]
    zero   uint8  [in / g, out]               the code of 0.0; absent means 8 everywhere

    weight[n, k] = (code[n, k] - zero[k // g, n]) * scale[k // g, n]

The nibbles i of a tile row are a *plane*: 16 neighbouring columns, one step of a tensor core, and never of two groups.
Rows of a tile follow each other, so a program that makes 64 outputs reads one run of 4096 bytes. Columns beyond `in`,
which exist if it is no multiple of 128, have code 0; kernels multiply them by zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATS, check_dtype, check_shape, refuse_unless

GROUPS = (32, 64, 128)  # columns per scale
PLANES = 8  # nibbles of a word
WIDTH = 16  # words per row and tile
TILE = PLANES * WIDTH  # columns


class Int4Weight(NamedTuple):
    """An int4 weight in the layout of the kernels; the shapes are in the module's docstring."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None


def from_pack_quantized(packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int) -> Int4Weight:
    """Repack a stored weight.

    packed      weight_packed: int32 [out, in / 8]
    scale       weight_scale: bfloat16 or float16 [out, in / g], g one of 32, 64, 128
    zero_point  weight_zero_point: int32 [ceil(out / 8), in / g], or None on a symmetric grid

    Raises ValueError if sizes or dtypes contradict each other: they come from somebody's file.
    """
    name = "from_pack_quantized"
    refuse_unless(packed.dim() == 2 and scale.dim() == 2, name, "packed, scale", "not both matrices", "two matrices")
    out, groups = scale.shape
    fits = groups > 0 and in_features % groups == 0 and in_features // groups in GROUPS
    refuse_unless(fits, name, "scale", f"of {groups} groups for {in_features} columns", f"groups of {GROUPS} columns")
    check_dtype(name, "packed", packed, torch.int32)
    check_dtype(name, "scale", scale, *FLOATS)
    check_shape(name, "packed", packed, out, in_features // PLANES)
    words = to_tiles(from_words(packed, in_features))
    if zero_point is None:
        return Int4Weight(words, scale.T.contiguous(), None)
    check_dtype(name, "zero_point", zero_point, torch.int32)
    check_shape(name, "zero_point", zero_point, -(-out // PLANES), groups)
    return Int4Weight(words, scale.T.contiguous(), from_words(zero_point.T, out))


def to_pack_quantized(weight: Int4Weight, in_features: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The stored tensors (packed, scale, zero_point) again, bit for bit."""
    packed = to_words(from_tiles(weight.words, in_features))
    zero_point = None if weight.zero is None else to_words(weight.zero).T.contiguous()
    return packed, weight.scale.T.contiguous(), zero_point


def from_words(words: Tensor, count: int) -> Tensor:
    """Codes in stored order: int32 [rows, ceil(count / 8)] -> uint8 [rows, count]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 0xF).to(torch.uint8).flatten(1)[:, :count].contiguous()


def to_words(codes: Tensor) -> Tensor:
    """The reverse of `from_words`; nibbles beyond the last code are 0."""
    rows, count = codes.shape
    return gather(torch.nn.functional.pad(codes, (0, -count % PLANES)).view(rows, -1, PLANES), 2)


def to_tiles(codes: Tensor) -> Tensor:
    """uint8 [out, in] -> the kernels' words, int32 [tiles, out, 16]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % TILE))
    return gather(padded.view(rows, -1, PLANES, WIDTH), 2).transpose(0, 1).contiguous()


def from_tiles(words: Tensor, in_features: int) -> Tensor:
    """The reverse of `to_tiles`: uint8 [out, in]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[:, None]
    planes = (words[:, :, None, :] >> shifts) & 0xF
    return planes.to(torch.uint8).transpose(0, 1).flatten(1)[:, :in_features].contiguous()


def gather(codes: Tensor, dim: int) -> Tensor:
    """Eight codes along `dim` become one int32, the first in its lowest bits."""
    words = torch.zeros_like(codes.select(dim, 0), dtype=torch.int32)
    for i in range(PLANES):
        words |= codes.select(dim, i).to(torch.int32) << (4 * i)
    return words
