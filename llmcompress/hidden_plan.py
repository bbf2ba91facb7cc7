"""The plan of a step that makes the residual stream narrower: one decision for the whole model.

That a smaller model computes exactly what zeros in the removed channels do is no property of a list of architectures:
it is tried on small copies (`structure/rescaling.py`), and a model for which it fails is refused here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import lcm, prod
from typing import Any

from llmcompress.arch import Module, match_names
from llmcompress.building import build
from llmcompress.cost import (
    PROOF_SAMPLES,
    Cost,
    Phase,
    block_bytes,
    cost_of,
    embedding,
    hidden_bytes,
    pass_seconds,
    passing_bytes,
    proving,
    samples_and_length,
    stored_bytes,
    table_bytes,
    tokens_of,
)
from llmcompress.errors import PlanError
from llmcompress.plan import Plan, dense_plan
from llmcompress.recipe import Recipe, StructureStep, matches
from llmcompress.source import ModelSource
from llmcompress.structure import Hidden
from llmcompress.structure.rescaling import find_rescaling
from llmcompress.structure.reshape import build_smaller
from llmcompress.structure.residual import Residual, find_residual, grain
from llmcompress.structure.selection import Share, uniform_width
from llmcompress.structure_budget import (
    WORDS,
    StructurePlan,
    denominators,
    extended,
    parameters_to_remove,
    resized,
)
from llmcompress.structure_plan import check_step


@dataclass(frozen=True, slots=True)
class HiddenPlan(StructurePlan):
    """A step of the hidden dimension that fits a model."""

    residual: Residual
    channels: int  # how many stay
    grain: int  # what stock code wants hidden sizes to be a multiple of

    @property
    def extent(self) -> tuple[int, int, int]:
        """Channels that there are, how many of them go, and how many must go at once."""
        return self.residual.width, self.residual.width - self.channels, self.grain

    @property
    def roundings(self) -> int:
        """Besides each sum: what a norm divided, its new gain, and their product, which round elsewhere than before."""
        return 4


def plan_hidden(recipe: Recipe, source: ModelSource, step: StructureStep, keep: int | None = None) -> HiddenPlan:
    """Fit a step of the hidden dimension to a model. Raises PlanError with the first thing that does not fit.

    keep: how many channels stay; by default what the budget says.
    """
    check_step(recipe, source, step)
    if "per_layer_config" in source.config:
        raise PlanError(
            f"{source.name}: its blocks differ in width; put {step.where} ({step.name}) before what made them so"
        )
    dense = dense_plan(recipe, source)
    model, architecture = build(source, dense.dtype)
    wanted = grain(source.config, model)
    width = int(model.config.hidden_size)
    rescaling = find_rescaling(model)
    residual = find_residual(source.config, model, architecture.blocks, width - wanted, rescaling)
    stored = match_names(model, source.tensors)
    check_members(dense, model, residual, stored, step)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    inside = {name: shape for name, shape in shapes.items() if name.startswith(architecture.blocks + ".")}
    each = {"model": residual.parameters_per_channel(shapes), "decoder": residual.parameters_per_channel(inside)}
    each["group"] = each["model"]
    totals = denominators(model, architecture.blocks, each["group"] * width)
    kept = channels_that_stay(dense, step, width, each, totals, wanted) if keep is None else keep
    left = {n: resized(s, residual.dims[n], kept) if n in residual.dims else s for n, s in shapes.items()}
    config = residual.config(source.config, model, kept)
    build_smaller(config, left, source.name, heads=False)
    smaller = replace(source, config=config, tensors=cut_tensors(source, stored, residual, kept))
    note = describe(width, kept, each, totals) + advice(model, wanted)
    removal = extended(dense, step, {}, {}, 0, smaller, note)
    values: dict[str, Any] = {field.name: getattr(removal, field.name) for field in fields(removal)}
    plan = HiddenPlan(**values, residual=residual, channels=kept, grain=wanted)
    scored = replace(plan, scoring=scoring_of(plan))
    return replace(scored, predicted=predict(scored))


def channels_that_stay(
    dense: Plan, step: StructureStep, width: int, each: Mapping[str, int], totals: Mapping[str, int], wanted: int
) -> int:
    """How many channels the budget leaves; each: parameters of a channel, by what the budget is a share of."""
    options = step.options
    assert isinstance(options, Hidden)
    removed = parameters_to_remove(totals, options, step.where, dense.itemsize)
    share = Share(options.of, each[options.of] / totals[options.of])
    return uniform_width(width, removed / each[options.of], lcm(options.multiple, wanted), step.where, share)


def check_members(
    dense: Plan, model: Module, residual: Residual, stored: Mapping[str, list[str]], step: StructureStep
) -> None:
    """What is kept on purpose cannot become narrower, the head aside; and every parameter must be one tensor."""
    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if module is not head}
    for name in residual.dims:
        module = name.rpartition(".")[0]
        if module in modules and matches(module, dense.recipe.keep):
            raise PlanError(
                f"keep: {module} is kept, and {step.where} ({step.name}) would make it narrower, as it does everything "
                "that has to do with the residual stream; remove it from `keep`"
            )
        if len(stored.get(name, ())) > 1:
            raise PlanError(
                f"{dense.source.name}: {name} is put together from {len(stored[name])} tensors, which {step.name} does "
                "not cut; use block"
            )


def cut_tensors(source: ModelSource, stored: Mapping[str, list[str]], residual: Residual, kept: int) -> dict[str, Any]:
    """The tensors of the smaller checkpoint, by name; one that repeats a tied parameter is cut as that is."""
    parameters = {found[0]: name for name, found in stored.items()}
    tensors = {}
    for name, info in source.tensors.items():
        dim = residual.dims.get(parameters.get(name, name))
        shape = info.shape if dim is None else resized(info.shape, dim, kept)
        tensors[name] = replace(info, shape=shape, bytes=prod(shape) * info.bytes // max(1, prod(info.shape)))
    return tensors


def describe(width: int, kept: int, each: Mapping[str, int], totals: Mapping[str, int]) -> str:
    """How much goes, of every denominator, in words."""
    gone = width - kept
    parts = [f"{gone * each[key] / totals[key]:.1%} of {words}" for key, words in WORDS.items()]
    what = f"{width} -> {kept} in the whole model removes {gone * each['model']:,} parameters"
    return f"hidden: {what}: {', '.join(parts)}"


def advice(model: Module, wanted: int) -> str:
    """What stock code wants, where it wants something."""
    return f"; {type(model).__name__} takes multiples of its {wanted} heads alone" if wanted > 1 else ""


def scoring_of(plan: HiddenPlan) -> Phase:
    """Walks over the dense model, where the score looks at data; else over its weights."""
    walks = 2 if plan.needs_data else 0
    memory = 3 * block_bytes(plan) + hidden_bytes(plan) + passing_bytes(plan)
    return Phase(memory, walks * pass_seconds(plan, tokens_of(plan)))


def predict(plan: HiddenPlan) -> Cost:
    """What the step takes: embedding, scoring a block, cutting the largest tensor, and proving."""
    item, table, (_, length) = plan.itemsize, table_bytes(plan), samples_and_length(plan)
    shard = min(sum(prod(info.shape) * item for info in plan.tensors_of(None)), max(2**30, table))
    powers = plan.residual.rescaling.powers
    rescaled = any(powers[name] for name, dim in plan.residual.dims.items() if name in powers and dim == 1)
    cut = shard + 2 * table + (2 * table * 4 // item if rescaled else 0)  # read, what stays, that in float32
    cutting = Phase(cut, pass_seconds(plan, PROOF_SAMPLES * length))
    output = stored_bytes(plan.result.tensors.values(), item)
    return cost_of(plan, output, [embedding(plan), plan.scoring, cutting, proving(plan)])
