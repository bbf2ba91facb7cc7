"""Stripes packed: a matrix of which only whole stripes stay, and its product, which skips all others.

    y[t, i] = Σ over stripes s of row i that stay   x[t, columns of s] · w_s

A stripe is a run of neighbouring input columns of one output row, as `techniques/skeleton.py` prunes them. Stored are
the weights of those that stay, and for each its row and its place there. The product takes as many multiplications as
there are such weights, in plain torch: it says what a kernel has to compute, and is no faster than the dense product of
a tuned library, so no model computes with it.
"""

from dataclasses import dataclass

from llmcompress.lazy import Tensor, torch

PART = 4096  # stripes whose inputs are gathered at once


@dataclass(frozen=True, slots=True)
class PackedStripes:
    """The stripes of a weight [rows, columns] that are not zero, n of them, row after row."""

    weight: Tensor  # [n, stripe]
    row: Tensor  # [n] int64: the output row of each
    place: Tensor  # [n] int64: which stripe of its row it is, from 0
    shape: tuple[int, int]  # (rows, columns)


def pack_stripes(weight: Tensor, stripe: int) -> PackedStripes:
    """The stripes of weight [rows, columns] with any number that is not zero.

    Raises ValueError if the columns are not made of such stripes.
    """
    rows, columns = weight.shape
    if columns % stripe:
        raise ValueError(f"stripe: {columns} columns are not made of stripes of {stripe}; use a divisor")
    stripes = weight.reshape(rows, columns // stripe, stripe)
    row, place = (stripes != 0).any(-1).nonzero(as_tuple=True)
    return PackedStripes(stripes[row, place], row, place, (rows, columns))


def stripes_product(x: Tensor, packed: PackedStripes) -> Tensor:
    """x [..., columns] times the transposed weight: [..., rows], in the dtype of x, which is that of the weight."""
    rows, columns = packed.shape
    stripe = packed.weight.shape[1]
    inputs = x.reshape(-1, columns // stripe, stripe)
    y = torch.zeros(len(inputs), rows, dtype=x.dtype, device=x.device)
    for start in range(0, len(packed.row), PART):
        part = slice(start, start + PART)
        sums = (inputs[:, packed.place[part]] * packed.weight[part]).sum(-1)
        y.index_add_(1, packed.row[part], sums)
    return y.reshape(*x.shape[:-1], rows)
