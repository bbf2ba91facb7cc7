"""What the launchers of all operators share: tiles, splits of the inner dimension, and the interpreter's peculiarities.

PROGRAMS_PER_PROCESSOR, TILES_PER_SPLIT and MAX_SPLITS are declared, not measured.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .configuration import ARCHITECTURES, FLOAT16, Configuration
from .outputs import reduce_splits

PROGRAMS_PER_PROCESSOR = 2  # splits are added until a GPU has that many to run
TILES_PER_SPLIT = 4  # fewer would cost more in the reduce than they gain
MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Tiles:
    """One configuration: `rows` of the weight and `tokens` per program, its warps, and stages of the load pipeline.

    architectures: on which the compiler makes a good kernel of it. float16: on which that is looked at in float16, too.
    registers: of a thread at most; None: what the compiler takes, which may spill some so that more programs fit.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    architectures: tuple[int, ...] = ARCHITECTURES
    float16: tuple[int, ...] = FLOAT16
    registers: int | None = None


REDUCE = Tiles(rows=512, tokens=1, warps=4, stages=3)  # of the kernel that adds up splits


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is started: programs along tokens, outputs and splits, with `span` tiles of the inner dimension.

    Tokens come first, so that neighbouring programs read the same weights.
    """

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
        limit = {} if self.tiles.registers is None else {"maxnreg": self.tiles.registers}
        return {"BN": self.tiles.rows, "num_warps": self.tiles.warps, "num_stages": self.tiles.stages} | limit


def planned(choices: Sequence[Tiles], tokens: int, rows: int, inner: int, processors: int) -> Plan:
    """choices: by rising tokens, the last one for all that is more. inner: tiles of the inner dimension."""
    tiles = next((t for t in choices if tokens <= t.tokens), choices[-1])
    programs = (triton.cdiv(tokens, tiles.tokens), triton.cdiv(rows, tiles.rows))
    span, splits = spans(inner, programs[0] * programs[1], processors)
    return Plan(tiles, (*programs, splits), span)


def spans(tiles: int, programs: int, processors: int) -> tuple[int, int]:
    """Tiles per split and number of splits, none of them empty: enough programs for the GPU, but few."""
    wanted = min(processors * PROGRAMS_PER_PROCESSOR // programs, tiles // TILES_PER_SPLIT, MAX_SPLITS)
    span = triton.cdiv(tiles, max(wanted, 1))
    return span, triton.cdiv(tiles, span)


def summed(
    plan: Plan, x: Tensor, rows: int, bias: Tensor | None, start: Callable[[Tensor | None, Tensor], None]
) -> Tensor:
    """[M, rows] for x [M, in], by one kernel or by one kernel and the reduce of its splits.

    start: starts the kernel on a target [M, rows] with a bias, or on one [splits, M, rows] without.
    """
    tokens = x.shape[0]
    y = torch.empty(tokens, rows, dtype=result_dtype(x.dtype), device=x.device)
    if plan.splits == 1:
        start(bias, y)
    else:
        parts = torch.empty(plan.splits, tokens, rows, dtype=torch.float32, device=x.device)
        start(None, parts)
        grid = (triton.cdiv(rows, REDUCE.rows), tokens)
        reduce_splits[grid](parts, bias, y, tokens, rows, plan.splits, BN=REDUCE.rows, num_warps=REDUCE.warps)
    return y.to(x.dtype)


def rows_of_tokens(x: Tensor) -> Tensor:
    """x [..., in] as [tokens, in] with neighbouring columns together in memory; the rows may have any stride."""
    tokens = x.reshape(-1, x.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def capability_of(x: Tensor) -> int:
    """The first number of the compute capability of x's GPU; 0 without one."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels store: `dtype`, but float32 in the interpreter, which cuts bfloat16 off where GPUs round."""
    return torch.float32 if interpreted() else dtype


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def configured(kernel: str, tiles: Tiles, columns: int, parts: bool = False, **constants: Any) -> Configuration:
    """A kernel with its tiles. columns: input columns of a weight that a program makes in a round of its loop.

    parts: it makes parts of a split, in float32 and without a bias.
    """
    constants |= {"BN": tiles.rows}
    if parts:
        constants["bias_ptr"] = None
    if "gemm" in kernel:
        constants |= {"BM": tiles.tokens, "INTERPRETED": False}
    return Configuration(
        kernel, constants, tiles.warps, tiles.stages, tiles.rows * columns, tiles.architectures, tiles.float16, parts,
        tiles.registers,
    )  # fmt: skip
