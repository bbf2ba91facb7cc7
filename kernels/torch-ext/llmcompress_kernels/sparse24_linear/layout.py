"""Where a 2:4 weight lies: from the tensors of the `sparse24` format to those of the kernels, and back exactly.

Stored: kept weights [out, in / 2] in the order of their columns, and their positions, four a byte [out, in / 8]. For
the kernels of a weight [out, in]:

    values     bf16 or fp16  [ceil(in / 64), out, 32]   plane p of row n is 64 columns (64 bytes): kept weights 2 j and
                                                        2 j + 1 belong to columns 64 p + 4 j .. 64 p + 4 j + 3
    positions  int16         [ceil(in / 256), out, 16]  nibble i of word j of tile t has first | second << 2 of columns
                                                        256 t + 64 i + 4 j .. 256 t + 64 i + 4 j + 3

So one thread that reads 16 bytes of a plane has four fours of columns, and the words of positions that it has for them
serve it in the next three planes too. Rows of a plane follow each other: a program that makes 64 outputs reads one run
of 4096 bytes. Columns beyond `in`, which exist if it is no multiple of 64 or 256, hold zeros; kernels do not read x
there. It is 9 bits per weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import FLOATS, check_dtype, refuse_unless
from ..stored24 import check_index, gather_nibbles, index_of, nibbles_of, split_nibbles, spread_reference

WIDTH = 16  # fours of columns of a plane
PLANE = 4 * WIDTH  # columns
PLANES = 4  # of a tile: nibbles of a word of positions
TILE = PLANES * PLANE  # columns


class Sparse24Weight(NamedTuple):
    """A 2:4 weight in the layout of the kernels; the shapes are in the module's docstring."""

    values: Tensor
    positions: Tensor


def from_sparse24(weight: Tensor, weight_index: Tensor) -> Sparse24Weight:
    """Repack a stored weight.

    weight        bfloat16 or float16 [out, in / 2], in a multiple of 8
    weight_index  uint8 [out, in / 8]

    Raises ValueError if sizes, dtypes or positions contradict the format: they come from somebody's file.
    """
    name = "from_sparse24"
    refuse_unless(weight.dim() == 2, name, "weight", list(weight.shape), "a matrix [out, in / 2]")
    check_dtype(name, "weight", weight, *FLOATS)
    check_index(name, weight_index, weight.shape[0], 2 * weight.shape[1])
    return Sparse24Weight(to_planes(weight), to_tiles(nibbles_of(weight_index)))


def to_sparse24(weight: Sparse24Weight, in_features: int) -> tuple[Tensor, Tensor]:
    """The stored tensors (weight, weight_index) again, bit for bit."""
    kept = weight.values.transpose(0, 1).flatten(1)[:, : in_features // 2].contiguous()
    return kept, index_of(from_tiles(weight.positions, in_features))


def expand_reference(weight: Sparse24Weight, in_features: int) -> Tensor:
    """The weight [out, in], zeros where nothing is stored."""
    kept, index = to_sparse24(weight, in_features)
    return spread_reference(kept, nibbles_of(index))


def to_planes(kept: Tensor) -> Tensor:
    """[out, in / 2] -> [planes, out, 32]."""
    padded = pad(kept, (0, -kept.shape[1] % (PLANE // 2)))
    return padded.reshape(len(kept), padded.shape[1] // (PLANE // 2), PLANE // 2).transpose(0, 1).contiguous()


def to_tiles(nibbles: Tensor) -> Tensor:
    """uint8 [out, in / 4] -> int16 [tiles, out, 16]."""
    padded = pad(nibbles, (0, -nibbles.shape[1] % (TILE // 4)))
    planes = padded.reshape(len(nibbles), padded.shape[1] // (TILE // 4), PLANES, WIDTH)
    return gather_nibbles(planes.transpose(2, 3), torch.int16).transpose(0, 1).contiguous()


def from_tiles(index: Tensor, in_features: int) -> Tensor:
    """The reverse of `to_tiles`."""
    nibbles = split_nibbles(index.transpose(0, 1), PLANES).transpose(2, 3)
    return nibbles.flatten(1)[:, : in_features // 4].contiguous()
