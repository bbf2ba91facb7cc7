"""SparseGPT: prune one column after another and let the columns not done yet absorb each error.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv:2301.00774, algorithm 1; the sweep itself is in `sweep.py`. What goes is chosen when its columns are reached, with
the weights as earlier errors have left them, by the loss that removing one weight costs:

    S_ij = w_ij² / U_jj²

n:m chooses among every m columns; unstructured patterns among BLOCK columns at a time, with counts that add up exactly.
"""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.mask import Pattern, first_of, kept
from llmcompress.methods.base import Pruner, required
from llmcompress.methods.sweep import SWEPT, Sweep, reversed_factor
from llmcompress.shelf import HALVES, Shelf
from llmcompress.stats import InputGram, Statistics
from llmcompress.weight import CompressedWeight

BLOCK = 128  # columns whose weights compete for their place, where the pattern leaves it open


class SparseGPT(Pruner):
    """Options of `method: sparsegpt`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights, or two of four",
        HALVES,
        "exact counts of each pattern; masks survive every later step; better than Wanda",
    )

    act_order: bool = Field(False, description="columns with large inputs first, whole groups of m together")
    damp: float = Field(0.01, gt=0, lt=1, description="added to the diagonal, relative to its mean")
    needs: ClassVar[Statistics | None] = InputGram
    passes: ClassVar[float] = 60.0

    @property
    def products(self) -> float:
        """The sweep, and its factor."""
        return 2.0

    def compress(
        self, weight: Tensor, statistics: Tensor | None, dtype: "torch.dtype", mask: Tensor | None = None
    ) -> CompressedWeight:
        """weight [out, in] float32, gram [in, in] float32. Raises NumericalError if gram stays singular."""
        gram, pattern = required(self, statistics), self.prunes
        dead = gram.diagonal() == 0
        order = column_order(gram.diagonal(), pattern.m, by_size=self.act_order)
        factor = reversed_factor(gram, order, self.damp)
        mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        size, parts = chunk_rows(weight, pattern), []
        for rows, allowed in zip(weight.split(size), mask.split(size), strict=True):
            w = rows.masked_fill(dead, 0).T.contiguous()[order]
            choice = MaskChoice(pattern, self.share, allowed.T.contiguous()[order])
            values = torch.empty_like(w)

            def allow(j: int, column: Tensor, keep: Tensor = choice.keep, values: Tensor = values) -> Tensor:
                values[j] = column * keep[j]
                return values[j]

            Sweep(w, factor, allow, choice.select, choice.block).run()
            back = order.argsort()
            parts.append(CompressedWeight(values[back].T.to(dtype).contiguous(), mask=choice.keep[back].T.contiguous()))
        return CompressedWeight.join(parts)

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """What removing one weight alone costs, for ranking matrices."""
        return saliency(weight, required(self, statistics), self.damp)


@dataclass(frozen=True, slots=True)
class MaskChoice:
    """The mask of some rows, narrowed block by block of columns."""

    pattern: Pattern
    share: float  # of the weights that go
    keep: Tensor  # [in, out] bool, in the order of the sweep; what is masked from the start goes first

    @property
    def block(self) -> int:
        """Columns that are chosen among at once."""
        m = self.pattern.m
        return m if self.pattern.kind == "n:m" else -(-BLOCK // m) * m

    def select(self, here: slice, w: Tensor, u: Tensor) -> None:
        """Choose among the columns `here` with weights w [columns, out] and U_jj u [columns]."""
        gone = 0 if self.pattern.kind == "block" else -1  # below every score, but nothing in the sum of a block
        score = (w / u[:, None]).square_().masked_fill_(~self.keep[here], gone).T  # [out, columns]
        pattern, out = self.pattern, score.shape[0]
        if pattern.kind == "n:m":
            best = first_of(score.reshape(-1, pattern.m), pattern.n).reshape(score.shape)
        elif pattern.kind == "layer":
            count = kept(here.stop * out, self.share) - kept(here.start * out, self.share)
            best = first_of(score.reshape(1, -1), count).reshape(score.shape)
        else:
            runs = score.reshape(out, -1, pattern.m).sum(-1)
            count = kept(here.stop // pattern.m, self.share) - kept(here.start // pattern.m, self.share)
            best = first_of(runs, count).repeat_interleave(pattern.m, 1)
        self.keep[here] &= best.T


def saliency(weight: Tensor, gram: Tensor, damp: float) -> Tensor:
    """What removing one weight alone costs if all others may adapt: w² / [G⁻¹]_jj, [out, in] like weight."""
    factor = reversed_factor(gram, torch.arange(len(gram), device=gram.device), damp)
    return weight.square() / factor.square().sum(0).flip(0)  # [G⁻¹]_jj is the squared norm of column j of U


def column_order(size: Tensor, together: int, *, by_size: bool) -> Tensor:
    """Column numbers [in], by falling `size` [in] if wanted; every `together` neighbours stay neighbours."""
    if not by_size:
        return torch.arange(len(size), device=size.device)
    groups = size.reshape(-1, together).sum(1).argsort(descending=True, stable=True)
    return (groups[:, None] * together + torch.arange(together, device=size.device)).flatten()


def chunk_rows(weight: Tensor, pattern: Pattern) -> int:
    """Rows that are swept together: as few as memory wants, all of them where the count is over the matrix."""
    return len(weight) if pattern.kind == "layer" else max(1, SWEPT // weight.shape[1])
