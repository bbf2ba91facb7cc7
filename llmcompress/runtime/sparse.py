"""Rows of `OPERATORS` for the 2:4 formats of this project, as far as llmcompress_kernels has their operators.

They take weights on a GPU only: their code for CPUs was not measured yet, so there a `StoredLinear` unpacks the weight
at each call. A model that was loaded on a CPU and moved is packed by `accelerate`.
"""

from typing import Any

import llmcompress_kernels
from llmcompress_kernels.checks import FLOATS
from llmcompress_kernels.int4_linear.layout import GROUPS
from torch import Tensor

from llmcompress.formats import OWN
from llmcompress.runtime.operators import Operator, Shape, Tensors, Weight, dtype_name

kernels: Any = llmcompress_kernels  # which may be a version without them


def sparse24_refuses(tensors: Tensors, shape: Shape) -> str | None:
    """Dtypes and devices without a kernel."""
    return refuses(tensors["weight"], tensors["weight"])


def sparse24_int4_refuses(tensors: Tensors, shape: Shape) -> str | None:
    """Groups, dtypes and devices without a kernel."""
    scale, columns = tensors["weight_scale"], shape[1]
    why, groups = refuses(scale, tensors["weight"]), scale.shape[1]
    if why is None and columns // groups not in GROUPS:
        return "one scale for each row" if groups == 1 else f"{groups} scales for rows of {columns}"
    return why


def refuses(floats: Tensor, packed: Tensor) -> str | None:
    """By the tensor that has the dtype of x, and where the weight is."""
    if floats.dtype not in FLOATS:
        return f"it is stored in {dtype_name(floats.dtype)}, the kernels' dtypes are bfloat16 and float16"
    return None if packed.is_cuda else f"there is no kernel for {'offloaded tensors' if packed.is_meta else 'a CPU'}"


def sparse24_pack(tensors: Tensors, shape: Shape) -> Weight:
    """Values and positions."""
    return kernels.from_sparse24(tensors["weight"], tensors["weight_index"])


def sparse24_stored(weight: Weight, shape: Shape) -> dict[str, Tensor]:
    """weight and weight_index."""
    return dict(zip(("weight", "weight_index"), kernels.to_sparse24(weight, shape[1]), strict=True))


def sparse24_dense(weight: Weight, shape: Shape) -> Tensor:
    """The values, zeros elsewhere."""
    return OWN["sparse24"].values(sparse24_stored(weight, shape))


def sparse24_compute(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """By the registered operator."""
    y: Tensor = kernels.sparse24_linear(x, *weight, bias)
    return y


def sparse24_int4_pack(tensors: Tensors, shape: Shape) -> Weight:
    """Codes, positions and scales."""
    return kernels.from_sparse24_int4(tensors["weight"], tensors["weight_index"], tensors["weight_scale"])


def sparse24_int4_stored(weight: Weight, shape: Shape) -> dict[str, Tensor]:
    """weight, weight_index and weight_scale."""
    names = ("weight", "weight_index", "weight_scale")
    return dict(zip(names, kernels.to_sparse24_int4(weight, shape[1]), strict=True))


def sparse24_int4_dense(weight: Weight, shape: Shape) -> Tensor:
    """(code - 8) * scale, zeros elsewhere."""
    return OWN["sparse24-int4"].values(sparse24_int4_stored(weight, shape))


def sparse24_int4_compute(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """By the registered operator."""
    y: Tensor = kernels.sparse24_int4_linear(x, *weight, bias)
    return y


def sparse_operators() -> dict[str, Operator]:
    """The rows, by format."""
    rows: dict[str, Operator] = {}
    if hasattr(kernels, "sparse24_linear"):
        rows["sparse24"] = Operator(
            "sparse24_linear", kernels.Sparse24Weight, "values", sparse24_refuses, sparse24_pack, sparse24_stored,
            sparse24_dense, sparse24_compute,
        )  # fmt: skip
    if hasattr(kernels, "sparse24_int4_linear"):
        rows["sparse24-int4"] = Operator(
            "sparse24_int4_linear", kernels.Sparse24Int4Weight, "scale", sparse24_int4_refuses, sparse24_int4_pack,
            sparse24_int4_stored, sparse24_int4_dense, sparse24_int4_compute,
        )  # fmt: skip
    return rows
