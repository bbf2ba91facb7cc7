"""What `sparse24_linear` computes, in plain torch: the truth for the kernels."""

from torch import Tensor

from .layout import Sparse24Weight, expand_reference


def sparse24_linear_reference(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias; products and sums in float32, one rounding to the dtype of x. Shapes as in `sparse24_linear`."""
    weight = expand_reference(Sparse24Weight(values, positions), x.shape[-1])
    y = x.reshape(-1, x.shape[-1]).float() @ weight.float().T
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], values.shape[1])
