"""AWQ: scale up the input channels that matter before rounding, and undo it in the layer that makes them.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978. For a producer (a norm, or a linear)
whose output feeds consumers W, any s > 0 leaves the model unchanged:

    W x = (W diag(s)) (diag(s)⁻¹ x)

The producer absorbs diag(s)⁻¹. Rounding W diag(s) instead of W makes the error of channels with large s smaller.
Candidates come from a grid over r, with x the root mean square of each input and w the mean relative size of each
weight column (the paper's mean of |x| is replaced by the RMS, which the Gram matrix holds already):

    s = x^r          and          s = x^r / w^(1-r)

Every second r is tried, and then the neighbours of the best. The error of a candidate needs no forward pass: with G the
mean of x xᵀ and D = Q(W diag(s)) diag(s)⁻¹ - W it is tr(D G Dᵀ), summed over the consumers. After scaling, the range of
every group is searched by the same error with the group's own block of G (the paper's clipping).
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

from pydantic import Field

from llmcompress.grid import row_chunks, snap
from llmcompress.lazy import Tensor, torch
from llmcompress.methods.base import IntMethod, required
from llmcompress.stats import InputGram, Statistics
from llmcompress.weight import CompressedWeight

FLOOR = 1e-4  # of the mean: a dead channel must not set the normalization of all others


class AWQ(IntMethod):
    """Options of `method: awq`."""

    grid_points: int = Field(20, ge=1, le=200, description="values of r between 0 and 1")
    duo: bool = Field(True, description="also try scales that look at the weights")
    clip: bool = Field(True, description="search the range of each group")
    search_rows: int = Field(128, ge=1, description="weight rows, evenly spaced, that candidates are judged on")
    needs: ClassVar[Statistics | None] = InputGram
    passes: ClassVar[float] = 400.0
    rescales: ClassVar[bool] = True

    @property
    def products(self) -> float:
        """One of rows x in x in for every candidate, of which half are tried, on a sample of the rows."""
        return 2.0 * self.grid_points

    def compress(
        self, weight: Tensor, statistics: Tensor | None, dtype: "torch.dtype", mask: Tensor | None = None
    ) -> CompressedWeight:
        """Search the ranges of weight [out, in] float32, already scaled, as is gram [in, in]; then round."""
        gram = required(self, statistics)
        blocks = diagonal_blocks(gram, self.group(weight.shape[1])) if self.clip else None
        grid = self.fit(weight, dtype, search=self.clip, importance=blocks)
        return CompressedWeight.on_grid(grid.encode(weight), grid, mask)

    def link_scale(self, weights: list[Tensor], gram: Tensor, index: Tensor, dtype: "torch.dtype") -> Tensor:
        """The scale with the least output error, one factor per producer row.

        weights: the consumers, [out, in] float32 each.  gram: [in, in] of their shared input.
        index: [in] int64, the producer's row that makes each input column; several columns may share a row (query
        heads that share a value head), and then share its factor.
        returns: s [rows] float32 > 0, identity among the candidates.
        """
        stacked = torch.cat(weights)
        stacked = stacked[:: -(-len(stacked) // self.search_rows)]  # a scale is shared by all rows: a sample is enough
        rows = int(index.max()) + 1
        rounded = gram.bfloat16()  # rounding to 4 bits leaves errors that hardly cancel in G: this orders them well
        best_scale = torch.ones(rows, device=gram.device)
        best = self._error(stacked, rounded, best_scale[index], dtype)
        for scale_of, last in self._candidates(stacked, gram, index, rows):

            def error(i: int, scale_of: Callable[[int], Tensor] = scale_of) -> float:
                return self._error(stacked, rounded, scale_of(i)[index], dtype)

            for i, found in coarse_to_fine(error, last).items():
                if found < best:
                    best, best_scale = found, scale_of(i)
        return best_scale

    def _candidates(
        self, w: Tensor, gram: Tensor, index: Tensor, rows: int
    ) -> Iterator[tuple[Callable[[int], Tensor], int]]:
        """Families of candidate scales [rows]: one for each i from 1 to the number beside it, r = i / grid_points."""
        x = per_row(gram.diagonal(), index, rows).sqrt()
        groups = w.abs().reshape(len(w), -1, self.group(w.shape[1]))
        relative = groups / groups.amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        size = per_row(relative.reshape(w.shape).mean(0), index, rows)
        x, size = (t.clamp(min=FLOOR * float(t.mean()) or 1.0) for t in (x, size))
        yield lambda i: normalized(x ** (i / self.grid_points)), self.grid_points
        if self.duo:
            yield (lambda i: normalized((x * size) ** (i / self.grid_points) / size)), self.grid_points - 1

    def _error(self, w: Tensor, gram: Tensor, scale: Tensor, dtype: "torch.dtype") -> float:
        """tr(D G Dᵀ) for D = Q(w diag(scale)) diag(scale)⁻¹ - w and gram G [in, in] in bfloat16."""
        group, total = self.group(w.shape[1]), 0.0
        for rows in row_chunks(w):
            scaled = w[rows] * scale
            grid = self.fit(scaled, dtype, search=False)
            snapped = snap(scaled.reshape(len(scaled), -1, group), grid.scale.float(), grid.zero.float(), self.bits)
            delta = snapped.reshape(scaled.shape).sub_(scaled).div_(scale)
            total += float((delta.bfloat16() @ gram).float().mul_(delta).sum())
        return total


def coarse_to_fine(error: Callable[[int], float], last: int) -> dict[int, float]:
    """Errors at every second of 1 .. last, and at the neighbours of the best of these."""
    found = {i: error(i) for i in range(2, last + 1, 2)}
    middle = min(found, key=lambda i: found[i], default=0)
    return found | {i: error(i) for i in (middle - 1, middle + 1) if 1 <= i <= last}


def per_row(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Mean of x [in] over the columns that come from each producer row; [rows]."""
    total = torch.zeros(rows, device=x.device).index_add_(0, index, x)
    count = torch.zeros(rows, device=x.device).index_add_(0, index, torch.ones_like(x))
    return total / count.clamp(min=1)


def normalized(s: Tensor) -> Tensor:
    """s with the geometric mean of its extremes at 1, so that neither side of the link overflows."""
    return s / (s.max() * s.min()).sqrt()


def diagonal_blocks(gram: Tensor, group: int) -> Tensor:
    """The [groups, group, group] blocks on the diagonal of gram [in, in]."""
    n = len(gram) // group
    return gram.reshape(n, group, n, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
