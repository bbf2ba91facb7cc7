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
from llmcompress.cost import HEADER, LIBRARIES, PROOF_SAMPLES, Cost, hidden_bytes, samples_and_length, speed
from llmcompress.errors import PlanError
from llmcompress.layout import block_linears
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
    return replace(plan, predicted=predict(plan))


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


def predict(plan: HiddenPlan) -> Cost:
    """What the step takes: the largest of embedding, scoring a block, cutting the largest tensor, and proving."""
    item, (samples, length) = plan.itemsize, samples_and_length(plan)
    output = sum(prod(info.shape) for info in plan.result.tensors.values()) * item + HEADER * len(plan.result.tensors)
    hidden = hidden_bytes(plan)
    block = sum(prod(info.shape) for info in plan.tensors_of(0)) * item
    table = max((prod(info.shape) * item for info in plan.tensors_of(None)), default=0)
    outside = min(sum(prod(info.shape) * item for info in plan.tensors_of(None)), max(2**30, table))  # one shard
    shapes = list(block_linears(plan.source, plan.blocks, plan.transposed).values())
    linears = shapes[: len(shapes) // plan.count]
    widest = max(columns for _, columns in linears)
    inside = min(samples * length, max(4096, length)) * (4 * widest * 4 + sum(rows for rows, _ in linears) * item)
    powers = plan.residual.rescaling.powers
    rescaled = any(powers[name] for name, dim in plan.residual.dims.items() if name in powers and dim == 1)
    cutting = outside + 2 * table + (2 * table * 4 // item if rescaled else 0)  # read, what stays, that in float32
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    proving = 2 * table + 2 * min(length, 512) * vocabulary * item
    peak = LIBRARIES + max(2 * table + hidden, 3 * block + hidden + inside, cutting, proving)
    operations = 2.0 * sum(prod(shape) for shape in shapes) * length
    walks = PROOF_SAMPLES + (2 * samples if plan.needs_data else 0)
    return Cost(
        peak_host_bytes=peak,
        peak_device_bytes=0 if plan.on_cpu else peak - LIBRARIES,
        disk_bytes=output + 2 * hidden + plan.source.fetch_bytes,
        output_bytes=output,
        seconds=12.0 + 1.6 * operations * walks / speed(plan),
    )
