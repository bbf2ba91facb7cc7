"""The plan of a step that makes blocks narrower, or takes their attention or MLP away."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

from llmcompress.arch import Architecture, Module, match_names
from llmcompress.building import build
from llmcompress.errors import PlanError
from llmcompress.lazy import torch
from llmcompress.plan import Plan
from llmcompress.recipe import StructureStep, TrainStep, matches
from llmcompress.structure import Sublayer, Width
from llmcompress.structure.groups import Group, groups_of, kept_positions
from llmcompress.structure.reshape import HEADS, bias_key, build_smaller, narrower, with_biases
from llmcompress.structure.selection import Ranking, Share, ranking_of, uniform_width
from llmcompress.structure_budget import (
    StructurePlan,
    denominators,
    extended,
    parameters_to_remove,
    resized,
    shares,
    unprotected,
)

NO_GROUP = {
    "mlp_channel": "no linear of its blocks has inputs that come channel by channel from other linears",
    "mlp": "no linear of its blocks has inputs that come channel by channel from other linears",
    "kv_group": "no linear of its blocks has inputs that come in attention heads",
    "attention": "no linear of its blocks has inputs that come in attention heads",
    "query_head": "its attention heads do not share keys and values, so none can go without the others; use kv_group",
}
Shapes = dict[str, tuple[int, ...]]


def plan_width(dense: Plan, step: StructureStep, keep: int | None) -> StructurePlan:
    """What stays of every block; keep: units of a block, or parameters of all units where one ranking decides."""
    options = step.options
    assert isinstance(options, Width | Sublayer)
    model, architecture = build(dense.source, dense.dtype, trust_remote_code=dense.recipe.trust_remote_code)
    groups = groups_of(model, architecture, step.name)
    if not groups:
        raise PlanError(f"{dense.source.name}: {type(model).__name__} has no {step.name}: {NO_GROUP[step.name]}")
    free = {index: group for index, group in groups.items() if index in unprotected(dense, step)}
    if not free:
        raise PlanError(f"{step.where}: no block that is not protected has {step.name} left")
    check_kept(dense, architecture, free, step)
    if options.compensate == "mean":
        check_bias(model, architecture, free, step)
    if options.zeros:
        return with_zeros(dense, step, model, architecture, groups, free)
    costs = unit_costs(model, architecture, groups)
    totals = totals_of(model, architecture, groups, costs)
    ranking = ranking_for(dense, step, free, costs, totals, keep) if options.widths == "global" else None
    narrow = ranking.spread() if ranking else dict.fromkeys(free, width_for_all(dense, step, free, costs, totals, keep))
    widths = {index: narrow.get(index, group.units) for index, group in groups.items()}
    return replace(with_widths(dense, step, model, architecture, groups, widths), ranking=ranking)


def ranking_for(
    dense: Plan,
    step: StructureStep,
    free: Mapping[int, Group],
    costs: Mapping[int, int],
    totals: Mapping[str, int],
    keep: int | None,
) -> Ranking:
    """What one ranking of the units of all unprotected blocks is to decide; keep: parameters of these that stay."""
    options = step.options
    assert isinstance(options, Width | Sublayer)
    units = {index: group.units for index, group in free.items()}
    if keep is not None:
        found = Ranking(units, {index: costs[index] for index in units}, options.multiple, options.fewest, 0)
        return replace(found, remove=found.parameters - keep)
    remove = parameters_to_remove(totals, options, step.where, dense.itemsize)
    one = Share(options.of, 1 / totals[options.of])
    return ranking_of(units, costs, remove, options.multiple, options.fewest, step.where, one)


def width_for_all(
    dense: Plan,
    step: StructureStep,
    free: Mapping[int, Group],
    costs: Mapping[int, int],
    totals: Mapping[str, int],
    keep: int | None,
) -> int:
    """The units that stay of every unprotected block, by the budget; keep: if that is known."""
    if len({group.units for group in free.values()}) > 1:
        raise PlanError(f"{step.where}.widths: blocks of {dense.source.name} have unlike widths; use global")
    if keep is not None:
        return keep
    options, each = step.options, sum(costs[index] for index in free)  # parameters of one unit of every block
    assert isinstance(options, Width)
    remove = parameters_to_remove(totals, options, step.where, dense.itemsize) / each
    share = Share(options.of, each / totals[options.of])
    return uniform_width(next(iter(free.values())).units, remove, options.multiple, step.where, share)


def with_zeros(
    dense: Plan,
    step: StructureStep,
    model: Module,
    architecture: Architecture,
    groups: Mapping[int, Group],
    free: Mapping[int, Group],
) -> StructurePlan:
    """The plan as if no unit were zero, which the weights will tell. Raises PlanError if stock code could lose none."""
    widths = {index: group.units for index, group in groups.items()}
    first, fewest = min(free), step.options.fewest  # type: ignore[attr-defined]  # of structures with groups
    with_widths(dense, step, model, architecture, groups, widths | {first: max(widths[first] - 1, fewest)})
    plan = with_widths(dense, step, model, architecture, groups, widths)
    return replace(plan, notes=[f"{step.name}: units that are zero go, of {sum(widths.values())}"])


def unit_costs(model: Module, architecture: Architecture, groups: Mapping[int, Group]) -> dict[int, int]:
    """Parameters of one unit of every block; sub-layers and heads of blocks that differ in width have other ones."""
    blocks = {index: model.get_submodule(architecture.block(index)) for index in groups}
    return {index: group.parameters_per_unit(shapes_of(blocks[index])) for index, group in groups.items()}


def totals_of(
    model: Module, architecture: Architecture, groups: Mapping[int, Group], costs: Mapping[int, int]
) -> dict[str, int]:
    """Parameters of everything that a budget can be a share of; costs: see `unit_costs`."""
    units = sum(group.units * costs[index] for index, group in groups.items())
    return denominators(model, architecture.blocks, units)


def shapes_of(module: Module) -> Shapes:
    """Shape of every parameter below a module, by name."""
    return {name: tuple(value.shape) for name, value in module.named_parameters()}


def with_widths(
    dense: Plan,
    step: StructureStep,
    model: Module,
    architecture: Architecture,
    groups: Mapping[int, Group],
    widths: Mapping[int, int],
) -> StructurePlan:
    """The plan in which every block keeps so many units. Raises PlanError if stock code cannot have such a model."""
    source = dense.source
    stored, parameters = match_names(model, source.tensors), shapes_of(model)
    for index, group in groups.items():
        block = model.get_submodule(architecture.block(index))
        gone = torch.arange(widths[index], group.units)  # which ones does not matter to shapes
        for (name, dim), positions in kept_positions(group, gone, shapes_of(block)).items():
            path = f"{architecture.block(index)}.{name}"
            parameters[path] = resized(parameters[path], dim, len(positions))
    config = narrower(source.config, model, step.name, groups, widths)
    left = {name: shape for name, shape in parameters.items() if prod(shape)}
    biases: Shapes = {}
    if getattr(step.options, "compensate", "none") == "mean" and bias_key(model, step.name):
        config, biases = with_biases(config, model, step.name, left)
    left |= biases
    with heads_that_exist(source.config, model, step.name, groups):
        build_smaller(config, left, source.name, heads=step.name in HEADS)
    tensors = dict(source.tensors)
    for name, found in stored.items():
        info = tensors.pop(found[0])
        shape = parameters[name] if len(found) == 1 else info.shape
        if prod(shape):
            tensors[info.name] = replace(info, shape=shape, bytes=prod(shape) * info.bytes // prod(info.shape))
    for name, shape in biases.items():
        weight = tensors[stored[name.removesuffix("bias") + "weight"][0]]
        stem = weight.name.removesuffix("weight")
        size = prod(shape) * weight.bytes // prod(weight.shape)
        tensors[f"{stem}bias"] = replace(weight, name=f"{stem}bias", shape=shape, bytes=size)
    smaller = replace(source, config=config, tensors=tensors)
    costs = unit_costs(model, architecture, groups)
    note = describe(step, groups, widths, costs, totals_of(model, architecture, groups, costs))
    return extended(dense, step, groups, widths, 0, smaller, note)


@contextmanager
def heads_that_exist(
    config: Mapping[str, Any], model: Module, kind: str, groups: Mapping[int, Group]
) -> Iterator[None]:
    """Add to a refusal how many heads the model's config would take, where that differs from number to number."""
    try:
        yield
    except PlanError as exc:
        if kind not in HEADS:
            raise
        units = min(group.units for group in groups.values())
        allowed = [
            n for n in range(1, units) if allows(narrower(config, model, kind, groups, dict.fromkeys(groups, n)))
        ]
        if 0 < len(allowed) < units - 1:
            raise PlanError(f"{exc}; it takes {', '.join(map(str, allowed))} of the {units} units of {kind}") from None
        raise


def allows(config: Mapping[str, Any]) -> bool:
    """Whether stock code takes a config.json for its own, whatever shapes it makes of it."""
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**config)
    except Exception:  # configs are validated in many ways, and any of them is a no
        return False
    return True


def describe(
    step: StructureStep,
    groups: Mapping[int, Group],
    widths: Mapping[int, int],
    costs: Mapping[int, int],
    totals: Mapping[str, int],
) -> str:
    """What goes, in words; costs: parameters of one unit of every block.  totals: what that is a share of."""
    units, kept = sum(group.units for group in groups.values()), sum(widths[index] for index in groups)
    gone = sum((group.units - widths[index]) * costs[index] for index, group in groups.items())
    changed = {groups[index].units: widths[index] for index in groups if widths[index] < groups[index].units}
    if step.options.widths == "global":  # type: ignore[attr-defined]  # only structures with groups are described
        how = "of which the others are zero" if step.options.zeros else "by one ranking"  # type: ignore[attr-defined]
        what = f"{units} -> {kept} in {len(groups)} blocks together, {how},"
    else:
        before, after = next(iter(changed.items()))
        count = sum(widths[index] < groups[index].units for index in groups)
        what = f"{before} -> {after} in each of {count} blocks"
    return f"{step.name}: {what} removes " + shares(totals, gone)


def check_kept(
    dense: Plan, architecture: Architecture, groups: Mapping[int, Group], step: StructureStep | TrainStep
) -> None:
    """What is kept on purpose cannot become narrower."""
    for index, group in groups.items():
        for linear in group.linears:
            name = f"{architecture.block(index)}.{linear}"
            if matches(name, dense.recipe.keep):
                raise PlanError(
                    f"keep: {name} is kept, and {step.where} ({step.name}) would make it narrower, as it does in every "
                    "block; remove it from `keep`"
                )


def check_bias(model: Module, architecture: Architecture, groups: Mapping[int, Group], step: StructureStep) -> None:
    """A mean needs a bias to go to: one that is there, or one that the configuration can switch on."""
    index, group = next(iter(groups.items()))
    consumer = model.get_submodule(f"{architecture.block(index)}.{group.consumer}")
    if getattr(consumer, "bias", None) is None and not bias_key(model, step.name):
        raise PlanError(
            f"{step.where}.compensate: mean is a bias, and {group.consumer} of {type(model).__name__} has none and no "
            "setting for one; use least_squares"
        )
