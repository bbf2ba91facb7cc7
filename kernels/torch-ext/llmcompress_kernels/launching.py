"""What the launchers of all operators share: tiles, splits of the inner dimension, and the interpreter's peculiarities.

PROGRAMS_PER_PROCESSOR, TILES_PER_SPLIT and MAX_SPLITS are declared, not measured.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .configuration import Configuration

PROGRAMS_PER_PROCESSOR = 2  # splits are added until a GPU has that many to run
TILES_PER_SPLIT = 4  # fewer would cost more in the reduce than they gain
MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Tiles:
    """One configuration: `rows` of the weight and `tokens` per program, its warps, and stages of the load pipeline."""

    rows: int
    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is started: programs along outputs, tokens and splits, with `span` tiles of the inner dimension."""

    tiles: Tiles
    grid: tuple[int, int, int]
    span: int

    @property
    def splits(self) -> int:
        """Float32 sums to be added by a second kernel; 1: there is none."""
        return self.grid[2]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that any kernel takes, by name."""
        return {"BN": self.tiles.rows, "num_warps": self.tiles.warps, "num_stages": self.tiles.stages}


def planned(choices: Sequence[Tiles], tokens: int, rows: int, inner: int, processors: int) -> Plan:
    """choices: by rising tokens, the last one for all that is more. inner: tiles of the inner dimension."""
    tiles = next((t for t in choices if tokens <= t.tokens), choices[-1])
    programs = (triton.cdiv(rows, tiles.rows), triton.cdiv(tokens, tiles.tokens))
    span, splits = spans(inner, programs[0] * programs[1], processors)
    return Plan(tiles, (*programs, splits), span)


def spans(tiles: int, programs: int, processors: int) -> tuple[int, int]:
    """Tiles per split and number of splits, none of them empty: enough programs for the GPU, but few."""
    wanted = min(processors * PROGRAMS_PER_PROCESSOR // programs, tiles // TILES_PER_SPLIT, MAX_SPLITS)
    span = triton.cdiv(tiles, max(wanted, 1))
    return span, triton.cdiv(tiles, span)


def rows_of_tokens(x: Tensor) -> Tensor:
    """x [..., in] as [tokens, in] with neighbouring columns together in memory; the rows may have any stride."""
    tokens = x.reshape(-1, x.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels store: `dtype`, but float32 in the interpreter, which cuts bfloat16 off where GPUs round."""
    return torch.float32 if interpreted() else dtype


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def configured(kernel: str, tiles: Tiles, columns: int, **constants: Any) -> Configuration:
    """A kernel with its tiles. columns: input columns of a weight that a program makes in a round of its loop."""
    constants |= {"BN": tiles.rows}
    if "gemm" in kernel:
        constants |= {"BM": tiles.tokens, "INTERPRETED": False}
    return Configuration(kernel, constants, tiles.warps, tiles.stages, weights=tiles.rows * columns)
