"""The table of what is measured: one row per operator, with its truth, its baselines and the targets.

To add an operator: a function that makes weights (`Int4Layer`, or a record of its own), one that gives the exact result
in float64, an `Implementation` that repacks and calls it (as in int4_cases.py), and a row in OPERATORS. The first
baseline is torch in bfloat16: correctness is measured against its error, so every operator has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from int4_cases import (
    INT4_GATED_MLP,
    INT4_LINEAR,
    INT4_LORA_LINEAR,
    adapted_layer,
    beside_adapter,
    exact_adapted,
    exact_gated,
    exact_linear,
    gated_layers,
    of_both,
)
from layers import SHAPES, Shape, int4_layer
from peers import BF16, GEMLITE, MARLIN, TORCH_INT4, Implementation
from sparse_cases import (
    SPARSE24_INT4_LINEAR,
    SPARSE24_LINEAR,
    TORCH_SPARSE24,
    WITH_FORM,
    exact_sparse,
    of_dense,
    sparse_layer,
)
from teal_cases import MASKED_BF16, TEAL_LINEAR, column_layer, exact_masked
from torch import Tensor

LARGE = 32_000_000  # bytes of a weight in int4 with a 16-bit scale per 128 columns


@dataclass(frozen=True)
class Operator:
    """An operator and what it is compared with.

    make    rows, columns, group, whether symmetric, generator -> weights, on the generator's device
    truth   x [M, in], weights -> y [M, out] in float64
    parts   of a model's block that it can compute, as `Shape.parts` names them
    zeros   whether its weights may have zero points; if not, all are symmetric
    """

    ours: Implementation
    baselines: tuple[Implementation, ...]
    make: Callable[[int, int, int, bool, torch.Generator], Any]
    truth: Callable[[Tensor, Any], Tensor]
    parts: tuple[str, ...] = ("gate, up", "down", "q, o", "k, v")
    zeros: bool = True

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
    Operator(SPARSE24_LINEAR, (of_dense(BF16), TORCH_SPARSE24, WITH_FORM), sparse_layer, exact_sparse, zeros=False),
    Operator(SPARSE24_INT4_LINEAR, (of_dense(BF16), of_dense(INT4_LINEAR)), sparse_layer, exact_sparse, zeros=False),
    Operator(TEAL_LINEAR, (MASKED_BF16,), column_layer, exact_masked, zeros=False),
)

TARGETS = (
    Target("int4_linear", "bf16", (1,), 3.1, LARGE),
    Target("int4_linear", "bf16", (16,), 2.5, LARGE),
    Target("int4_linear", "bf16", (256, 4096), 0.9),
    Target("sparse24_int4_linear", "int4_linear", (1, 4, 16), 1.15, LARGE),
    Target("int4_gated_mlp", "two calls", (1, 4, 16), 1.15),
)
