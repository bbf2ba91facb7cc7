"""The table of what is measured: one row per operator, with its truth, its baselines and the targets.

To add an operator: a function that makes weights (`Int4Layer`, or a record of its own), one that gives the exact result
in float64, an `Implementation` that repacks and calls it, and a row in OPERATORS. The first baseline is torch in
bfloat16: correctness is measured against its error, so every operator has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from layers import SHAPES, Int4Layer, Shape, int4_layer
from llmcompress_kernels import Int4Weight, int4_linear
from llmcompress_kernels.int4_linear.layout import to_tiles
from peers import BF16, GEMLITE, MARLIN, TORCH_INT4, Implementation
from torch import Tensor

LARGE = 32_000_000  # bytes of a weight in int4 with a 16-bit scale per 128 columns


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

OPERATORS = (Operator(INT4_LINEAR, (BF16, TORCH_INT4, GEMLITE, MARLIN), int4_layer, exact_linear),)

TARGETS = (
    Target("int4_linear", "bf16", (1,), 3.1, LARGE),
    Target("int4_linear", "bf16", (16,), 2.5, LARGE),
    Target("int4_linear", "bf16", (256, 4096), 0.9),
    Target("sparse24_int4_linear", "int4_linear", (1, 4, 16), 1.15, LARGE),
    Target("int4_gated_mlp", "two calls", (1, 4, 16), 1.15),
)
