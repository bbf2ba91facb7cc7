"""`llmcompress::sparse24_linear`: a linear on 2:4 weights, without expanding them in memory."""

import torch
from torch import Tensor

from ..checks import FLOATS, check_dtype, check_place, check_shape, refuse_unless
from ..direct import may_call_directly
from ..registered import operator
from .cpu import sparse24_linear_cpu
from .layout import PLANE, TILE, WIDTH, Sparse24Weight, from_sparse24, to_sparse24
from .library import form_elements, sparse24_form

__all__ = ["Sparse24Weight", "from_sparse24", "sparse24_form", "sparse24_linear", "to_sparse24"]

NAME = "sparse24_linear"


def sparse24_linear(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None, form: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + bias with two of every four neighbouring weights of a row stored, and zeros elsewhere.

    x          [..., in]                  bfloat16 or float16, any strides, in a multiple of 8; no token at all is fine
    values     [ceil(in / 64), out, 32]   dtype of x, in the order of layout.py; `from_sparse24` makes both tensors
    positions  [ceil(in / 256), out, 16]  int16, where they are
    bias       [out]                      dtype of x, or None
    form       [9 / 16 out in]            dtype of x, or None: the same weight by `sparse24_form` on this very GPU, with
                                          which torch's sparse kernel multiplies more than 64 tokens; no use on a CPU
    returns    [..., out]                 dtype of x, contiguous

    All tensors are on one device, and all but x contiguous. Sums are in float32. The packed kernels give the same bits
    for the same inputs. x must be finite: whether a column that meets no stored weight of a row reaches that output
    depends on the kernel. Gradients are not computed.

    Raises ValueError, before anything runs, that names the argument, what was found and what is expected.
    """
    check(x, values, positions, bias, form)
    if may_call_directly(x, values, bias):
        return sparse24_linear_cpu(x, Sparse24Weight(values, positions), bias)
    return _sparse24_linear(x, values, positions, bias, form)


def check(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, form: Tensor | None) -> None:
    """Raises ValueError for arguments that `sparse24_linear` does not take."""
    check_place(NAME, x, [("values", values), ("positions", positions), ("bias", bias), ("form", form)])
    check_dtype(NAME, "x", x, *FLOATS)
    check_dtype(NAME, "values", values, x.dtype)
    check_dtype(NAME, "positions", positions, torch.int16)
    refuse_unless(x.dim() > 0, NAME, "x", "a scalar", "a tensor [..., in]")
    columns = x.shape[-1]
    refuse_unless(columns > 0 and columns % 8 == 0, NAME, "x", f"of {columns} columns", "a multiple of 8 columns")
    refuse_unless(values.dim() == 3, NAME, "values", list(values.shape), "a tensor [ceil(in / 64), out, 32]")
    out = values.shape[1]
    check_shape(NAME, "values", values, -(-columns // PLANE), out, PLANE // 2)
    check_shape(NAME, "positions", positions, -(-columns // TILE), out, WIDTH)
    if bias is not None:
        check_dtype(NAME, "bias", bias, x.dtype)
        check_shape(NAME, "bias", bias, out)
    if form is not None:
        check_dtype(NAME, "form", form, x.dtype)
        check_shape(NAME, "form", form, form_elements(out, columns))


@operator(NAME)
def _sparse24_linear(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, form: Tensor | None = None
) -> Tensor:
    """On a GPU. Checks again: the registered operator can be called without the function above."""
    check(x, values, positions, bias, form)
    from .launch import sparse24_linear_triton

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return sparse24_linear_triton(x, Sparse24Weight(values, positions), bias, processors, form)


@_sparse24_linear.register_kernel("cpu")
def _(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, form: Tensor | None = None) -> Tensor:
    check(x, values, positions, bias, form)
    return sparse24_linear_cpu(x, Sparse24Weight(values, positions), bias)


@_sparse24_linear.register_fake
def _(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, form: Tensor | None = None) -> Tensor:
    check(x, values, positions, bias, form)
    return x.new_empty(*x.shape[:-1], values.shape[1])
