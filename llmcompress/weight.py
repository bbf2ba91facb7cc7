"""What a method hands to a format.

A method decides *which numbers* a layer will use; a format decides *how they are stored*. This record is all they
share. `values` is the truth: whatever the format does, unpacking must give back `values` bit for bit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmcompress.grid import IntGrid
from llmcompress.lazy import Tensor, torch
from llmcompress.mask import Pattern
from llmcompress.stats import bfloat16_products

PRODUCT = 1 << 24  # elements of a temporary product
PANEL = 1024  # columns of one


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a compressed weight before it is made: its grid, and where its zeros may be."""

    bits: int | None = None  # None: not on an integer grid
    group_size: int | Literal["row"] = "row"  # input columns per scale
    symmetric: bool = True
    pattern: Pattern | None = None  # None: not pruned
    sparsity: float = 0.0  # share removed, where the pattern leaves it open

    @classmethod
    def after(cls, kinds: Sequence["Kind"]) -> "Kind":
        """Of a weight after several steps: the last grid, and the last pattern."""
        grid = next((kind for kind in reversed(kinds) if kind.bits), cls())
        pruned = next((kind for kind in reversed(kinds) if kind.pattern), cls())
        return replace(grid, pattern=pruned.pattern, sparsity=pruned.sparsity)

    def group(self, columns: int) -> int:
        """Columns per scale for a weight of `columns` input features."""
        return columns if self.group_size == "row" else int(self.group_size)


@dataclass(frozen=True, slots=True)
class CompressedWeight:
    """One weight matrix after a method."""

    values: Tensor  # [out, in] in the dtype of the checkpoint: what the layer computes with
    codes: Tensor | None = None  # [out, in] uint8: position of each value on `grid`
    grid: IntGrid | None = None  # how codes become values
    mask: Tensor | None = None  # [out, in] bool, True where a weight stays; values are zero elsewhere

    @classmethod
    def on_grid(cls, codes: Tensor, grid: IntGrid, mask: Tensor | None = None) -> "CompressedWeight":
        """The weight whose values are `codes` [out, in] uint8 decoded by `grid`."""
        return cls(values=grid.decode(codes), codes=codes, grid=grid, mask=mask)

    def lost_zeros(self) -> int:
        """How many masked weights are not zero: none, or a method is wrong."""
        return 0 if self.mask is None else int((self.values != 0).logical_and_(~self.mask).sum())

    @classmethod
    def join(cls, parts: Sequence["CompressedWeight"]) -> "CompressedWeight":
        """Stack weights on grids of the same kind along the output dimension."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]

        def stack(tensors: Iterable[Tensor | None]) -> Tensor | None:
            found = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(found) if found else None

        grid = first.grid
        if grid is not None:
            grids = [part.grid for part in parts if part.grid is not None]
            grid = replace(grid, scale=torch.cat([g.scale for g in grids]), zero=torch.cat([g.zero for g in grids]))
        return cls(
            values=torch.cat([part.values for part in parts]),
            codes=stack(part.codes for part in parts),
            grid=grid,
            mask=stack(part.mask for part in parts),
        )

    def split(self, rows: Sequence[int]) -> list["CompressedWeight"]:
        """Undo a stacking of weights along the output dimension; `rows` are the heights, in order."""
        parts, start = [], 0
        for count in rows:
            here = slice(start, start + count)
            parts.append(
                CompressedWeight(
                    values=self.values[here],
                    codes=None if self.codes is None else self.codes[here],
                    grid=None
                    if self.grid is None
                    else replace(self.grid, scale=self.grid.scale[here], zero=self.grid.zero[here]),
                    mask=None if self.mask is None else self.mask[here],
                )
            )
            start += count
        return parts


def relative_error(weight: Tensor, values: Tensor, gram: Tensor | None = None) -> float:
    """Share of a layer's output that compression changed: sqrt(tr(D G Dᵀ) / tr(W G Wᵀ)) with D = values - weight.

    weight, values: [out, in].  gram: [in, in], the mean of x xᵀ; None means the identity, so that the result is the
    relative Frobenius error of the weight itself. Returns 0.0 for a layer whose output is zero anyway. It is a figure
    for people, good to about three digits: matrix units may take the denominator in bfloat16, which is much faster.
    """
    w = weight.float()
    delta = values.float() - w
    if gram is None:
        lost, whole = delta.square().sum(), w.square().sum()
    else:
        lost = quadratic(delta, gram)
        with bfloat16_products():  # not for `lost`: a good method leaves errors that almost cancel in G
            whole = quadratic(w, gram)
    return float(torch.sqrt(lost.clamp(min=0) / whole)) if whole > 0 else 0.0


def quadratic(x: Tensor, gram: Tensor) -> Tensor:
    """tr(x G xᵀ) for x [rows, n] and G [n, n] symmetric: the mean squared output of x as a layer."""
    total, n = torch.zeros((), device=x.device), len(gram)
    for rows in x.split(max(1, PRODUCT // n)):
        for start in range(0, n, PANEL):  # what is right of a diagonal block counts twice, what is left of it not
            here, right = slice(start, start + PANEL), slice(start + PANEL, n)
            total += (rows[:, here] @ gram[here, here]).mul_(rows[:, here]).sum()
            total += 2 * (rows[:, here] @ gram[here, right]).mul_(rows[:, right]).sum()
    return total
