"""Rows of the table for operators on 2:4 weights: two of every four neighbours stored, the others zero."""

from typing import Any, NamedTuple

import torch
from int4_cases import exact_linear
from layers import Int4Layer, int4_layer
from llmcompress_kernels import (
    Sparse24Int4Weight,
    Sparse24Weight,
    from_sparse24,
    from_sparse24_int4,
    sparse24_form,
    sparse24_int4_linear,
    sparse24_linear,
)
from llmcompress_kernels.sparse24_linear.library import library_of
from llmcompress_kernels.stored24 import index_of, spread_reference
from peers import HERE, Implementation
from torch import Tensor
from torch.nn.functional import pad

PAIRS = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)  # first | second << 2, of four positions
PAD = 16  # rows of x that cuSPARSELt multiplies by


class SparseLayer(NamedTuple):
    """A 2:4 weight on a symmetric int4 grid.

    layer    the same weight with code 8, which is 0.0, where nothing is stored
    kept     uint8 [out, in / 2], the codes that are stored
    nibbles  uint8 [out, in / 4], where they are
    """

    layer: Int4Layer
    kept: Tensor
    nibbles: Tensor


def sparse_layer(rows: int, columns: int, group: int, symmetric: bool, generator: torch.Generator) -> SparseLayer:
    """Any two of each four, with equal chances. Always symmetric: with a zero point, 0.0 is not one code for all."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    pairs = torch.tensor(PAIRS, dtype=torch.uint8, device=generator.device)
    nibbles = pairs[torch.randint(0, len(PAIRS), (rows, columns // 4), **options)]
    kept = torch.randint(0, 16, (rows, columns // 2), dtype=torch.uint8, **options)
    codes = spread_reference(kept.to(torch.int8) - 8, nibbles) + 8
    scale = int4_layer(rows, columns, group, True, generator).scale
    return SparseLayer(Int4Layer(codes.to(torch.uint8), scale, None), kept, nibbles)


def exact_sparse(x: Tensor, weight: SparseLayer) -> Tensor:
    return exact_linear(x, weight.layer)


def of_dense(made: Implementation) -> Implementation:
    """An implementation that knows nothing of zeros."""
    return Implementation(made.name, lambda weight: made.prepare(weight.layer), made.call, made.dtype, made.missing)


def sparse24_weight(weight: SparseLayer, dtype: torch.dtype = torch.bfloat16) -> Sparse24Weight:
    """Two numbers of each four columns."""
    scale = weight.layer.scale.T.repeat_interleave(weight.layer.group // 2, 1)
    kept = (weight.kept.float() - 8) * scale
    return from_sparse24(kept.to(dtype), index_of(weight.nibbles))


def sparse24_int4_weight(weight: SparseLayer) -> Sparse24Int4Weight:
    scale = weight.layer.scale.T.contiguous()
    return from_sparse24_int4(index_of(weight.kept), index_of(weight.nibbles), scale)


def call_sparse24_linear(x: Tensor, weight: Sparse24Weight) -> Tensor:
    return sparse24_linear(x, *weight)


def formed(weight: SparseLayer) -> tuple[Sparse24Weight, Tensor | None]:
    """Beside the packed weight its form for torch's library."""
    packed = sparse24_weight(weight)
    return packed, sparse24_form(packed, weight.layer.codes.shape[1])


def call_with_form(x: Tensor, prepared: tuple[Sparse24Weight, Tensor | None]) -> Tensor:
    weight, form = prepared
    return sparse24_linear(x, *weight, form=form)


def without_library(device: torch.device) -> str:
    """Why a form cannot be made."""
    return HERE if library_of(device) else f"torch has no sparse kernel for this {device.type}"


def call_sparse24_int4_linear(x: Tensor, weight: Sparse24Int4Weight) -> Tensor:
    return sparse24_int4_linear(x, *weight)


def compressed(weight: SparseLayer) -> Tensor:
    """As cuSPARSELt wants it."""
    return torch._cslt_compress(weight.layer.dense(torch.bfloat16))


def call_cusparselt(x: Tensor, weight: Tensor) -> Tensor:
    """It takes a multiple of PAD rows; what is added is part of its time, as it is in a model."""
    padded = pad(x, (0, 0, 0, -len(x) % PAD))
    return torch._cslt_sparse_mm(weight, padded.T).T[: len(x)]


def without_cusparselt(device: torch.device) -> str:
    """Why cuSPARSELt cannot be measured."""
    if device.type != "cuda":
        return f"runs on a GPU alone, this is {device.type}"
    return HERE if torch.backends.cusparselt.is_available() else "this build of torch has no cuSPARSELt"


SPARSE24_LINEAR = Implementation("sparse24_linear", sparse24_weight, call_sparse24_linear)
SPARSE24_INT4_LINEAR = Implementation("sparse24_int4_linear", sparse24_int4_weight, call_sparse24_int4_linear)
WITH_FORM = Implementation("with a form", formed, call_with_form, missing=without_library)
TORCH_SPARSE24 = Implementation("torch 2:4", compressed, call_cusparselt, missing=without_cusparselt)
