"""`llmcompress::teal_linear`: a linear that reads the columns of large inputs and no others."""

import torch
from torch import Tensor

from ..checks import FLOATS, check_dtype, check_place, check_shape, refuse_unless
from ..direct import may_call_directly
from ..registered import operator
from .cpu import teal_linear_cpu
from .reference import teal_linear_reference

__all__ = ["teal_linear", "teal_linear_reference"]

NAME = "teal_linear"


def teal_linear(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None = None) -> Tensor:
    """y = Σ x[k] W[:, k] + bias over those k where not |x[k]| <= threshold; a NaN stays one.

    x          [..., in]    bfloat16, float16 or float32, any strides; no token at all is fine
    columns    [in, out]    dtype of x: the transpose of the weight, so that a column lies together in memory
    threshold  >= 0, finite
    bias       [out]        dtype of x, or None
    returns    [..., out]   dtype of x, contiguous

    All tensors are on one device, and all but x contiguous. Sums are in float32. Columns are left out where there is
    one token, as in decoding; of several, each has its own columns, so x is masked and all of them are read. The same
    inputs give the same bits. Gradients are not computed.

    Raises ValueError, before anything runs, that names the argument, what was found and what is expected.
    """
    check(x, columns, threshold, bias)
    if may_call_directly(x, columns, bias):
        return teal_linear_cpu(x, columns, threshold, bias)
    return _teal_linear(x, columns, threshold, bias)


def check(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None) -> None:
    """Raises ValueError for arguments that `teal_linear` does not take."""
    check_place(NAME, x, [("columns", columns), ("bias", bias)])
    check_dtype(NAME, "x", x, *FLOATS, torch.float32)
    check_dtype(NAME, "columns", columns, x.dtype)
    refuse_unless(x.dim() > 0, NAME, "x", "a scalar", "a tensor [..., in]")
    refuse_unless(columns.dim() == 2, NAME, "columns", list(columns.shape), "a tensor [in, out]")
    check_shape(NAME, "columns", columns, x.shape[-1], columns.shape[1])
    refuse_unless(0 <= threshold < float("inf"), NAME, "threshold", threshold, "a finite number from 0 on")
    if bias is not None:
        check_dtype(NAME, "bias", bias, x.dtype)
        check_shape(NAME, "bias", bias, columns.shape[1])


@operator(NAME)
def _teal_linear(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    """On a GPU. Checks again: the registered operator can be called without the function above."""
    check(x, columns, threshold, bias)
    from .launch import teal_linear_triton

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return teal_linear_triton(x, columns, threshold, bias, processors)


@_teal_linear.register_kernel("cpu")
def _(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    check(x, columns, threshold, bias)
    return teal_linear_cpu(x, columns, threshold, bias)


@_teal_linear.register_fake
def _(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    check(x, columns, threshold, bias)
    return x.new_empty(*x.shape[:-1], columns.shape[1])
