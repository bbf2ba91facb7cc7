"""`llmcompress::int4_linear`: a linear on 4-bit weights in groups, without unpacking them."""

import torch
from torch import Tensor

from ..checks import check_place
from ..direct import may_call_directly
from ..registered import operator
from .cpu import int4_linear_cpu
from .layout import Int4Weight, check_linear, fits, from_pack_quantized, tensors_of, to_pack_quantized

__all__ = ["Int4Weight", "from_pack_quantized", "int4_linear", "to_pack_quantized"]

NAME = "int4_linear"


def int4_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + bias with W[n, k] = (code[n, k] - zero[k // g, n]) * scale[k // g, n].

    x      [..., in]                   bfloat16 or float16, any strides; no token at all is fine
    words  [ceil(in / 128), out, 16]   int32, codes in the order of layout.py; `from_pack_quantized` makes them
    scale  [in / g, out]               dtype of x; g is 32, 64 or 128
    zero   [in / g, out]               uint8, codes 0 .. 15; None: 8 everywhere
    bias   [out]                       dtype of x, or None
    returns [..., out]                 dtype of x, contiguous

    All tensors are on one device, and all but x contiguous. Sums are in float32; the product (code - zero) * scale is
    not rounded, except for many tokens (above 256 on a GPU, or 64 from compute capability 10 on; fewer on a CPU:
    ways.py), where the weight is unpacked to the dtype of x. On a CPU, x of few tokens is rounded to 2^-15 of the
    largest of 128 columns (csrc/int4.h). The packed kernels give the same bits for the same inputs. Gradients are not
    computed.

    Raises ValueError, before anything runs, that names the argument, what was found and what is expected.
    """
    check(x, words, scale, zero, bias)
    if may_call_directly(x, scale, bias):
        return int4_linear_cpu(x, Int4Weight(words, scale, zero), bias)
    return _int4_linear(x, words, scale, zero, bias)


def check(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
    """Raises ValueError for arguments that `int4_linear` does not take."""
    weight = Int4Weight(words, scale, zero)
    if fits(x, weight, bias):
        return
    check_place(NAME, x, tensors_of(weight, bias))
    check_linear(NAME, x, weight, bias)


@operator(NAME)
def _int4_linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """On a GPU. Checks again: the registered operator can be called without the function above."""
    check(x, words, scale, zero, bias)
    from .launch import int4_linear_triton

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return int4_linear_triton(x, Int4Weight(words, scale, zero), bias, processors)


@_int4_linear.register_kernel("cpu")
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    check(x, words, scale, zero, bias)
    return int4_linear_cpu(x, Int4Weight(words, scale, zero), bias)


@_int4_linear.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    check(x, words, scale, zero, bias)
    return x.new_empty(*x.shape[:-1], words.shape[1])
