"""Rows of `OPERATORS` for the 2:4 formats of this project.

On a CPU they take weights where their C++ is compiled. Without it the operators have nothing but their references,
which spread the weight out at each call, as a `StoredLinear` does too; it then stays one, and the reason says so. A
model that was loaded so and moved to a GPU is packed by `accelerate`.
"""

import os
from collections.abc import Callable

from llmcompress_kernels import (
    Sparse24Int4Weight,
    Sparse24Weight,
    from_sparse24,
    from_sparse24_int4,
    sparse24_int4_linear,
    sparse24_linear,
    to_sparse24,
    to_sparse24_int4,
)
from llmcompress_kernels.checks import DEVICES, FLOATS
from llmcompress_kernels.int4_linear.layout import GROUPS
from llmcompress_kernels.native import SWITCH
from llmcompress_kernels.sparse24_int4_linear.cpu import native as native_sparse24_int4
from llmcompress_kernels.sparse24_linear.cpu import native as native_sparse24
from torch import Tensor

from llmcompress.formats import OWN
from llmcompress.runtime.operators import Operator, Shape, Tensors, Weight, dtype_name, gpu_refuses


def sparse24_refuses(tensors: Tensors, shape: Shape) -> str | None:
    """Dtypes and devices without a kernel."""
    return refuses(tensors["weight"], tensors["weight"], native_sparse24)


def sparse24_int4_refuses(tensors: Tensors, shape: Shape) -> str | None:
    """Groups, dtypes and devices without a kernel."""
    scale, columns = tensors["weight_scale"], shape[1]
    why, groups = refuses(scale, tensors["weight"], native_sparse24_int4), scale.shape[1]
    if why is None and columns // groups not in GROUPS:
        return "one scale for each row" if groups == 1 else f"{groups} scales for rows of {columns}"
    return why


def refuses(floats: Tensor, packed: Tensor, compiled: Callable[[], object | None]) -> str | None:
    """By the tensor that has the dtype of x, by where the weight is, and for a CPU by whether there is code for it."""
    if floats.dtype not in FLOATS:
        return f"it is stored in {dtype_name(floats.dtype)}, the kernels' dtypes are bfloat16 and float16"
    if packed.is_meta:
        return "its tensors are offloaded"
    if packed.device.type not in DEVICES:
        return f"there is no kernel for {packed.device.type}"
    if (why := gpu_refuses(packed.device)) is not None:
        return why
    return without_code() if packed.device.type == "cpu" and compiled() is None else None


def without_code() -> str:
    """Why a CPU has no code for 2:4 weights."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches the C++ code for CPUs off"
    return "its C++ code could not be compiled here, which a warning explains"


def sparse24_pack(tensors: Tensors, shape: Shape) -> Weight:
    """Values and positions."""
    return from_sparse24(tensors["weight"], tensors["weight_index"])


def sparse24_stored(weight: Weight, shape: Shape) -> dict[str, Tensor]:
    """weight and weight_index."""
    return dict(zip(("weight", "weight_index"), to_sparse24(weight, shape[1]), strict=True))


def sparse24_dense(weight: Weight, shape: Shape) -> Tensor:
    """The values, zeros elsewhere."""
    return OWN["sparse24"].values(sparse24_stored(weight, shape))


def sparse24_compute(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """By the registered operator."""
    values, positions = weight
    return sparse24_linear(x, values, positions, bias)


def sparse24_int4_pack(tensors: Tensors, shape: Shape) -> Weight:
    """Codes, positions and scales."""
    return from_sparse24_int4(tensors["weight"], tensors["weight_index"], tensors["weight_scale"])


def sparse24_int4_stored(weight: Weight, shape: Shape) -> dict[str, Tensor]:
    """weight, weight_index and weight_scale."""
    names = ("weight", "weight_index", "weight_scale")
    return dict(zip(names, to_sparse24_int4(weight, shape[1]), strict=True))


def sparse24_int4_dense(weight: Weight, shape: Shape) -> Tensor:
    """(code - 8) * scale, zeros elsewhere."""
    return OWN["sparse24-int4"].values(sparse24_int4_stored(weight, shape))


def sparse24_int4_compute(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """By the registered operator."""
    words, metadata, scale = weight
    return sparse24_int4_linear(x, words, metadata, scale, bias)


SPARSE24 = Operator(
    "sparse24_linear", Sparse24Weight, "values", sparse24_refuses, sparse24_pack, sparse24_stored, sparse24_dense,
    sparse24_compute,
)  # fmt: skip
SPARSE24_INT4 = Operator(
    "sparse24_int4_linear", Sparse24Int4Weight, "scale", sparse24_int4_refuses, sparse24_int4_pack,
    sparse24_int4_stored, sparse24_int4_dense, sparse24_int4_compute,
)  # fmt: skip
