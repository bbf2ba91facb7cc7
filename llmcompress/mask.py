"""Masks: which weights stay. Counts are exact: the best by score stay, ties go to the first, no threshold is involved.

A pattern says where the count is exact:

    "row"       in every output row: kept(in, sparsity) of its weights
    "layer"     in the matrix as a whole: kept(out * in, sparsity)
    "2:4"       n of every m neighbouring input columns stay, here 2 of 4; the sparsity follows
    "block:16"  in every output row, and whole runs of 16 neighbouring input columns stay or go together

Masks are boolean, True where a weight stays.
"""

import re
from dataclasses import dataclass
from typing import Literal

from llmcompress.errors import NumericalError
from llmcompress.lazy import Tensor, torch

Kind = Literal["row", "layer", "n:m", "block"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where zeros may be."""

    kind: Kind
    n: int = 1  # of every m neighbouring columns stay; "n:m" only
    m: int = 1  # columns that belong together: of "n:m", or of one block

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """From its text in a recipe. Raises ValueError."""
        if text in ("row", "layer"):
            return cls("row" if text == "row" else "layer")
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = int(found[1]), int(found[2])
            if not 0 < n < m:
                raise ValueError(f"{text!r}: n:m keeps n of every m columns, with 0 < n < m")
            return cls("n:m", n, m)
        if (found := re.fullmatch(r"block:(\d+)", text)) and int(found[1]) > 1:
            return cls("block", m=int(found[1]))
        raise ValueError(f"unknown pattern {text!r}; known: row, layer, n:m such as 2:4, block:n such as block:16")

    def __str__(self) -> str:
        """The text that `parse` takes."""
        return {"n:m": f"{self.n}:{self.m}", "block": f"block:{self.m}"}.get(self.kind, self.kind)

    def stay(self, rows: int, columns: int, sparsity: float) -> int:
        """How many weights of [rows, columns] stay, exactly."""
        if self.kind == "layer":
            return kept(rows * columns, sparsity)
        if self.kind == "n:m":
            return rows * columns // self.m * self.n
        return rows * kept(columns // self.m, sparsity) * self.m


def kept(total: int, sparsity: float) -> int:
    """How many of `total` weights stay at a sparsity in [0, 1)."""
    return total - round(total * sparsity)


def keep_best(score: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask [out, in] that keeps the weights of the highest score [out, in].

    sparsity: share to remove, in [0, 1); "n:m" has its own. Raises ValueError if `m` does not divide the row,
    NumericalError if a score is NaN.
    """
    rows, columns = score.shape
    if columns % pattern.m:
        raise ValueError(f"pattern {pattern} needs rows that {pattern.m} divides, found {columns} input columns")
    if bool(score.isnan().any()):
        raise NumericalError("a score is NaN; the weights or the statistics are damaged")
    if pattern.kind == "layer":
        return first_of(score.reshape(1, -1), kept(score.numel(), sparsity)).reshape(rows, columns)
    if pattern.kind == "n:m":
        return first_of(score.reshape(-1, pattern.m), pattern.n).reshape(rows, columns)
    blocks = score.reshape(rows, -1, pattern.m).sum(-1)
    return first_of(blocks, kept(blocks.shape[1], sparsity)).repeat_interleave(pattern.m, 1)


def first_of(score: Tensor, count: int) -> Tensor:
    """Mask [rows, n] of the `count` highest scores in each row; of equal ones the first."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def follows(mask: Tensor, pattern: Pattern) -> bool:
    """Whether a mask [out, in] could be read as this pattern: at most n of m, whole blocks, equal rows."""
    rows, columns = mask.shape
    if columns % pattern.m:
        return False
    if pattern.kind == "n:m":
        return bool((mask.reshape(-1, pattern.m).sum(1) <= pattern.n).all())
    if pattern.kind == "block":
        whole = mask.reshape(rows, -1, pattern.m)
        return bool((whole == whole[..., :1]).all())
    return pattern.kind == "layer" or len(mask.sum(1).unique()) == 1
