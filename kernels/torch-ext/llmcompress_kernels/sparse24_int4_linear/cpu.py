"""`sparse24_int4_linear` on CPU: the reference, which dequantizes the weight at each call."""

from torch import Tensor

from .layout import Sparse24Int4Weight
from .reference import sparse24_int4_linear_reference


def sparse24_int4_linear_cpu(x: Tensor, weight: Sparse24Int4Weight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias; shapes as in `sparse24_int4_linear`."""
    return sparse24_int4_linear_reference(x, *weight, bias)
