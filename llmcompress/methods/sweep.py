"""The sweep of GPTQ and SparseGPT: fix one column after another and let those not done yet absorb each error.

With G the mean of x xᵀ and U the upper Cholesky factor of its inverse (G⁻¹ = Uᵀ U), column j of the weight goes to an
allowed value q_j and every later column k moves by

    e = (w_j - q_j) / U_jj          w_k <- w_k - e U_jk

Which values are allowed is the method's to say: a grid (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), zero for
masked weights (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1), or both at once. A masked weight that errors
have moved goes back to zero like a rounded one: its own error moves on to the columns after it, so none is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llmcompress.errors import NumericalError
from llmcompress.lazy import Tensor, torch

DAMP_TRIES = 4  # each ten times the last
SWEPT = 1 << 24  # weights swept together
LEAF = 16  # columns swept one by one
SMALL = 256  # triangles of less than twice this size are inverted at once

Allow = Callable[[int, Tensor], Tensor]
Select = Callable[[slice, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Some rows of a weight, columns in the order of the factor.

    Works on the transpose, so that a column of the weight is one contiguous row. Columns are halved again and again:
    the left half is done, one product moves its errors into the right half, then that is done; so almost all of the
    work is in large products.
    """

    w: Tensor  # [in, out] float32; a column that is done holds its error e
    factor: Tensor  # [in, in]: see `reversed_factor`
    allow: Allow  # (j, column [out]) -> what the column is allowed to be, a new tensor [out]
    select: Select | None = None  # (columns, w[columns] as errors have left it, U_jj): asked before each block
    block: int = 1  # columns of one selection

    def run(self) -> None:
        """All columns."""
        self._columns(0, len(self.w))

    def _columns(self, start: int, stop: int) -> None:
        """Fix these columns; nothing outside them changes."""
        w, leaf = self.w, -(-LEAF // self.block) * self.block if self.block <= LEAF else LEAF
        if stop - start > leaf:
            unit = self.block if stop - start > self.block else leaf
            middle = start + -(-(stop - start) // (2 * unit)) * unit
            self._columns(start, middle)
            w[middle:stop].addmm_(self._upper(slice(start, middle), slice(middle, stop)).T, w[start:middle], alpha=-1)
            self._columns(middle, stop)
            return
        u = self._upper(slice(start, stop), slice(start, stop))
        for i, j in enumerate(range(start, stop)):
            if self.select and j % self.block == 0:
                here = slice(j, min(j + self.block, len(w)))
                self.select(here, w[here], self._diagonal(here))
            w[j].sub_(self.allow(j, w[j])).div_(u[i, i])
            w[j + 1 : stop].addr_(u[i, i + 1 :], w[j], alpha=-1)

    def _upper(self, rows: slice, columns: slice) -> Tensor:
        """A part of U, out of the reversed factor."""
        n = len(self.w)
        return self.factor[n - rows.stop : n - rows.start, n - columns.stop : n - columns.start].flip(0, 1)

    def _diagonal(self, here: slice) -> Tensor:
        """U_jj of these columns."""
        n = len(self.w)
        return self.factor.diagonal()[n - here.stop : n - here.start].flip(0)


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
