"""`llmcompress::int4_linear`: a linear on 4-bit weights in groups, without unpacking them."""

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..checks import FLOATS, check_dtype, check_place, check_shape, refuse_unless
from .layout import GROUPS, TILE, WIDTH, Int4Weight, from_pack_quantized, to_pack_quantized
from .reference import int4_linear_reference

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
    not rounded, except above 256 tokens on a GPU, where the weight is unpacked to the dtype of x for the BLAS. The
    packed kernels give the same bits for the same inputs. Gradients are not computed.

    Raises ValueError, before anything runs, that names the argument, what was found and what is expected.
    """
    check(x, words, scale, zero, bias)
    return _int4_linear(x, words, scale, zero, bias)


def check(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
    """Raises ValueError for arguments that `int4_linear` does not take."""
    check_place(NAME, x, [("words", words), ("scale", scale), ("zero", zero), ("bias", bias)])
    check_dtype(NAME, "x", x, *FLOATS)
    check_dtype(NAME, "words", words, torch.int32)
    check_dtype(NAME, "scale", scale, x.dtype)
    refuse_unless(x.dim() > 0, NAME, "x", "a scalar", "a tensor [..., in]")
    refuse_unless(words.dim() == 3, NAME, "words", list(words.shape), "a tensor [ceil(in / 128), out, 16]")
    refuse_unless(scale.dim() == 2, NAME, "scale", list(scale.shape), "a tensor [in / group, out]")
    columns, out, groups = x.shape[-1], words.shape[1], scale.shape[0]
    fits = groups > 0 and columns % groups == 0 and columns // groups in GROUPS
    refuse_unless(fits, NAME, "scale", f"{groups} groups of {columns} columns", f"groups of {GROUPS} columns")
    check_shape(NAME, "words", words, -(-columns // TILE), out, WIDTH)
    check_shape(NAME, "scale", scale, groups, out)
    if zero is not None:
        check_dtype(NAME, "zero", zero, torch.uint8)
        check_shape(NAME, "zero", zero, groups, out)
    if bias is not None:
        check_dtype(NAME, "bias", bias, x.dtype)
        check_shape(NAME, "bias", bias, out)


@torch.library.custom_op(add_op_namespace_prefix(NAME), mutates_args=(), device_types="cuda")
def _int4_linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """On a GPU. Checks again: the registered operator can be called without the function above."""
    check(x, words, scale, zero, bias)
    from .launch import int4_linear_triton

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return int4_linear_triton(x, Int4Weight(words, scale, zero), bias, processors)


@_int4_linear.register_kernel("cpu")
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    check(x, words, scale, zero, bias)
    return int4_linear_reference(x, words, scale, zero, bias)


@_int4_linear.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    check(x, words, scale, zero, bias)
    return x.new_empty(*x.shape[:-1], words.shape[1])
