"""The plan of a step that removes whole decoder blocks."""

from dataclasses import replace
from math import prod

from llmcompress.arch import Architecture, Module
from llmcompress.building import build
from llmcompress.errors import PlanError
from llmcompress.layout import block_index
from llmcompress.plan import Plan
from llmcompress.recipe import StructureStep
from llmcompress.structure.reshape import build_smaller, shallower
from llmcompress.structure.selection import Share, uniform_width
from llmcompress.structure_budget import (
    StructurePlan,
    denominators,
    extended,
    parameters_to_remove,
    shares,
    unprotected,
)


def plan_depth(dense: Plan, step: StructureStep, keep: int | None) -> StructurePlan:
    """Some unprotected blocks go."""
    options, source = step.options, dense.source
    model, architecture = build(source, dense.dtype, trust_remote_code=dense.recipe.trust_remote_code)
    totals = totals_of(model, architecture)
    per_block = totals["decoder"] / dense.count  # on average, should they differ in width
    free = unprotected(dense, step)
    if keep is None:
        removed = parameters_to_remove(totals, options, step.where, dense.itemsize)
        share = Share(options.of, per_block / totals[options.of])
        keep = uniform_width(dense.count, removed / per_block, 1, step.where, share)
    drop = dense.count - keep
    if drop >= len(free):
        raise PlanError(
            f"{step.where}: {drop} blocks would go, and {len(free)} are not protected; at least one of these must stay"
        )
    return without_blocks(dense, step, model, architecture, list(range(keep, dense.count)))


def without_blocks(
    dense: Plan, step: StructureStep, model: Module, architecture: Architecture, gone: list[int]
) -> StructurePlan:
    """The plan in which these blocks go; which ones is known only after the scores, and matters where blocks differ."""
    source = dense.source
    config = shallower(source.config, model, [index for index in range(dense.count) if index not in gone])
    paths = {f"{architecture.block(index)}.": index for index in range(dense.count)}
    left = {}
    for name, parameter in model.named_parameters():
        old = next((index for path, index in paths.items() if name.startswith(path)), None)
        if old not in gone:
            left[renumbered(name, architecture.blocks, old, gone)] = tuple(parameter.shape)
    build_smaller(config, left, source.name, heads=False)
    tensors = {}
    for name, info in source.tensors.items():
        old = block_index(name, dense.blocks) if name.startswith(dense.blocks + ".") else None
        if old not in gone:
            tensors[renumbered(name, dense.blocks, old, gone)] = info
    totals = totals_of(model, architecture)
    removed = totals["model"] - sum(prod(shape) for shape in left.values())
    note = f"block: {dense.count} -> {dense.count - len(gone)} removes {shares(totals, removed)}"
    return extended(dense, step, {}, {}, len(gone), replace(source, config=config, tensors=tensors), note)


def totals_of(model: Module, architecture: Architecture) -> dict[str, int]:
    """Parameters of everything that a budget can be a share of; the blocks are this kind of group."""
    totals = denominators(model, architecture.blocks, 0)
    return totals | {"group": totals["decoder"]}


def renumbered(name: str, blocks: str, old: int | None, gone: list[int]) -> str:
    """The name of a tensor or parameter of block `old` after the blocks `gone` have gone."""
    if old is None:
        return name
    new = old - sum(index < old for index in gone)
    return f"{blocks}.{new}." + name.removeprefix(f"{blocks}.{old}.")
