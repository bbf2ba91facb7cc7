"""The table of what is measured: one row per operator, with its truth, its baselines and the targets.

To add an operator: a function that makes weights (`Int4Layer`, or a record of its own), one that gives the exact result
in float64, an `Implementation` that repacks and calls it, and a row in OPERATORS. The first baseline is torch in
bfloat16: correctness is measured against its error, so every operator has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from layers import SHAPES, Int4Layer, Shape, int4_layer
from llmcompress_kernels import Int4Weight, int4_gated_mlp, int4_linear, int4_lora_linear
from llmcompress_kernels.int4_linear.layout import to_tiles
from peers import BF16, GEMLITE, MARLIN, TORCH_INT4, Implementation
from torch import Tensor
from torch.nn.functional import linear, silu

LARGE = 32_000_000  # bytes of a weight in int4 with a 16-bit scale per 128 columns
RANK, SCALING = 16, 2.0  # of adapters, as peft's defaults are used


@dataclass(frozen=True)
class Operator:
    """An operator and what it is compared with.

    make    rows, columns, group, whether symmetric, generator -> weights, on the generator's device
    truth   x [M, in], weights -> y [M, out] in float64
    parts   of a model's block that it can compute, as `Shape.parts` names them
    """

    ours: Implementation
    baselines: tuple[Implementation, ...]
    make: Callable[[int, int, int, bool, torch.Generator], Any]
    truth: Callable[[Tensor, Any], Tensor]
    parts: tuple[str, ...] = ("gate, up", "down", "q, o", "k, v")

    @property
    def name(self) -> str:
        return self.ours.name

    def shapes(self) -> list[Shape]:
        """What it is timed on, in order of importance."""
        return [shape for shape in SHAPES if shape.parts in self.parts]


@dataclass(frozen=True)
class Target:
    """A ratio of times, baseline over ours, that every measured case of some kind should reach."""

    operator: str
    against: str
    tokens: tuple[int, ...]
    at_least: float
    int4_bytes: int = 0  # of layers whose weight is at least that large in int4

    def text(self) -> str:
        """In words, for the table."""
        tokens = " or ".join(map(str, self.tokens))
        layers = f", layers of {self.int4_bytes / 1e6:.0f} MB and more" if self.int4_bytes else ""
        return f"{self.operator} at least {self.at_least}x {self.against} at M = {tokens}{layers}"


def int4_bytes(rows: int, columns: int) -> float:
    """Size of a weight in int4 with a 16-bit scale per 128 columns, which `Target.int4_bytes` speaks of."""
    return rows * columns * (4 + 16 / 128) / 8


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

OPERATORS = (
    Operator(INT4_LINEAR, (BF16, TORCH_INT4, GEMLITE, MARLIN), int4_layer, exact_linear),
    Operator(
        INT4_GATED_MLP,
        (of_both(BF16, "bf16"), of_both(INT4_LINEAR, "two calls")),
        gated_layers,
        exact_gated,
        ("gate, up",),
    ),
    Operator(
        INT4_LORA_LINEAR,
        (beside_adapter(BF16, "bf16"), beside_adapter(INT4_LINEAR, "three calls")),
        adapted_layer,
        exact_adapted,
    ),
)

TARGETS = (
    Target("int4_linear", "bf16", (1,), 3.1, LARGE),
    Target("int4_linear", "bf16", (16,), 2.5, LARGE),
    Target("int4_linear", "bf16", (256, 4096), 0.9),
    Target("sparse24_int4_linear", "int4_linear", (1, 4, 16), 1.15, LARGE),
    Target("int4_gated_mlp", "two calls", (1, 4, 16), 1.15),
)
