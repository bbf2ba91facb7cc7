"""Rows of the table for operators on int4 weights: what they compute, and the same in other calls."""

from typing import Any, NamedTuple

import torch
from layers import Int4Layer, int4_layer
from llmcompress_kernels import Int4Weight, int4_gated_mlp, int4_linear, int4_lora_linear
from llmcompress_kernels.int4_linear.layout import to_tiles
from peers import Implementation
from torch import Tensor
from torch.nn.functional import linear, silu

RANK, SCALING = 16, 2.0  # of LoRA adapters


def exact_linear(x: Tensor, layer: Int4Layer) -> Tensor:
    """In float64."""
    return x.double() @ layer.dense(torch.float64).T


def int4_weight(layer: Int4Layer) -> Int4Weight:
    """In the layout of the kernels."""
    return Int4Weight(to_tiles(layer.codes), layer.scale, layer.zero)


def call_int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    return int4_linear(x, *weight)


INT4_LINEAR = Implementation("int4_linear", int4_weight, call_int4_linear)


class Gated(NamedTuple):
    """The two weights of a gated MLP with SwiGLU, as layers or as what an implementation made of them."""

    gate: Any
    up: Any


def gated_layers(rows: int, columns: int, group: int, symmetric: bool, generator: torch.Generator) -> Gated:
    return Gated(*(int4_layer(rows, columns, group, symmetric, generator) for _ in range(2)))


def exact_gated(x: Tensor, layers: Gated) -> Tensor:
    return silu(exact_linear(x, layers.gate)) * exact_linear(x, layers.up)


def of_both(made: Implementation, name: str) -> Implementation:
    """Two calls of a linear, then the activation and the product in its dtype."""

    def prepare(layers: Gated) -> Gated:
        return Gated(made.prepare(layers.gate), made.prepare(layers.up))

    def call(x: Tensor, ready: Gated) -> Tensor:
        return silu(made.call(x, ready.gate)) * made.call(x, ready.up)

    return Implementation(name, prepare, call, made.dtype, made.missing)


def call_gated_mlp(x: Tensor, weights: Gated) -> Tensor:
    return int4_gated_mlp(x, weights.gate, weights.up)


INT4_GATED_MLP = Implementation("int4_gated_mlp", of_both(INT4_LINEAR, "").prepare, call_gated_mlp)


class Adapted(NamedTuple):
    """A weight, as a layer or as what an implementation made of it, and a LoRA adapter of RANK."""

    weight: Any
    a: Tensor
    b: Tensor


def adapted_layer(rows: int, columns: int, group: int, symmetric: bool, generator: torch.Generator) -> Adapted:
    """The adapter's part of the result is about a third of the weight's."""
    layer = int4_layer(rows, columns, group, symmetric, generator)
    a, b = (
        torch.randn(size, generator=generator, device=generator.device).mul_(scale).to(torch.bfloat16)
        for size, scale in (((RANK, columns), columns**-0.5), ((rows, RANK), 0.1))
    )
    return Adapted(layer, a, b)


def exact_adapted(x: Tensor, adapted: Adapted) -> Tensor:
    return exact_linear(x, adapted.weight) + SCALING * (x.double() @ adapted.a.double().T @ adapted.b.double().T)


def beside_adapter(made: Implementation, name: str) -> Implementation:
    """A linear, and the adapter in two more, as peft does it."""

    def prepare(adapted: Adapted) -> Adapted:
        return Adapted(made.prepare(adapted.weight), adapted.a, adapted.b)

    def call(x: Tensor, ready: Adapted) -> Tensor:
        return made.call(x, ready.weight).add_(linear(linear(x, ready.a), ready.b), alpha=SCALING)

    return Implementation(name, prepare, call, made.dtype, made.missing)


def call_lora_linear(x: Tensor, ready: Adapted) -> Tensor:
    return int4_lora_linear(x, ready.weight, ready.a, ready.b, SCALING)


INT4_LORA_LINEAR = Implementation("int4_lora_linear", beside_adapter(INT4_LINEAR, "").prepare, call_lora_linear)
