"""What a run will take, predicted from shapes: one formula for every quantity, whatever kind of step asks.

A run is a list of phases. The peak of its host memory is that of the largest phase, on top of the interpreter with its
libraries; times and disk add up (`cost_of`). Which phases there are, the plan of each kind of step knows:
`method_cost.py`, `structure_cost.py`, `hidden_plan.py`, `training_plan.py`. What they are made of:

    table      the largest tensor outside the blocks: embedding table or output head
    block      the largest decoder block
    hidden     hidden states of all calibration windows
    passing    what one batch of tokens needs inside a block

    embedding  2 table + hidden
    gradients  the larger of
               - table, the same in float32, hidden and a window's logits three times
               - block as stored and in float32, each gathered weight's gradient and statistics, hidden twice, and
                 what a window leaves behind in a block
    proving    2 table + the logits of a sample, twice

Time is the number of operations over this machine's speed, which is measured in a moment.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.lazy import torch
from llmcompress.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from llmcompress.plan import Plan

LIBRARIES = 640 * 2**20  # resident bytes of Python with torch and transformers imported and a model class built
HEADER = 120  # bytes of one entry in a safetensors header, about
BATCH_TOKENS = 4096  # tokens of one forward pass, as the stream takes them
PROOF_SAMPLES, PROOF_LENGTH = 2, 64  # random tokens that prove a data-free result
START = 12.0  # seconds until the first block is at hand, and for what comes after the last
OVERHEAD = 1.6  # a pass through linears takes so many times what their products alone would
ON_THE_WAY = 3  # float32 copies of what linears read and write that a pass back needs


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes."""

    peak_host_bytes: int
    peak_device_bytes: int
    disk_bytes: int
    output_bytes: int  # all safetensors files
    seconds: float  # up to the finished checkpoint; evaluation is not in it


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run."""

    memory: float = 0.0  # bytes at its worst moment, besides the libraries
    seconds: float = 0.0
    disk: int = 0  # bytes that it keeps for later, besides the result


def cost_of(plan: "Plan", output: int, phases: Iterable[Phase]) -> Cost:
    """What phases take together; output: bytes of the result."""
    phases = list(phases)
    peak = LIBRARIES + int(max(phase.memory for phase in phases))
    return Cost(
        peak_host_bytes=peak,
        peak_device_bytes=0 if plan.on_cpu else peak - LIBRARIES,
        disk_bytes=output + sum(phase.disk for phase in phases) + plan.source.fetch_bytes,
        output_bytes=output,
        seconds=START + sum(phase.seconds for phase in phases),
    )


# ---- sizes: of the model, and of what goes through it ----------------------------------------------------------------


def hidden_size(plan: "Plan") -> int:
    """Width of the hidden states."""
    return int(plan.source.config.get("hidden_size", plan.source.config.get("n_embd", 0)))


def vocabulary(plan: "Plan") -> int:
    """Tokens that there are."""
    return int(plan.source.config.get("vocab_size", 0))


def stored_bytes(tensors: Iterable[TensorInfo], item: int) -> int:
    """Of safetensors files with these tensors, at `item` bytes a number."""
    return sum(prod(info.shape) * item + HEADER for info in tensors)


def table_bytes(plan: "Plan") -> int:
    """Of the largest tensor outside the blocks."""
    return max((prod(info.shape) for info in plan.tensors_of(None)), default=0) * plan.itemsize


def largest_block(plan: "Plan") -> int:
    """Number of the block with the most parameters; nearly always all blocks have as many."""
    if "per_layer_config" not in plan.source.config:
        return 0
    return max(range(plan.count), key=lambda index: sum(prod(info.shape) for info in plan.tensors_of(index)))


def block_bytes(plan: "Plan") -> int:
    """Of the largest block."""
    return sum(prod(info.shape) for info in plan.tensors_of(largest_block(plan))) * plan.itemsize


def block_shapes(plan: "Plan") -> list[tuple[int, int]]:
    """[out, in] of every linear of the largest block."""
    largest = largest_block(plan)
    return [linear.shape for linear in plan.linears if linear.block == largest]


def linear_weights(plan: "Plan") -> int:
    """Weights of the linears of all blocks."""
    return sum(prod(linear.shape) for linear in plan.linears)


def samples_and_length(plan: "Plan") -> tuple[int, int]:
    """Token windows that go through the blocks."""
    options = plan.recipe.calibration
    return (options.samples, options.length) if options and plan.needs_data else (PROOF_SAMPLES, PROOF_LENGTH)


def tokens_of(plan: "Plan") -> int:
    """Tokens of all these windows."""
    samples, length = samples_and_length(plan)
    return samples * length


def hidden_bytes(plan: "Plan") -> int:
    """Hidden states of all windows."""
    return tokens_of(plan) * hidden_size(plan) * plan.itemsize


def exact_hidden_bytes(plan: "Plan", share: float) -> int:
    """Those of a share of the windows in float32."""
    return int(share * hidden_bytes(plan)) * 4 // plan.itemsize


# ---- memory, besides the libraries -----------------------------------------------------------------------------------


def passing_bytes(plan: "Plan") -> int:
    """Inside a block while one batch of tokens goes through: what linears return, and four of the widest in float32."""
    _, length = samples_and_length(plan)
    tokens, shapes = min(tokens_of(plan), max(BATCH_TOKENS, length)), block_shapes(plan)
    widest = max((columns for _, columns in shapes), default=0)
    return tokens * (4 * 4 * widest + sum(rows for rows, _ in shapes) * plan.itemsize)


def embedding(plan: "Plan") -> Phase:
    """Hidden states are made, and written twice: a run that is killed has a whole set."""
    hidden = hidden_bytes(plan)
    return Phase(2 * table_bytes(plan) + hidden, disk=2 * hidden)


def proving(plan: "Plan") -> Phase:
    """The logits that the reloaded model must reproduce."""
    _, length = samples_and_length(plan)
    return Phase(2 * table_bytes(plan) + 2 * min(length, 512) * vocabulary(plan) * plan.itemsize)


def gradients(plan: "Plan", weights: int, moments: int, share: float = 1.0) -> Phase:
    """A float32 walk to the last block and back.

    weights: those of the largest block whose gradients are gathered.  moments: float32 numbers kept for each of them.
    share: of the calibration windows that are taken.
    """
    _, length = samples_and_length(plan)
    table, item = table_bytes(plan), plan.itemsize
    hidden = exact_hidden_bytes(plan, share)
    head = table + table * 4 // item + hidden + 3 * 4 * length * vocabulary(plan)
    block = block_bytes(plan) // item * (item + 4)
    behind = ON_THE_WAY * 4 * length * sum(sum(shape) for shape in block_shapes(plan))
    inside = block + 4 * (moments + 1) * weights + 2 * hidden + behind
    seconds = 4 * share * 2.0 * tokens_of(plan) * linear_weights(plan) / speed(plan, "float32")
    return Phase(max(head, inside), seconds, plan.count * hidden)


# ---- time ------------------------------------------------------------------------------------------------------------


def pass_seconds(plan: "Plan", tokens: float, weights: int | None = None) -> float:
    """So many tokens through linears with so many weights; by default once through all blocks."""
    weights = linear_weights(plan) if weights is None else weights
    return OVERHEAD * 2.0 * weights * tokens / speed(plan)


def gram_seconds(plan: "Plan", features: Iterable[int]) -> float:
    """Gram matrices of inputs of so many features each, over all windows."""
    return sum(1.3 * tokens_of(plan) * count**2 for count in features) / speed(plan, "float32")


def speed(plan: "Plan", dtype: str = "") -> float:
    """Floating-point operations per second of a matrix product in a dtype, by default the recipe's."""
    dtype = dtype or plan.recipe.dtype
    return cpu_speed() * cpu_gain(dtype) if plan.on_cpu else gpu_speed(dtype, str(plan.device))


@cache
def cpu_speed() -> float:
    """Of this CPU, in float32. NumPy's product is as fast as torch's, and loads in a twentieth of the time."""
    import numpy

    a = numpy.ones((512, 1024), numpy.float32)
    return timed(lambda: float((a @ a.T)[0, 0]))


@cache
def cpu_gain(dtype: str) -> float:
    """How much faster torch's products are in this dtype than in float32: twice with instructions for it."""
    flags = Path("/proc/cpuinfo")
    return 2.0 if dtype == "bfloat16" and flags.exists() and "avx512_bf16" in flags.read_text() else 1.0


@cache
def gpu_speed(dtype: str, device: str) -> float:
    """The same on a GPU."""
    a = torch.ones(512, 1024, dtype=getattr(torch, dtype), device=device)
    return timed(lambda: float((a @ a.T)[0, 0]))  # a float waits for the device


def timed(product: Callable[[], float]) -> float:
    """Floating-point operations per second of a product [512, 1024] x [1024, 512]."""
    product()
    start = time.perf_counter()
    for _ in range(3):
        product()
    return 3 * 2 * 512 * 512 * 1024 / (time.perf_counter() - start)
