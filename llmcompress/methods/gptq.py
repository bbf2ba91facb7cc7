"""GPTQ: quantize one column after another and let the columns not done yet absorb each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1. With G the mean of x xᵀ and U the upper Cholesky factor of its inverse (G⁻¹ = Uᵀ U),
column j of the weight is rounded to q_j and every later column k moves by

    e = (w_j - q_j) / U_jj          w_k <- w_k - e U_jk

Two choices differ from the paper, both so that stock engines can use the file as it is:
* Columns go in the order of falling G_jj (activation order), but groups stay neighbouring columns of the original
  matrix and their ranges are fixed beforehand from the original weights. So the file needs no `g_idx`.
* Ranges are searched under the weight of diag(G) instead of taken from the extremes, which small models need.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.errors import NumericalError
from llmcompress.grid import IntGrid
from llmcompress.methods.base import IntMethod
from llmcompress.stats import InputGram
from llmcompress.weight import CompressedWeight

DAMP_TRIES = 4  # each ten times the last
SWEPT = 1 << 24  # weights swept together
SMALL = 256  # triangles of less than twice this size are inverted at once
LEAF = 16  # columns swept one by one


class GPTQ(IntMethod):
    """Options of `method: gptq`."""

    range: Literal["minmax", "search"] = "search"
    act_order: bool = True
    damp: float = Field(0.01, gt=0, lt=1, description="added to the diagonal, relative to its mean")
    needs: ClassVar[type[InputGram] | None] = InputGram

    def compress(self, weight: Tensor, gram: Tensor | None, dtype: torch.dtype) -> CompressedWeight:
        """weight [out, in] float32, gram [in, in] float32. Raises NumericalError if gram stays singular."""
        if gram is None:
            raise ValueError("gptq needs the Gram matrix of its inputs")
        diagonal = gram.diagonal()
        dead = diagonal == 0  # inputs that were always zero: any weight is right, zero is cheap
        order = diagonal.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(gram))
        factor = reversed_factor(gram, order, self.damp)
        parts = []
        for rows in weight.split(max(1, SWEPT // len(gram))):  # rows are independent: this only bounds memory
            alive = rows.masked_fill(dead, 0)
            grid = self.fit(alive, dtype, search=self.range == "search", importance=diagonal)
            codes = Sweep.codes_of(alive, grid, order, factor)
            parts.append(CompressedWeight.on_grid(codes, grid))
        return CompressedWeight.join(parts)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Algorithm 1 on some rows of a weight, columns in `order`.

    Works on the transpose, so that a column of the weight is one contiguous row. Columns are halved again and again:
    the left half is done, one product moves its errors into the right half, then that is done; so almost all of the
    work is in large products.
    """

    w: Tensor  # [in, out] float32, in order; a column that is done holds its error e
    codes: Tensor  # [in, out] uint8, in order
    factor: Tensor  # [in, in]: see `reversed_factor`
    scale: Tensor  # [groups, out] float32
    zero: Tensor  # [groups, out] float32
    groups: list[int]  # of each column, in order
    top: int  # largest code

    @classmethod
    def codes_of(cls, weight: Tensor, grid: IntGrid, order: Tensor, factor: Tensor) -> Tensor:
        """The codes [out, in] uint8 of weight [out, in] float32."""
        w = weight.T.contiguous()[order]
        scale, zero = (t.float().T.contiguous() for t in (grid.scale, grid.zero))
        codes = torch.empty_like(w, dtype=torch.uint8)
        groups = (order // grid.group).tolist()
        cls(w, codes, factor, scale, zero, groups, 2**grid.bits - 1).settle(0, len(w))
        return codes[order.argsort()].T.contiguous()

    def settle(self, start: int, stop: int) -> None:
        """Fix the codes of these columns; nothing outside them changes."""
        w = self.w
        if stop - start > LEAF:
            middle = (start + stop) // 2
            self.settle(start, middle)
            w[middle:stop].addmm_(self.upper(slice(start, middle), slice(middle, stop)).T, w[start:middle], alpha=-1)
            self.settle(middle, stop)
            return
        u = self.upper(slice(start, stop), slice(start, stop))
        for i, j in enumerate(range(start, stop)):
            column, scale, zero = w[j], self.scale[self.groups[j]], self.zero[self.groups[j]]
            code = (column / scale).round_().add_(zero).clamp_(0, self.top)
            self.codes[j] = code
            column.sub_(code.sub_(zero).mul_(scale)).div_(u[i, i])
            w[j + 1 : stop].addr_(u[i, i + 1 :], column, alpha=-1)

    def upper(self, rows: slice, columns: slice) -> Tensor:
        """A part of U, out of the reversed factor."""
        n = len(self.w)
        return self.factor[n - rows.stop : n - rows.start, n - columns.stop : n - columns.start].flip(0, 1)


def reversed_factor(gram: Tensor, order: Tensor, damp: float) -> Tensor:
    """R U R, where U [in, in] is upper triangular with (G + damp mean(diag G) I)⁻¹ = Uᵀ U, for G in `order`.

    R reverses an order. U comes from a Cholesky factor taken from the last column to the first: R G R = L Lᵀ gives
    R U R = L⁻¹. So one factorization and one triangular inverse do, both in place. Returns L⁻¹ [in, in] float32; what
    it holds besides `gram` is a matrix and a half, for wide layers most of a run's memory.

    The damping is raised tenfold while the matrix is not positive definite. Raises NumericalError when that fails.
    """
    backwards = order.flip(0)
    diagonal = gram.diagonal()[backwards]
    mean = float(diagonal.mean())
    diagonal = torch.where(diagonal == 0, mean if mean > 0 else 1.0, diagonal)
    failed = torch.zeros((), dtype=torch.int32, device=gram.device)
    for attempt in range(DAMP_TRIES):
        factor = gram[backwards[:, None], backwards].mT  # column-major, as LAPACK wants it: so it works in place
        factor.diagonal().copy_(diagonal + damp * 10**attempt * mean)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            invert_triangle(factor)
            if bool(factor.isfinite().all()):
                return factor
        del factor
    raise NumericalError(
        f"the Gram matrix of this layer's {len(gram)} inputs is not positive definite, not even with damping "
        f"{damp * 10 ** (DAMP_TRIES - 1):g}; use more calibration samples (at least {4 * len(gram)} tokens), raise "
        "`damp`, or list the layer in `keep`"
    )


def invert_triangle(lower: Tensor) -> None:
    """Replace a lower triangular matrix [n, n] by its inverse, half by half: [A 0; C B]⁻¹ = [A⁻¹ 0; -B⁻¹ C A⁻¹ B⁻¹]."""
    half = len(lower) // 2
    if half < SMALL:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    a, b, c = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    right = torch.linalg.solve_triangular(a, c, upper=False, left=False)
    c.copy_(torch.linalg.solve_triangular(b, right, upper=False).neg_())
    del right
    invert_triangle(a)
    invert_triangle(b)
