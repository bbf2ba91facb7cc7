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

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.errors import NumericalError
from llmcompress.grid import IntGrid, fit_range
from llmcompress.methods.base import IntMethod
from llmcompress.stats import InputGram
from llmcompress.weight import CompressedWeight

DAMP_TRIES = 4  # each ten times the last
ROWS = 4096  # output rows swept together
BLOCK = 64  # columns updated together when the group is the whole row; else the group itself


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
        group = self.group(weight.shape[1])
        order = diagonal.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(gram))
        factor = inverse_factor(gram, order, self.damp)
        parts = []
        for rows in torch.split(weight, ROWS):  # rows are independent: this bounds memory, nothing else
            alive = rows.masked_fill(dead, 0)
            grid = fit_range(
                alive,
                bits=self.bits,
                group=group,
                symmetric=self.symmetric,
                dtype=dtype,
                search=self.range == "search",
                importance=diagonal,
            )
            codes = sweep(alive, grid, order, factor, block=group if self.group_size != "row" else BLOCK)
            parts.append(CompressedWeight.on_grid(codes, grid))
        return CompressedWeight.join(parts)


def sweep(weight: Tensor, grid: IntGrid, order: Tensor, u: Tensor, block: int) -> Tensor:
    """The codes [out, in] uint8 of algorithm 1, columns taken in `order` [in]; u [in, in] is in that order too.

    Works on the transpose, so that a column of the weight is one contiguous row.
    """
    scale, zero = (t.T[order].contiguous() for t in grid.columns())  # [in, out]
    w = weight.T[order].contiguous()
    top = 2**grid.bits - 1
    codes = torch.empty_like(w, dtype=torch.uint8)
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        inside, errors = w[start:stop], torch.empty_like(w[start:stop])
        for i in range(stop - start):
            j = start + i
            code = (inside[i] / scale[j]).round_().add_(zero[j]).clamp_(0, top)
            codes[j] = code
            error = (inside[i] - (code - zero[j]) * scale[j]) / u[j, j]
            inside[i + 1 :].addr_(u[j, j + 1 : stop], error, alpha=-1)
            errors[i] = error
        w[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return codes[back].T.contiguous()


def inverse_factor(gram: Tensor, order: Tensor, damp: float) -> Tensor:
    """U [in, in] upper triangular with (G + damp mean(diag G) I)⁻¹ = Uᵀ U, for G with rows and columns in `order`.

    The damping is raised tenfold while the matrix is not positive definite. Raises NumericalError when that fails.
    Holds two matrices besides `gram`, which for wide layers are most of a run's memory.
    """
    damped = gram[order[:, None], order]
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    factor, failed = torch.empty_like(damped), torch.zeros((), dtype=torch.int32, device=gram.device)
    added = 0.0
    for attempt in range(DAMP_TRIES):
        diagonal.add_((damp * 10**attempt - added) * mean)
        added = damp * 10**attempt
        torch.linalg.cholesky_ex(damped, out=(factor, failed))
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            torch.linalg.cholesky_ex(inverse, upper=True, out=(factor, failed))
            if not failed and bool(factor.isfinite().all()):
                return factor
    raise NumericalError(
        f"the Gram matrix of this layer's {len(gram)} inputs is not positive definite, not even with damping "
        f"{damp * 10 ** (DAMP_TRIES - 1):g}; use more calibration samples (at least {4 * len(gram)} tokens), raise "
        "`damp`, or list the layer in `keep`"
    )
