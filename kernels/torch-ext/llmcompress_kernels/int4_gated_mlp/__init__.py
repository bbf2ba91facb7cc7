"""`llmcompress::int4_gated_mlp`: the gated half of an MLP on two 4-bit weights, in one read of its input."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_place, check_shape, refuse_unless
from ..direct import may_call_directly
from ..int4_linear import Int4Weight
from ..int4_linear.cpu import int4_linear_cpu
from ..int4_linear.layout import check_linear, fits, tensors_of
from ..registered import operator
from .reference import ACTIVATIONS, Gated

__all__ = ["int4_gated_mlp"]

NAME = "int4_gated_mlp"


def int4_gated_mlp(
    x: Tensor, gate: Int4Weight, up: Int4Weight, activation: str = "silu",
    gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = act(x Wgᵀ + gate_bias) * (x Wuᵀ + up_bias), elementwise in the outputs.

    x           [..., in]    bfloat16 or float16, any strides; no token at all is fine
    gate, up    [out, in]    Wg and Wu in the layout of `int4_linear`, of one group size, both or none with zeros
    activation  "silu" (SwiGLU), "gelu" (GeGLU, by the error function) or "gelu_tanh" (its approximation)
    biases      [out]        dtype of x, or None, each by itself
    returns     [..., out]   dtype of x, contiguous

    On a GPU and for up to 32 tokens (one from compute capability 10 on), sums, activation and product are in float32
    and rounded once. For more, and on a CPU, it is two `int4_linear`, and the rest in the dtype of x. The packed
    kernels give the same bits for the same inputs. Gradients are not computed.

    Raises ValueError, before anything runs, that names the argument, what was found and what is expected.
    """
    weights = Gated(gate, up, gate_bias, up_bias)
    check(x, weights, activation)
    if may_call_directly(x, gate.scale, up.scale, gate_bias, up_bias):
        return int4_gated_mlp_cpu(x, weights, activation)
    return _int4_gated_mlp(x, *gate, *up, gate_bias, up_bias, activation)


def int4_gated_mlp_cpu(x: Tensor, weights: Gated, activation: str) -> Tensor:
    """Two products, and the rest in the dtype of x; arguments as `check` lets them through."""
    gate, up, gate_bias, up_bias = weights
    gates = ACTIVATIONS[activation](int4_linear_cpu(x, gate, gate_bias))
    return gates.mul_(int4_linear_cpu(x, up, up_bias))


def check(x: Tensor, weights: Gated, activation: str) -> None:
    """Raises ValueError for arguments that `int4_gated_mlp` does not take."""
    gate, up, gate_bias, up_bias = weights
    alike = gate.scale.shape == up.scale.shape and (gate.zero is None) == (up.zero is None)
    if alike and activation in ACTIVATIONS and fits(x, gate, gate_bias) and fits(x, up, up_bias):
        return  # what follows takes several times as long to say what does not fit
    check_place(NAME, x, [*tensors_of(gate, gate_bias, "gate_"), *tensors_of(up, up_bias, "up_")])
    check_linear(NAME, x, gate, gate_bias, "gate_")
    check_linear(NAME, x, up, up_bias, "up_")
    check_shape(NAME, "up_words", up.words, *gate.words.shape)
    check_shape(NAME, "up_scale", up.scale, *gate.scale.shape)
    same = (gate.zero is None) == (up.zero is None)
    found, expected = ("absent", "one, as gate has") if up.zero is None else ("given", "None, as of gate")
    refuse_unless(same, NAME, "up_zero", found, expected)
    refuse_unless(activation in ACTIVATIONS, NAME, "activation", repr(activation), " or ".join(ACTIVATIONS))


def checked(x: Tensor, *flat: Any) -> tuple[Gated, str]:
    """Arguments of the registered operator, which can be called without the function above, gathered and checked."""
    *tensors, activation = flat
    weights = Gated(Int4Weight(*tensors[:3]), Int4Weight(*tensors[3:6]), *tensors[6:])
    check(x, weights, activation)
    return weights, activation


@operator(NAME)
def _int4_gated_mlp(
    x: Tensor,
    gate_words: Tensor, gate_scale: Tensor, gate_zero: Tensor | None,
    up_words: Tensor, up_scale: Tensor, up_zero: Tensor | None,
    gate_bias: Tensor | None, up_bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """On a GPU."""
    weights, _ = checked(
        x, gate_words, gate_scale, gate_zero, up_words, up_scale, up_zero, gate_bias, up_bias, activation
    )
    from .launch import int4_gated_mlp_triton

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return int4_gated_mlp_triton(x, weights, activation, processors)


@_int4_gated_mlp.register_kernel("cpu")
def _(x: Tensor, *flat: Any) -> Tensor:
    return int4_gated_mlp_cpu(x, *checked(x, *flat))


@_int4_gated_mlp.register_fake
def _(x: Tensor, *flat: Any) -> Tensor:
    weights, _activation = checked(x, *flat)
    return x.new_empty(*x.shape[:-1], weights.gate.words.shape[1])
