"""The plan of a structure step: how much goes, what the smaller model looks like, and what it costs to get there.

Sizes follow from the configuration alone, but which linears make which must be found out (`arch/couplings.py`), so
this plan builds the model without weights; it takes some seconds where that of method steps takes a fraction.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from llmcompress.arch import Architecture, find_couplings, match_names
from llmcompress.building import build
from llmcompress.cost import HEADER, LIBRARIES, Cost, gradient_bytes, hidden_bytes, samples_and_length, speed
from llmcompress.errors import PlanError
from llmcompress.layout import block_index, block_linears
from llmcompress.plan import Plan, PlannedLinear, dense_plan
from llmcompress.recipe import Recipe, StructureStep, matches
from llmcompress.source import ModelSource
from llmcompress.structure import Depth, Structure, Width
from llmcompress.structure.groups import Group, find_groups, kept_positions
from llmcompress.structure.reshape import build_smaller, narrower, shallower
from llmcompress.structure.selection import protected, uniform_width

NO_GROUP = {
    "mlp_channel": "no linear of its blocks has inputs that come channel by channel from other linears",
    "kv_group": "no linear of its blocks has inputs that come in attention heads",
    "query_head": "its attention heads do not share keys and values, so none can go without the others; use kv_group",
}


@dataclass(frozen=True, slots=True)
class StructurePlan(Plan):
    """A structure step that fits a model; no linear has a method."""

    step: StructureStep
    group: Group | None  # what becomes narrower; None where whole blocks go
    widths: dict[int, int]  # units that each block keeps; empty where whole blocks go
    drop: int  # how many blocks go
    smaller: ModelSource  # as far as it is known: with `drop`, as if the last blocks went

    @property
    def needs_data(self) -> bool:
        """Whether anything is gathered from calibration data."""
        return needs_data(self.step.options)

    @property
    def result(self) -> ModelSource:
        """The smaller model."""
        return self.smaller

    @property
    def extent(self) -> tuple[int, int, int]:
        """Units or blocks that there are, how many of them go, and how many must go at once."""
        if self.group is None:
            return self.count, self.drop, 1
        return self.group.units, self.group.units - min(self.widths.values()), 1


def plan_structure(recipe: Recipe, source: ModelSource, step: StructureStep, keep: int | None = None) -> StructurePlan:
    """Fit a structure step to a model. Raises PlanError with the first thing that does not fit and what would.

    keep: how many units of a block, or how many blocks, stay; by default what the budget says.
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


def needs_data(options: Structure) -> bool:
    """Whether calibration text is read: for the score, or to make up for what goes."""
    if isinstance(options, Width):
        return options.score.walk != "weights" or options.compensate != "none"
    return options.score.looks_at_data


def plan_width(dense: Plan, step: StructureStep, keep: int | None) -> StructurePlan:
    """Every block becomes narrower."""
    options, source = step.options, dense.source
    assert isinstance(options, Width)
    model, architecture = build(source, dense.dtype, trust_remote_code=dense.recipe.trust_remote_code)
    block = model.get_submodule(architecture.block(0))
    groups = find_groups(block, find_couplings(model, architecture.linears))
    if step.name not in groups:
        raise PlanError(f"{source.name}: {type(model).__name__} has no {step.name}: {NO_GROUP[step.name]}")
    group = groups[step.name]
    check_kept(dense, architecture, group, step)
    has_bias = getattr(block.get_submodule(group.consumer), "bias", None) is not None
    if options.compensate == "mean" and not has_bias:
        raise PlanError(
            f"{step.where}.compensate: mean is a bias, and {group.consumer} of {type(model).__name__} has none; use "
            "least_squares"
        )
    shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
    per_unit = group.parameters_per_unit(shapes)
    width = keep
    if width is None:
        removed = parameters_to_remove(dense, options, step.where, per_unit * group.units * dense.count)
        width = uniform_width(group.units, removed / per_unit / dense.count, options.multiple, step.where)
    widths = dict.fromkeys(range(dense.count), width)
    stored = match_names(model, source.tensors)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for index in range(dense.count):
        gone = torch.arange(widths[index], group.units)  # which ones does not matter to shapes
        kept = kept_positions(group, gone, shapes)
        for (name, dim), positions in kept.items():
            path = f"{architecture.block(index)}.{name}"
            parameters[path] = resized(parameters[path], dim, len(positions))
    config = narrower(source.config, model, step.name, width)
    build_smaller(config, parameters, source.name, heads=step.name != "mlp_channel")
    tensors = {}
    for name, found in stored.items():
        info = source.tensors[found[0]]
        shape = parameters[name] if len(found) == 1 else info.shape
        tensors[info.name] = replace(info, shape=shape, bytes=prod(shape) * info.bytes // prod(info.shape))
    gone_parameters = per_unit * sum(group.units - kept for kept in widths.values())
    note = f"{step.name}: {group.units} -> {width} in each of {dense.count} blocks removes " + shares(
        dense, gone_parameters, per_unit * group.units * dense.count
    )
    return extended(
        dense, step, group, widths, 0, replace(source, config=config, tensors=source.tensors | tensors), note
    )


def check_kept(dense: Plan, architecture: Architecture, group: Group, step: StructureStep) -> None:
    """What is kept on purpose cannot become narrower."""
    for index in range(dense.count):
        for linear in (*group.rows, group.consumer):
            name = f"{architecture.block(index)}.{linear}"
            if matches(name, dense.recipe.keep):
                raise PlanError(
                    f"keep: {name} is kept, and {step.where} ({step.name}) would make it narrower, as it does in every "
                    "block; remove it from `keep`"
                )


def plan_depth(dense: Plan, step: StructureStep, keep: int | None) -> StructurePlan:
    """Some unprotected blocks go."""
    options, source = step.options, dense.source
    model, architecture = build(source, dense.dtype, trust_remote_code=dense.recipe.trust_remote_code)
    per_block = sum(prod(info.shape) for info in dense.tensors_of(0))
    free = unprotected(dense, step)
    if keep is None:
        removed = parameters_to_remove(dense, options, step.where, per_block * dense.count)
        keep = uniform_width(dense.count, removed / per_block, 1, step.where)
    drop = dense.count - keep
    if drop >= len(free):
        raise PlanError(
            f"{step.where}: {drop} blocks would go, and {len(free)} are not protected; at least one of these must stay"
        )
    config = shallower(source.config, model, list(range(dense.count - drop)))
    gone = tuple(f"{architecture.block(index)}." for index in range(dense.count - drop, dense.count))
    left = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith(gone)}
    build_smaller(config, left, source.name, heads=False)
    tensors = {name: info for name, info in source.tensors.items() if not dropped(name, dense, drop)}
    note = f"block: {dense.count} -> {dense.count - drop} removes " + shares(
        dense, drop * per_block, per_block * dense.count
    )
    return extended(dense, step, None, {}, drop, replace(source, config=config, tensors=tensors), note)


def dropped(name: str, plan: Plan, count: int) -> bool:
    """Whether a tensor is in one of the last `count` blocks."""
    return name.startswith(plan.blocks + ".") and block_index(name, plan.blocks) >= plan.count - count


def resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """shape with another size of one dimension."""
    return (*shape[:dim], size, *shape[dim + 1 :])


def unprotected(dense: Plan, step: StructureStep) -> set[int]:
    """Numbers of the blocks that may go."""
    options = step.options
    assert isinstance(options, Depth)
    free = set(range(dense.count)) - protected(dense.count, options.protect_first, options.protect_last)
    if not free:
        raise PlanError(f"{step.where}: protect_first and protect_last leave none of the {dense.count} blocks")
    return free


def parameters_to_remove(dense: Plan, options: Structure, where: str, group: int) -> float:
    """How many parameters the budget takes away; group: those of all units in the model."""
    totals = denominators(dense, group)
    total, item = totals[options.of], dense.itemsize
    if options.ratio is not None:
        return options.ratio * total
    stays = options.parameters if options.parameters is not None else (options.bytes or 0) / item
    if stays >= total:
        raise PlanError(f"{where}: the {options.of} has {total} parameters ({total * item} bytes) and is small enough")
    return total - stays


def denominators(dense: Plan, group: int) -> dict[str, int]:
    """Parameters of everything that a budget can be a share of."""
    decoder = sum(prod(i.shape) for i in dense.source.tensors.values() if i.name.startswith(dense.blocks + "."))
    return {"model": sum(prod(i.shape) for i in dense.source.tensors.values()), "decoder": decoder, "group": group}


def shares(dense: Plan, gone: int, group: int) -> str:
    """How much goes, of every denominator, in words."""
    totals = denominators(dense, group)
    parts = [f"{gone / totals[key]:.1%} of {words}" for key, words in WORDS.items()]
    return f"{gone:,} parameters: {', '.join(parts)}"


WORDS = {"model": "the model", "decoder": "its decoder blocks", "group": "this kind of group"}


def extended(
    dense: Plan,
    step: StructureStep,
    group: Group | None,
    widths: Mapping[int, int],
    drop: int,
    result: ModelSource,
    note: str,
) -> StructurePlan:
    """The dense plan with what the step does."""
    changes = {"notes": [note], "linears": list(planned_linears(dense, result))}
    values: dict[str, Any] = {name: getattr(dense, name) for name in Plan.__slots__} | changes
    return StructurePlan(**values, step=step, group=group, widths=dict(widths), drop=drop, smaller=result)


def width_of(plan: Plan) -> int:
    """Of the hidden states."""
    return int(plan.source.config.get("hidden_size", plan.source.config.get("n_embd", 0)))


def planned_linears(dense: Plan, result: ModelSource) -> Iterator[PlannedLinear]:
    """Every linear with its bytes before and after."""
    for name, shape in block_linears(dense.source, dense.blocks, dense.transposed).items():
        left = result.tensors.get(f"{name}.weight")
        sizes = (prod(s) * dense.itemsize for s in (shape, left.shape if left else (0,)))
        yield PlannedLinear(name, block_index(name, dense.blocks), shape, (), (), None, *sizes)


def predict(plan: StructurePlan) -> Cost:
    """What the step will take: the largest of embedding, scoring, one block with its compensation, and proving."""
    item = plan.itemsize
    output = sum(prod(info.shape) for info in plan.result.tensors.values()) * item + HEADER * len(plan.result.tensors)
    hidden = hidden_bytes(plan)
    samples, length = samples_and_length(plan)
    shapes = list(block_linears(plan.source, plan.blocks, plan.transposed).values())
    linears = [s for s in shapes[: len(shapes) // plan.count]]
    block = sum(prod(info.shape) for info in plan.tensors_of(0)) * item
    table = max((prod(info.shape) * item for info in plan.tensors_of(None)), default=0)
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    widest = max(columns for _, columns in linears)
    inside = min(samples * length, max(4096, length)) * (4 * widest * 4 + sum(rows for rows, _ in linears) * item)
    operations = 2.0 * samples * length * sum(prod(s) for s in shapes)
    seconds = 12.0 + 2 * 1.6 * operations / speed(plan)
    solving, gradients, disk = 0, 0, 0
    options = plan.step.options
    if isinstance(options, Depth):
        copies, walks = options.score.effort(plan.count, plan.drop, samples)
        gradients = 2 * block + int(copies * length * width_of(plan) * item) + inside
        seconds = 12.0 + 1.6 * 2.0 * walks * length * sum(prod(s) for s in shapes) / speed(plan)
    if isinstance(options, Width):
        if options.compensate == "least_squares":
            solving = 4 * widest**2 * 2 + 8 * 4 * widest**2  # the Gram matrix; what is solved is in float64
        if options.score.walk == "gradients":
            gradients = gradient_bytes(plan, table, linears, 2 * sum(prod(s) for s in linears))
            disk = plan.count * hidden * 4 // item
            seconds += 4 * operations / speed(plan, "float32")
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
