"""What `int4_gated_mlp` computes, in plain torch: the truth for the kernels."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..int4_linear.layout import Int4Weight
from ..int4_linear.reference import dequantize_reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,  # SwiGLU
    "gelu": functional.gelu,  # GeGLU, by the error function
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class Gated(NamedTuple):
    """The weights of a gated MLP, [out, in] both, and their biases, [out] or None."""

    gate: Int4Weight
    up: Int4Weight
    gate_bias: Tensor | None
    up_bias: Tensor | None


def int4_gated_mlp_reference(x: Tensor, weights: Gated, activation: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """act(x Wgᵀ + bg) * (x Wuᵀ + bu); everything in `dtype`, which is also that of the result."""
    gates = linear_reference(x, weights.gate, weights.gate_bias, dtype)
    return ACTIVATIONS[activation](gates) * linear_reference(x, weights.up, weights.up_bias, dtype)


def linear_reference(x: Tensor, weight: Int4Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + bias, with a weight, a product and a result in `dtype`."""
    values = dequantize_reference(weight, x.shape[-1], dtype)
    return functional.linear(x.to(dtype), values, None if bias is None else bias.to(dtype))
