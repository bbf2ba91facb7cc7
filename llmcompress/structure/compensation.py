"""What the weights that stay can do for those that went: least squares, or a constant.

A linear y = W x loses the input columns D and keeps K. With the mean of x xᵀ over calibration tokens, G, and its mean
m = E[x], no forward pass is needed:

    least squares   W'_K = W_K + W_D G_DK (G_KK + λ I)⁻¹        the best that the kept inputs can do for W x
    mean            b' = b + W_D m_D                             FLAP, An et al. 2023 (arXiv:2312.11983), equation 5

λ is `DAMPING` of the mean of G's diagonal, without which channels that are nearly alike would make huge weights.
"""

import torch
from torch import Tensor

from llmcompress.errors import NumericalError

DAMPING = 0.01


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Weight [out, in] float32 whose kept columns make up for the others, and whose other columns are zero.

    gram: [in, in] float32, mean of x xᵀ.  kept: [k] int64, positions of the columns that stay.
    Raises NumericalError if the Gram matrix of the kept inputs cannot be factored.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    lost = gone.nonzero().flatten()
    inner = gram[kept][:, kept].double()
    inner.diagonal().add_(DAMPING * float(gram.diagonal().mean()) or 1.0)
    factor, failed = torch.linalg.cholesky_ex(inner)
    del inner  # in float64 the largest of all, and the solver makes a copy of the factor
    if int(failed):
        raise NumericalError(
            "the inputs of the kept units have no positive definite Gram matrix; use more calibration text, or "
            "`compensate: none`"
        )
    cross = gram[lost][:, kept].double()  # [d, k]
    moved = torch.cholesky_solve(cross.T, factor).T  # G_DK (G_KK + λ I)⁻¹
    result = torch.zeros_like(weight)
    result[:, kept] = weight[:, kept] + (weight[:, lost].double() @ moved).to(weight.dtype)
    return result


def mean_bias(weight: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """What the lost columns of weight [out, in] added on average; [out].  mean: [in], of the inputs."""
    lost = torch.ones_like(mean)
    lost[kept] = 0
    return weight @ (mean * lost)
