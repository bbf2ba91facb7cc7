"""The linears that are measured: their shapes in Llama models, and random weights on an int4 grid.

Every implementation of an operator gets the same values, so that those which compute something else are seen. Values do
not change the time of any of them, except that a processor draws less power with zeros, of which there are few.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP = 128  # columns per scale of what is timed: what most published int4 models have
TOKENS = (1, 16, 4096, 256, 4, 64)  # M of x [M, in], those that targets speak of first


@dataclass(frozen=True)
class Shape:
    """One linear of a model: weight [rows, columns]. `parts`: names of the linears that have this shape."""

    model: str
    parts: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Int4Layer:
    """A weight on an int4 grid: (code - zero) * scale, zero 8 everywhere if it is None.

    codes uint8 [out, in], scale bfloat16 [in / group, out], zero uint8 [in / group, out]
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scale.shape[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], each product rounded once to `dtype`."""
        zero = 8 if self.zero is None else self.zero.T.repeat_interleave(self.group, 1)
        scale = self.scale.T.repeat_interleave(self.group, 1)
        wide = torch.promote_types(dtype, torch.float32)
        return ((self.codes.to(wide) - zero) * scale).to(dtype)


def llama(model: str, hidden: int, intermediate: int, kv: int) -> tuple[Shape, ...]:
    """The four different shapes of a Llama block. kv: key-value heads times head size."""
    return (
        Shape(model, "gate, up", intermediate, hidden),
        Shape(model, "down", hidden, intermediate),
        Shape(model, "q, o", hidden, hidden),
        Shape(model, "k, v", kv, hidden),
    )


# config.json of Llama-3.1-70B, Llama-3.1-8B and Llama-3.2-1B; large ones first, since targets speak of them
SHAPES = (
    *llama("Llama 70B", 8192, 28672, 1024),
    *llama("Llama 8B", 4096, 14336, 1024),
    *llama("Llama 1B", 2048, 8192, 512),
)


def int4_layer(rows: int, columns: int, group: int, symmetric: bool, generator: torch.Generator) -> Int4Layer:
    """Random codes of all 16 values and scales around 1 / sqrt(in), so that outputs are around 1."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, **options)
    size = (columns // group, rows)
    scale = ((torch.rand(size, **options) + 0.5) / (8 * columns**0.5)).to(torch.bfloat16)
    zero = None if symmetric else torch.randint(0, 16, size, dtype=torch.uint8, **options)
    return Int4Layer(codes, scale, zero)
