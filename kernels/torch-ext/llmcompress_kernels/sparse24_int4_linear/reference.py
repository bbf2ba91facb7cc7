"""What `sparse24_int4_linear` computes, in plain torch: the truth for the kernels."""

from torch import Tensor

from .layout import Sparse24Int4Weight, dequantize_reference


def sparse24_int4_linear_reference(
    x: Tensor, words: Tensor, metadata: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + bias; products and sums in float32, one rounding to the dtype of x; as `sparse24_int4_linear`."""
    weight = dequantize_reference(Sparse24Int4Weight(words, metadata, scale), x.shape[-1])
    y = x.reshape(-1, x.shape[-1]).float() @ weight.T
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], scale.shape[1])
