"""What `int4_linear` computes, in plain torch: the truth for the kernels."""

import torch
from torch import Tensor

from .layout import Int4Weight, from_tiles


def int4_linear_reference(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + bias; products and sums in float32, one rounding to the dtype of x. Shapes as in `int4_linear`."""
    weight = dequantize_reference(Int4Weight(words, scale, zero), x.shape[-1])
    y = x.reshape(-1, x.shape[-1]).float() @ weight.T
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], words.shape[1])


def dequantize_reference(weight: Int4Weight, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(code - zero) * scale in `dtype`, [out, in]; float32 holds every such product exactly."""
    group = in_features // weight.scale.shape[0]
    codes = from_tiles(weight.words, in_features).to(dtype)
    zero = 8.0 if weight.zero is None else weight.zero.T.repeat_interleave(group, 1).to(dtype)
    return (codes - zero) * weight.scale.T.repeat_interleave(group, 1).to(dtype)
