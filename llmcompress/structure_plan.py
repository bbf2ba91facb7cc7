"""The plan of a structure step: how much goes, what the smaller model looks like, and what it costs to get there.

Sizes follow from the configuration alone, but which linears make which must be found out (`arch/couplings.py`), so
this plan builds the model without weights; it takes some seconds where that of method steps takes a fraction.
"""

from dataclasses import replace
from math import prod
from typing import Any

from llmcompress.cost import (
    HEADER,
    LIBRARIES,
    Cost,
    gradient_bytes,
    hidden_bytes,
    largest_block,
    samples_and_length,
    speed,
)
from llmcompress.depth_plan import plan_depth
from llmcompress.errors import PlanError
from llmcompress.layout import block_linears
from llmcompress.plan import Plan, dense_plan
from llmcompress.recipe import Recipe, StructureStep
from llmcompress.source import ModelSource
from llmcompress.structure import Depth
from llmcompress.structure_budget import StructurePlan, needs_data
from llmcompress.width_plan import plan_width


def plan_structure(recipe: Recipe, source: ModelSource, step: StructureStep, keep: int | None = None) -> StructurePlan:
    """Fit a structure step to a model. Raises PlanError with the first thing that does not fit and what would.

    keep: how many units or blocks stay, as `StructurePlan.removal` counts them; by default what the budget says.
    """
    check_step(recipe, source, step)
    dense = dense_plan(recipe, source)
    removal = plan_depth(dense, step, keep) if isinstance(step.options, Depth) else plan_width(dense, step, keep)
    return replace(removal, predicted=predict(removal))


def check_step(recipe: Recipe, source: ModelSource, step: StructureStep) -> None:
    """What all structure steps want of a recipe and a model."""
    if recipe.calibration is None and needs_data(step.options):
        raise PlanError(f"{step.where}: {step.name} needs `calibration` data; add that block")
    if recipe.output.format not in ("auto", "dense"):
        raise PlanError(
            f"output.format: {recipe.output.format!r} is for packed weights, and {step.where} ({step.name}) leaves "
            "dense ones; remove it, or quantize in a later step"
        )
    if source.pruned:
        raise PlanError(
            f"{source.name}: {len(source.pruned)} of its linears were pruned, and {step.where} ({step.name}) would "
            "break their pattern; structure steps come first"
        )


def width_of(plan: Plan) -> int:
    """Of the hidden states."""
    return int(plan.source.config.get("hidden_size", plan.source.config.get("n_embd", 0)))


def predict(plan: StructurePlan) -> Cost:
    """What the step will take: the largest of embedding, scoring, one block with its compensation, and proving."""
    item = plan.itemsize
    output = sum(prod(info.shape) for info in plan.result.tensors.values()) * item + HEADER * len(plan.result.tensors)
    hidden = hidden_bytes(plan)
    samples, length = samples_and_length(plan)
    shapes = list(block_linears(plan.source, plan.blocks, plan.transposed).values())
    largest = largest_block(plan)
    linears = [linear.shape for linear in plan.linears if linear.block == largest]
    block = sum(prod(info.shape) for info in plan.tensors_of(largest)) * item
    table = max((prod(info.shape) * item for info in plan.tensors_of(None)), default=0)
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    widest = max(columns for _, columns in linears)
    inside = min(samples * length, max(4096, length)) * (4 * widest * 4 + sum(rows for rows, _ in linears) * item)
    operations = 2.0 * samples * length * sum(prod(s) for s in shapes)
    seconds = 12.0 + 2 * 1.6 * operations / speed(plan)
    solving, gradients, disk = 0, 0, 0
    options: Any = plan.step.options
    if isinstance(options, Depth):
        copies, walks = options.score.effort(plan.count, plan.drop, samples)
        gradients = 2 * block + int(copies * length * width_of(plan) * item) + inside
        seconds = 12.0 + 1.6 * 2.0 * walks * length * sum(prod(s) for s in shapes) / speed(plan)
    else:
        if options.compensate == "least_squares":
            solving = 4 * widest**2 * 2 + 8 * 4 * widest**2  # the Gram matrix; what is solved is in float64
        share = options.score.windows(samples) / samples
        if options.score.walk == "gradients":
            gradients = gradient_bytes(plan, table, linears, 2 * sum(prod(s) for s in linears), share)
            disk = int(plan.count * hidden * 4 // item * share)
            seconds += 4 * share * operations / speed(plan, "float32")
        elif options.score.walk == "inputs":
            seconds += 2 * 1.6 * operations / speed(plan)
    compressing = 2 * block + hidden + max(inside, solving + 3 * 4 * max(prod(s) for s in linears))
    proving = 2 * table + 2 * min(length, 512) * vocabulary * item
    peak = LIBRARIES + max(2 * table + hidden, compressing, proving, gradients)
    return Cost(
        peak_host_bytes=peak,
        peak_device_bytes=0 if plan.on_cpu else peak - LIBRARIES,
        disk_bytes=output + 2 * hidden + disk + plan.source.fetch_bytes,
        output_bytes=output,
        seconds=seconds,
    )
