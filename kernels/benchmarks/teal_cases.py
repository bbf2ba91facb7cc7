"""Row of the table for the linear that leaves out the columns of small inputs: half of them, at one token."""

from typing import NamedTuple

import torch
from int4_cases import exact_linear
from layers import Int4Layer, int4_layer
from llmcompress_kernels import teal_linear
from peers import BF16, Implementation
from torch import Tensor

THRESHOLD = 0.6745  # half of normally distributed inputs are smaller


class ColumnLayer(NamedTuple):
    """A weight, and below which size inputs count as zero. On an int4 grid like those of all other rows."""

    layer: Int4Layer
    threshold: float


def column_layer(rows: int, columns: int, group: int, symmetric: bool, generator: torch.Generator) -> ColumnLayer:
    return ColumnLayer(int4_layer(rows, columns, group, symmetric, generator), THRESHOLD)


def masked(x: Tensor, threshold: float) -> Tensor:
    return x.masked_fill(x.float().abs() <= threshold, 0)


def exact_masked(x: Tensor, weight: ColumnLayer) -> Tensor:
    return exact_linear(masked(x, weight.threshold), weight.layer)


def columns_of(weight: ColumnLayer) -> tuple[Tensor, float]:
    """[in, out] in bfloat16, so that a column of the weight lies together."""
    return weight.layer.dense(torch.bfloat16).T.contiguous(), weight.threshold


def call_teal_linear(x: Tensor, prepared: tuple[Tensor, float]) -> Tensor:
    return teal_linear(x, *prepared)


def call_bf16(x: Tensor, prepared: tuple[Tensor, float]) -> Tensor:
    weight, threshold = prepared
    result: Tensor = BF16.call(masked(x, threshold), weight)
    return result


TEAL_LINEAR = Implementation("teal_linear", columns_of, call_teal_linear)
MASKED_BF16 = Implementation("bf16", lambda weight: (BF16.prepare(weight.layer), weight.threshold), call_bf16)
