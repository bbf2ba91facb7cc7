"""What a run will take, predicted from shapes: output size, peak memory, disk and time.

Peak host memory is the largest of the run's phases, each on top of the interpreter with its libraries:

    embedding    embedding table + hidden states
    compressing  block + hidden states + Gram matrices + statistics of gradients + weights and masks that a later step
                 of the block needs + the larger of
                 - what one batch of tokens needs inside a block
                 - the largest group of stacked weights, three times in float32, and a factor of its Gram matrix
    gradients    only if surveyed, all in float32: the larger of
                 - output head + hidden states + a window's logits, three times
                 - block with gradients and their statistics + hidden states twice + a window's activations
    proving      output head + the logits of a sample, twice
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.lazy import torch
from llmcompress.stats import InputGram, InputSquares

if TYPE_CHECKING:
    from llmcompress.plan import Plan, PlannedLinear

LIBRARIES = 640 * 2**20  # resident bytes of Python with torch and transformers imported and a model class built
HEADER = 120  # bytes of one entry in a safetensors header, about
BATCH_TOKENS = 4096  # tokens of one forward pass, as the stream takes them
PROOF_SAMPLES, PROOF_LENGTH = 2, 64  # random tokens that prove a data-free result


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes."""

    peak_host_bytes: int
    peak_device_bytes: int
    disk_bytes: int
    output_bytes: int  # all safetensors files
    seconds: float  # up to the finished checkpoint; evaluation is not in it


def predict(plan: "Plan") -> Cost:
    """What the run will take."""
    saved = sum(linear.before_bytes - linear.after_bytes for linear in plan.linears)
    tensors = len(plan.source.tensors) + 3 * len(plan.linears)
    output = plan.before_bytes - saved + HEADER * tensors
    peak = peak_memory(plan)
    return Cost(
        peak_host_bytes=peak,
        peak_device_bytes=0 if plan.on_cpu else peak - LIBRARIES,
        disk_bytes=output + 2 * hidden_bytes(plan) + surveyed_bytes(plan) + plan.source.fetch_bytes,
        output_bytes=output,
        seconds=seconds(plan),
    )


def samples_and_length(plan: "Plan") -> tuple[int, int]:
    """Token windows that go through the blocks."""
    options = plan.recipe.calibration
    return (options.samples, options.length) if options and plan.needs_data else (PROOF_SAMPLES, PROOF_LENGTH)


def hidden_bytes(plan: "Plan") -> int:
    """Hidden states of all samples."""
    samples, length = samples_and_length(plan)
    return (
        samples
        * length
        * int(plan.source.config.get("hidden_size", plan.source.config.get("n_embd", 0)))
        * plan.itemsize
    )


def peak_memory(plan: "Plan") -> int:
    """Resident bytes at the worst moment; see the module's text."""
    item = plan.itemsize
    outside = [prod(info.shape) * item for info in plan.tensors_of(None)]
    table = max(outside, default=0)
    hidden = hidden_bytes(plan)
    largest = largest_block(plan)
    first = [linear for linear in plan.linears if linear.block == largest]
    block = sum(prod(info.shape) for info in plan.tensors_of(largest)) * item
    samples, length = samples_and_length(plan)
    tokens = min(samples * length, max(BATCH_TOKENS, length))
    widths = sorted({linear.shape[1] for linear in first})
    grams = sum(4 * linear.shape[1] ** 2 for linear in first if uses_gram(linear))
    looked_at = sum(4 * linear.shape[1] ** 2 for linear in first if "inputs" in plan.survey)
    solving = max((solving_bytes(linear) for linear in first), default=0)
    inside = tokens * (4 * max(widths, default=0) * 4 + sum(linear.shape[0] for linear in first) * item)
    embedding = 2 * table + hidden
    waiting = sum((item + 1) * prod(x.shape) for x in first if len(x.steps) > 1 and any(m.prunes for m in x.methods))
    waiting += sum(4 * prod(linear.shape) for linear in first if uses_gradients(linear))
    compressing = 2 * block + hidden + max(looked_at, grams + waiting) + max(solving, inside)
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    proving = 2 * table + 2 * min(length, 512) * vocabulary * item
    gradients = gradient_memory(plan, table) if "gradients" in plan.survey else 0
    return LIBRARIES + max(embedding, compressing, gradients, proving)


def largest_block(plan: "Plan") -> int:
    """Number of the block with the most parameters; nearly always all blocks have as many."""
    if "per_layer_config" not in plan.source.config:
        return 0
    return max(range(plan.count), key=lambda index: sum(prod(info.shape) for info in plan.tensors_of(index)))


def gradient_memory(plan: "Plan", table: int) -> int:
    """What backpropagation needs besides the libraries; table: bytes of the embedding table."""
    largest = largest_block(plan)
    first = [linear for linear in plan.linears if linear.block == largest]
    surveyed = sum(prod(linear.shape) for linear in first if uses_gradients(linear))
    return gradient_bytes(plan, table, [linear.shape for linear in first], surveyed)


def gradient_bytes(plan: "Plan", table: int, shapes: list[tuple[int, int]], surveyed: int, share: float = 1.0) -> int:
    """The same, for linears of a block [out, in] and `surveyed` numbers of statistics about their gradients.

    share: of the calibration windows that are taken.
    """
    _, length = samples_and_length(plan)
    hidden = int(share * hidden_bytes(plan)) * 4 // plan.itemsize
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    head = table + table * 4 // plan.itemsize + hidden + 3 * 4 * length * vocabulary
    block = sum(prod(info.shape) for info in plan.tensors_of(largest_block(plan)))
    activations = 3 * 4 * length * sum(sum(shape) for shape in shapes)
    return max(head, block * (plan.itemsize + 4) + 2 * 4 * surveyed + 2 * hidden + activations)


def surveyed_bytes(plan: "Plan") -> int:
    """Disk for inputs of every block, and for statistics of gradients."""
    if "gradients" not in plan.survey:
        return 0
    inputs = plan.count * hidden_bytes(plan) * 4 // plan.itemsize
    return inputs + sum(4 * prod(linear.shape) for linear in plan.linears if uses_gradients(linear))


def solving_bytes(linear: "PlannedLinear") -> int:
    """What a method holds while it works on a linear, and on one other of the same shape that shares its input."""
    rows, columns = linear.shape
    factor = 4 * columns**2 * 3 // 2 if uses_gram(linear) else 0
    return 3 * 2 * 4 * rows * columns + factor


def uses_gram(linear: "PlannedLinear") -> bool:
    """Whether a Gram matrix is gathered for this linear, if only of a sample."""
    return any(method.needs in (InputGram, InputSquares) for method in linear.methods)


def uses_gradients(linear: "PlannedLinear") -> bool:
    """Whether statistics of its gradient are gathered."""
    return any("gradients" in method.survey for method in linear.methods)


def seconds(plan: "Plan") -> float:
    """Time of the run from its operation counts and this machine's speed, measured in a moment."""
    samples, length = samples_and_length(plan)
    tokens, elements = samples * length, sum(linear.shape[0] * linear.shape[1] for linear in plan.linears)
    passes = 2 if plan.needs_data else 1
    forward = 2.0 * elements * tokens * passes / speed(plan)
    grams = gram_seconds(plan, [x for x in plan.linears if any(m.needs is InputGram for m in x.methods)])
    return 12.0 + 1.6 * forward + grams + sum(solve_seconds(plan, x) for x in plan.linears) + survey_seconds(plan)


def gram_seconds(plan: "Plan", linears: list["PlannedLinear"]) -> float:
    """Time for the Gram matrices of these linears' inputs."""
    samples, length = samples_and_length(plan)
    inputs = {(linear.block, linear.shape[1]) for linear in linears}
    return sum(1.3 * samples * length * columns**2 for _, columns in inputs) / speed(plan, "float32")


def survey_seconds(plan: "Plan") -> float:
    """Time of the walks over the dense model: two passes forward, or the same and one back in float32."""
    samples, length = samples_and_length(plan)
    operations = 2.0 * samples * length * sum(prod(linear.shape) for linear in plan.linears)
    total = 0.0
    if "inputs" in plan.survey:
        total += 2 * 1.6 * operations / speed(plan)
    if "gradients" in plan.survey:
        total += 4 * operations / speed(plan, "float32")
    return total


def solve_seconds(plan: "Plan", linear: "PlannedLinear") -> float:
    """Time of the methods themselves on one linear: products with the Gram matrix, and passes over the weights."""
    rows, columns = linear.shape
    products = sum(method.products for method in linear.methods) * rows * columns**2
    passes = sum(method.passes for method in linear.methods) * rows * columns
    return products / speed(plan, "float32") + passes / 1.5e9


def speed(plan: "Plan", dtype: str = "") -> float:
    """Floating-point operations per second of a matrix product in a dtype, by default the recipe's."""
    dtype = dtype or plan.recipe.dtype
    return cpu_speed() * cpu_gain(dtype) if plan.on_cpu else gpu_speed(dtype, str(plan.device))


@cache
def cpu_speed() -> float:
    """The same in float32 on the CPU. NumPy's product is as fast as torch's, and loads in a twentieth of the time."""
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
