"""Stored 2:4 weights, in torch: two of every four neighbouring columns are kept, and for each its position 0 .. 3.

In a checkpoint four positions are a byte, the first in its lowest bits, so every four columns have a nibble of that
byte: first | second << 2, with first < second. A four with fewer than two weights that are not zero keeps zeros too, at
positions of the writer's choice. The layouts of all operators on 2:4 weights are made of these nibbles.
"""

import torch
from torch import Tensor

from .checks import check_dtype, check_shape, refuse_unless

BOTH_LOWEST = 0 | 1 << 2  # the nibble of columns that exist only to fill a tile


def nibbles_of(index: Tensor) -> Tensor:
    """uint8 [out, in / 8], as stored -> uint8 [out, in / 4], one nibble for every four columns."""
    return torch.stack([index & 15, index >> 4], dim=-1).flatten(1)


def index_of(nibbles: Tensor) -> Tensor:
    """The reverse of `nibbles_of`."""
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def positions_of(nibbles: Tensor) -> Tensor:
    """uint8 [out, in / 4] -> int64 [out, in / 4, 2]."""
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()


def spread_reference(kept: Tensor, nibbles: Tensor) -> Tensor:
    """kept [out, in / 2] at its columns of [out, in], zeros elsewhere."""
    rows, fours = nibbles.shape
    full = kept.new_zeros(rows, fours, 4)
    return full.scatter_(-1, positions_of(nibbles), kept.reshape(rows, fours, 2)).flatten(1)


def check_index(operator: str, index: Tensor, rows: int, columns: int) -> None:
    """Raises ValueError unless these are positions of a weight [rows, columns], rising within every four."""
    refuse_unless(columns % 8 == 0, operator, "weight", f"of {columns} columns", "a multiple of 8 columns")
    check_dtype(operator, "weight_index", index, torch.uint8)
    check_shape(operator, "weight_index", index, rows, columns // 8)
    first, second = positions_of(nibbles_of(index)).unbind(-1)
    falling = first >= second
    if falling.any():
        row, four = falling.nonzero()[0].tolist()
        found = f"{int(first[row, four])}, {int(second[row, four])} at row {row}, columns {4 * four} to {4 * four + 3}"
        refuse_unless(False, operator, "weight_index", found, "rising positions in every four")


def gather_nibbles(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """The last dimension becomes one integer of `dtype`, its first nibble in the lowest bits."""
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=nibbles.device)
    for i in range(nibbles.shape[-1]):
        words |= nibbles[..., i].to(torch.int32) << (4 * i)
    return words.to(dtype)


def split_nibbles(words: Tensor, count: int) -> Tensor:
    """The reverse of `gather_nibbles`: uint8 [..., count]."""
    shifts = torch.arange(0, 4 * count, 4, dtype=torch.int32, device=words.device)
    return ((words.to(torch.int32)[..., None] >> shifts) & 0xF).to(torch.uint8)
