"""`sparse24_linear` on CPU: the reference, which expands the weight at each call."""

from torch import Tensor

from .layout import Sparse24Weight
from .reference import sparse24_linear_reference


def sparse24_linear_cpu(x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias; shapes as in `sparse24_linear`."""
    return sparse24_linear_reference(x, *weight, bias)
