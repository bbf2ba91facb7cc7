"""What a run will take, predicted from shapes: output size, peak memory, disk and time.

Peak host memory is the largest of the run's three phases, each on top of the interpreter with its libraries:

    embedding    embedding table + hidden states
    compressing  block + hidden states + Gram matrices + the larger of
                 - what one batch of tokens needs inside a block
                 - the largest group of stacked weights, three times in float32, and a factor of its Gram matrix
    proving      output head + hidden states of two samples + their logits
"""

import time
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from llmcompress.methods import IntMethod

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
        peak_device_bytes=0 if plan.device.type == "cpu" else peak - LIBRARIES,
        disk_bytes=output + 2 * hidden_bytes(plan) + plan.source.fetch_bytes,
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
        * plan.dtype.itemsize
    )


def peak_memory(plan: "Plan") -> int:
    """Resident bytes at the worst moment; see the module's text."""
    item = plan.dtype.itemsize
    outside = [prod(info.shape) * item for info in plan.tensors_of(None)]
    table = max(outside, default=0)
    hidden = hidden_bytes(plan)
    first = [linear for linear in plan.linears if linear.block == 0]
    block = sum(prod(info.shape) for info in plan.tensors_of(0)) * item
    samples, length = samples_and_length(plan)
    tokens = min(samples * length, max(BATCH_TOKENS, length))
    widths = sorted({linear.shape[1] for linear in first})
    grams = sum(4 * linear.shape[1] ** 2 for linear in first if uses_gram(plan, linear)) if plan.needs_data else 0
    solving = max((solving_bytes(plan, linear) for linear in first), default=0)
    inside = tokens * (4 * max(widths, default=0) * 4 + sum(linear.shape[0] for linear in first) * item)
    embedding = 2 * table + hidden
    compressing = 2 * block + hidden + grams + max(solving, inside)
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    proving = 2 * table + 2 * min(length, 512) * vocabulary * (item + 4)
    return LIBRARIES + max(embedding, compressing, proving)


def solving_bytes(plan: "Plan", linear: "PlannedLinear") -> int:
    """What a method holds while it works on a linear, and on one other of the same shape that shares its input."""
    rows, columns = linear.shape
    factor = 4 * columns**2 * 3 // 2 if uses_gram(plan, linear) else 0
    return 3 * 2 * 4 * rows * columns + factor


def uses_gram(plan: "Plan", linear: "PlannedLinear") -> bool:
    """Whether statistics are gathered for this linear."""
    return any(plan.steps[i].method.needs is not None for i in linear.steps)


def seconds(plan: "Plan") -> float:
    """Time of the run from its operation counts and this machine's speed, measured in a moment."""
    samples, length = samples_and_length(plan)
    tokens, elements = samples * length, sum(linear.shape[0] * linear.shape[1] for linear in plan.linears)
    passes = 2 if plan.needs_data else 1
    forward = 2.0 * elements * tokens * passes / speed(plan.dtype, plan.device)
    inputs = {(linear.block, linear.shape[1]) for linear in plan.linears if uses_gram(plan, linear)}
    grams = sum(1.3 * tokens * columns**2 for _, columns in inputs) / speed(torch.float32, plan.device)
    return 12.0 + 1.6 * forward + grams + sum(solve_seconds(plan, linear) for linear in plan.linears)


def solve_seconds(plan: "Plan", linear: "PlannedLinear") -> float:
    """Time of the methods themselves on one linear: products with the Gram matrix, and passes over the weights."""
    rows, columns = linear.shape
    total = 0.0
    for step in (plan.steps[i] for i in linear.steps):
        searched = 2.0 * 2 * getattr(step.method, "grid_points", 0)
        products = {"gptq": 2.0, "sparsegpt": 2.0, "awq": searched}.get(step.name, 0.0)
        touches = {"awq": 400.0, "sparsegpt": 60.0}.get(
            step.name, 250.0 if isinstance(step.method, IntMethod) else 30.0
        )
        total += products * rows * columns**2 / speed(torch.float32, plan.device) + touches * rows * columns / 1.5e9
    return total


_SPEEDS: dict[tuple[torch.dtype, str], float] = {}


def speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a matrix product on this device, measured once per process."""
    key = (dtype, device.type)
    if key not in _SPEEDS:
        a = torch.ones(512, 1024, dtype=dtype, device=device)
        (a @ a.T).sum().item()
        start = time.perf_counter()
        for _ in range(3):
            product = a @ a.T
        product.sum().item()  # waits for the device
        _SPEEDS[key] = 3 * 2 * 512 * 512 * 1024 / (time.perf_counter() - start)
    return _SPEEDS[key]
