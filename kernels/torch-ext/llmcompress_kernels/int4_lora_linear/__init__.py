"""`llmcompress::int4_lora_linear`: a linear on a 4-bit weight with a LoRA adapter beside it, added on the way."""

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_place, check_shape, refuse_unless
from ..direct import may_call_directly
from ..int4_linear import Int4Weight
from ..int4_linear.cpu import int4_linear_cpu
from ..int4_linear.layout import are, check_linear, fits, tensors_of
from ..registered import operator
from .reference import Adapter

__all__ = ["int4_lora_linear"]

NAME = "int4_lora_linear"
MAX_RANK = 64


def int4_lora_linear(
    x: Tensor, weight: Int4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + bias + scaling * (x Aᵀ) Bᵀ.

    x        [..., in]      bfloat16 or float16, any strides; no token at all is fine
    weight   [out, in]      W in the layout of `int4_linear`
    lora_a   [rank, in]     A, dtype of x; rank is 1 to 64
    lora_b   [out, rank]    B, dtype of x
    bias     [out]          dtype of x, or None
    returns  [..., out]     dtype of x, contiguous

    x Aᵀ is rounded to the dtype of x. On a GPU all else is summed in float32 and rounded once, except for many tokens,
    as in `int4_linear`: then the weight is unpacked for the BLAS and the two products are rounded one after the other,
    as they are on a CPU. The packed kernels give the same bits for the same inputs. Gradients are not computed.

    Raises ValueError, before anything runs, that names the argument, what was found and what is expected.
    """
    adapter = Adapter(lora_a, lora_b, scaling)
    check(x, weight, bias, adapter)
    if may_call_directly(x, weight.scale, bias, lora_a, lora_b):
        return int4_lora_linear_cpu(x, weight, bias, adapter)
    return _int4_lora_linear(x, *weight, bias, lora_a, lora_b, scaling)


def int4_lora_linear_cpu(x: Tensor, weight: Int4Weight, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """Two products added up; arguments as `check` lets them through."""
    linear = torch.nn.functional.linear
    update = linear(linear(x, adapter.a), adapter.b)
    return int4_linear_cpu(x, weight, bias).add_(update, alpha=adapter.scaling)


def check(x: Tensor, weight: Int4Weight, bias: Tensor | None, adapter: Adapter) -> None:
    """Raises ValueError for arguments that `int4_lora_linear` does not take."""
    if fits(x, weight, bias) and update_fits(x, weight, adapter):
        return  # what follows takes several times as long to say what does not fit
    a, b, scaling = adapter
    check_place(NAME, x, [*tensors_of(weight, bias), ("lora_a", a), ("lora_b", b)])
    check_linear(NAME, x, weight, bias)
    check_dtype(NAME, "lora_a", a, x.dtype)
    check_dtype(NAME, "lora_b", b, x.dtype)
    ranked = a.dim() == 2 and 1 <= a.shape[0] <= MAX_RANK
    refuse_unless(ranked, NAME, "lora_a", list(a.shape), f"a matrix [rank, in] of rank 1 to {MAX_RANK}")
    check_shape(NAME, "lora_a", a, a.shape[0], x.shape[-1])
    check_shape(NAME, "lora_b", b, weight.words.shape[1], a.shape[0])
    refuse_unless(math.isfinite(scaling), NAME, "scaling", scaling, "a finite number")


def update_fits(x: Tensor, weight: Int4Weight, adapter: Adapter) -> bool:
    """Whether all that is checked of A, B and their factor holds, for an x that fits the weight."""
    a, b, scaling = adapter
    if a.dim() != 2 or not 1 <= len(a) <= MAX_RANK or not math.isfinite(scaling):
        return False
    (_, out), rank = weight.scale.shape, len(a)
    return are(a, x.dtype, x.device, (rank, x.shape[-1])) and are(b, x.dtype, x.device, (out, rank))


def checked(x: Tensor, *flat: Any) -> tuple[Int4Weight, Tensor | None, Adapter]:
    """Arguments of the registered operator, which can be called without the function above, gathered and checked."""
    weight, bias, adapter = Int4Weight(*flat[:3]), flat[3], Adapter(*flat[4:])
    check(x, weight, bias, adapter)
    return weight, bias, adapter


@operator(NAME)
def _int4_lora_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    lora_a: Tensor, lora_b: Tensor, scaling: float,
) -> Tensor:  # fmt: skip
    """On a GPU."""
    weight, bias, adapter = checked(x, words, scale, zero, bias, lora_a, lora_b, scaling)
    from .launch import int4_lora_linear_triton

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return int4_lora_linear_triton(x, weight, bias, adapter, processors)


@_int4_lora_linear.register_kernel("cpu")
def _(x: Tensor, *flat: Any) -> Tensor:
    return int4_lora_linear_cpu(x, *checked(x, *flat))


@_int4_lora_linear.register_fake
def _(x: Tensor, *flat: Any) -> Tensor:
    weight, _bias, _adapter = checked(x, *flat)
    return x.new_empty(*x.shape[:-1], weight.words.shape[1])
