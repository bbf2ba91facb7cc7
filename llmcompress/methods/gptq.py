"""GPTQ: quantize one column after another and let the columns not done yet absorb each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1; the sweep itself, shared with SparseGPT, is in `sweep.py`. With G the mean of x xᵀ over
calibration tokens, and s and z the scale and the zero of the group that column j is in:

    q_j = s (clamp(round(w_j / s) + z, 0, 2^bits - 1) - z)          e = (w_j - q_j) / U_jj          G⁻¹ = Uᵀ U
    w_k <- w_k - e U_jk          for every column k after j

Two choices differ from the paper, both so that stock engines can use the file as it is:
* Columns go in the order of falling G_jj (activation order), but groups stay neighbouring columns of the original
  matrix and their ranges are fixed beforehand from the original weights. So the file needs no `g_idx`.
* Ranges are searched under the weight of diag(G) instead of taken from the extremes, which small models need.

Masked weights are zeros before and after; zero is on every grid. Errors pass through them: what one would take up moves
on to the columns after it, which leaves less output error than to skip masked weights in every update. With a
`pattern` the mask is chosen in the same sweep, with SparseGPT's score, so that one factor serves both and errors of
pruning and rounding are compensated together.
"""

from typing import ClassVar, Literal

from pydantic import Field

from llmcompress.grid import IntGrid
from llmcompress.lazy import Tensor, torch
from llmcompress.mask import Pattern
from llmcompress.methods.base import Budgeted, IntMethod, required
from llmcompress.methods.sparsegpt import MaskChoice, chunk_rows, column_order, saliency
from llmcompress.methods.sweep import Sweep, reversed_factor
from llmcompress.stats import InputGram, Statistics
from llmcompress.weight import CompressedWeight


class GPTQ(IntMethod, Budgeted):
    """Options of `method: gptq`."""

    range: Literal["minmax", "search"] = "search"
    act_order: bool | None = Field(
        None, description="large inputs first; left out: unless blocks of columns are pruned"
    )
    damp: float = Field(0.01, gt=0, lt=1, description="added to the diagonal, relative to its mean")
    pattern: str | None = Field(None, description="also prune: row, layer, global, n:m such as 2:4, or block:n")
    needs: ClassVar[Statistics | None] = InputGram

    @property
    def products(self) -> float:
        """The sweep, and its factor."""
        return 2.0

    @property
    def prunes(self) -> Pattern | None:
        """The pattern, if the mask is chosen here."""
        return None if self.pattern is None else Pattern.parse(self.pattern)

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """As SparseGPT's, for ranking matrices."""
        return saliency(weight, required(self, statistics), self.damp)

    def compress(
        self, weight: Tensor, statistics: Tensor | None, dtype: "torch.dtype", mask: Tensor | None = None
    ) -> CompressedWeight:
        """weight [out, in] float32, gram [in, in] float32. Raises NumericalError if gram stays singular."""
        gram, pattern = required(self, statistics), self.prunes
        diagonal = gram.diagonal()
        dead = diagonal == 0  # inputs that were always zero: any weight is right, zero is cheap
        # blocks of columns keep equal shares: sorted by size, loud ones would lose as many weights as quiet ones
        by_size = self.act_order if self.act_order is not None else pattern is None or pattern.kind == "n:m"
        order = column_order(diagonal, pattern.m if pattern else 1, by_size=by_size)
        factor = reversed_factor(gram, order, self.damp)
        parts, start = [], 0
        for rows in weight.split(chunk_rows(weight, pattern or Pattern("row"))):
            alive = rows.masked_fill(dead, 0)
            grid = self.fit(alive, dtype, search=self.range == "search", importance=diagonal)
            keep = None if mask is None else mask[start : start + len(rows)].T[order]
            if pattern and keep is None:
                keep = torch.ones_like(alive.T, dtype=torch.bool)
            parts.append(self._sweep(alive, grid, order, factor, keep, pattern))
            start += len(rows)
        return CompressedWeight.join(parts)

    def _sweep(
        self, weight: Tensor, grid: IntGrid, order: Tensor, factor: Tensor, keep: Tensor | None, pattern: Pattern | None
    ) -> CompressedWeight:
        """The codes of algorithm 1 for some rows; keep [in, out] bool in order is narrowed to the pattern."""
        w = weight.T.contiguous()[order]
        scale, zero = (t.float().T.contiguous() for t in (grid.scale, grid.zero))  # [groups, out]
        groups = (order // grid.group).tolist()
        codes, top = torch.empty_like(w, dtype=torch.uint8), 2**grid.bits - 1

        def allow(j: int, column: Tensor) -> Tensor:
            step, middle = scale[groups[j]], zero[groups[j]]
            code = (column / step).round_().add_(middle).clamp_(0, top)
            if keep is not None:
                code = torch.where(keep[j], code, middle)
            codes[j] = code
            return code.sub_(middle).mul_(step)

        if pattern and keep is not None:
            choice = MaskChoice(pattern, self.share, keep)
            Sweep(w, factor, allow, choice.select, choice.block).run()
        else:
            Sweep(w, factor, allow).run()
        back = order.argsort()
        found = None if keep is None else keep[back].T.contiguous()
        return CompressedWeight.on_grid(codes[back].T.contiguous(), grid, found)
