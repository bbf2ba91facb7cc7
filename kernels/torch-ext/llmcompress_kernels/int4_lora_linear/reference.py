"""What `int4_lora_linear` computes, in plain torch: the truth for the kernels."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..int4_linear.layout import Int4Weight
from ..int4_linear.reference import dequantize_reference


class Adapter(NamedTuple):
    """A LoRA update of a weight [out, in] by scaling * B A: a [rank, in], b [out, rank]."""

    a: Tensor
    b: Tensor
    scaling: float


def int4_lora_linear_reference(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, adapter: Adapter, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x Wᵀ + bias + scaling * (x Aᵀ) Bᵀ; everything in `dtype`, which is also that of the result."""
    x, values = x.to(dtype), dequantize_reference(weight, x.shape[-1], dtype)
    update = functional.linear(functional.linear(x, adapter.a.to(dtype)), adapter.b.to(dtype))
    return functional.linear(x, values, None if bias is None else bias.to(dtype)) + adapter.scaling * update
