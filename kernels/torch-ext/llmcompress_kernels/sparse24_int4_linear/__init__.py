"""`llmcompress::sparse24_int4_linear`: a linear on 2:4 weights of 4-bit codes, without unpacking them in memory."""

import torch
from torch import Tensor

from ..checks import FLOATS, check_dtype, check_place, check_shape, refuse_unless
from ..direct import may_call_directly
from ..int4_linear.layout import GROUPS
from ..registered import operator
from .cpu import sparse24_int4_linear_cpu
from .layout import BLOCK, LANES, STRIP, TILE, Sparse24Int4Weight, from_sparse24_int4, to_sparse24_int4

__all__ = ["Sparse24Int4Weight", "from_sparse24_int4", "sparse24_int4_linear", "to_sparse24_int4"]

NAME = "sparse24_int4_linear"


def sparse24_int4_linear(
    x: Tensor, words: Tensor, metadata: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + bias; of every four neighbouring weights of a row two are (code - 8) * scale, the others zero.

    x         [..., in]                                     bfloat16 or float16, any strides; no token at all is fine
    words     [ceil(in / 128), ceil(out / 16), 32, 4]       int32, codes; `from_sparse24_int4` makes all three tensors
    metadata  [ceil(in / 256), ceil(out / 16), 32, 4]       int32, where they are; both in the order of layout.py
    scale     [in / g, out]                                 dtype of x; g is 32, 64 or 128
    bias      [out]                                         dtype of x, or None
    returns   [..., out]                                    dtype of x, contiguous

    All tensors are on one device, and all but x contiguous. Sums are in float32. The product (code - 8) * scale is not
    rounded for few tokens on a CPU, on sparse tensor cores and for a single token; it is rounded to the dtype of x
    where the weight is unpacked for dense products: above 256 tokens, above one on a GPU without them, and for many on
    a CPU (ways.py). The packed kernels give the same bits for the same inputs. x must be finite: whether a column that
    meets no stored weight of a row reaches that output depends on the kernel. Gradients are not computed.

    Raises ValueError, before anything runs, that names the argument, what was found and what is expected.
    """
    check(x, words, metadata, scale, bias)
    if may_call_directly(x, scale, bias):
        return sparse24_int4_linear_cpu(x, Sparse24Int4Weight(words, metadata, scale), bias)
    return _sparse24_int4_linear(x, words, metadata, scale, bias)


def check(x: Tensor, words: Tensor, metadata: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError for arguments that `sparse24_int4_linear` does not take."""
    check_place(NAME, x, [("words", words), ("metadata", metadata), ("scale", scale), ("bias", bias)])
    check_dtype(NAME, "x", x, *FLOATS)
    check_dtype(NAME, "words", words, torch.int32)
    check_dtype(NAME, "metadata", metadata, torch.int32)
    check_dtype(NAME, "scale", scale, x.dtype)
    refuse_unless(x.dim() > 0, NAME, "x", "a scalar", "a tensor [..., in]")
    refuse_unless(scale.dim() == 2, NAME, "scale", list(scale.shape), "a tensor [in / group, out]")
    columns, (groups, out) = x.shape[-1], scale.shape
    fits = groups > 0 and columns % groups == 0 and columns // groups in GROUPS
    refuse_unless(fits, NAME, "scale", f"{groups} groups of {columns} columns", f"groups of {GROUPS} columns")
    check_shape(NAME, "words", words, -(-columns // BLOCK), -(-out // STRIP), LANES, 4)
    check_shape(NAME, "metadata", metadata, -(-columns // TILE), -(-out // STRIP), LANES, 4)
    if bias is not None:
        check_dtype(NAME, "bias", bias, x.dtype)
        check_shape(NAME, "bias", bias, out)


@operator(NAME)
def _sparse24_int4_linear(x: Tensor, words: Tensor, metadata: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """On a GPU. Checks again: the registered operator can be called without the function above."""
    check(x, words, metadata, scale, bias)
    from .launch import has_sparse_cores, sparse24_int4_linear_triton

    weight = Sparse24Int4Weight(words, metadata, scale)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return sparse24_int4_linear_triton(x, weight, bias, processors, has_sparse_cores(x))


@_sparse24_int4_linear.register_kernel("cpu")
def _(x: Tensor, words: Tensor, metadata: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, words, metadata, scale, bias)
    return sparse24_int4_linear_cpu(x, Sparse24Int4Weight(words, metadata, scale), bias)


@_sparse24_int4_linear.register_fake
def _(x: Tensor, words: Tensor, metadata: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check(x, words, metadata, scale, bias)
    return x.new_empty(*x.shape[:-1], scale.shape[1])
