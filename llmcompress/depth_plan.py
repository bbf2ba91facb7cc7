"""The plan of a step that removes whole decoder blocks."""

from dataclasses import replace
from math import prod

from llmcompress.building import build
from llmcompress.errors import PlanError
from llmcompress.layout import block_index
from llmcompress.plan import Plan
from llmcompress.recipe import StructureStep
from llmcompress.structure.reshape import build_smaller, shallower
from llmcompress.structure.selection import uniform_width
from llmcompress.structure_budget import StructurePlan, extended, parameters_to_remove, shares, unprotected


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
    return extended(dense, step, {}, {}, drop, replace(source, config=config, tensors=tensors), note)


def dropped(name: str, plan: Plan, count: int) -> bool:
    """Whether a tensor is in one of the last `count` blocks."""
    return name.startswith(plan.blocks + ".") and block_index(name, plan.blocks) >= plan.count - count
