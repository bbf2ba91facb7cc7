"""The plan of a run-time step: which linears get thresholds, and what finding them costs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from llmcompress.at_runtime import Teal
from llmcompress.at_runtime.allocation import LARGEST_RAISE
from llmcompress.cost import Cost, linear_weights, speed
from llmcompress.errors import PlanError
from llmcompress.layout import is_expert
from llmcompress.method_cost import predict
from llmcompress.packed_source import PackedSource
from llmcompress.plan import Plan, PlannedLinear, dense_plan
from llmcompress.recipe import Recipe, RuntimeStep, matches
from llmcompress.source import ModelSource
from llmcompress.thresholds import FILE

ENTRY = 160  # bytes of one linear in the file, about
TRIES = 2  # passes of a block for a raise, about


@dataclass(frozen=True, slots=True)
class RuntimePlan(Plan):
    """A run-time step that fits a model; what is stored is what the source has."""

    step: RuntimeStep

    @property
    def needs_data(self) -> bool:
        """Thresholds are quantiles on calibration data."""
        return True

    @property
    def options(self) -> Teal:
        """Of the step."""
        assert isinstance(self.step.options, Teal)
        return self.step.options

    def sparse(self, linear: str) -> bool:
        """Whether the linear at this module path gets a threshold."""
        return matches(linear, self.options.targets) and not matches(linear, self.recipe.keep)


def plan_runtime(recipe: Recipe, source: ModelSource, step: RuntimeStep) -> RuntimePlan:
    """Fit a run-time step to a model. Raises PlanError with the first thing that does not fit and what would."""
    check(recipe, source, step)
    dense = dense_plan(recipe, source)
    values: dict[str, Any] = {name: getattr(dense, name) for name in Plan.__slots__}
    plan = RuntimePlan(**values, step=step)
    found = [linear for linear in plan.linears if plan.sparse(linear.name)]
    for glob in plan.options.targets:
        if not any(matches(linear.name, [glob]) for linear in found):
            raise PlanError(f"{step.where}.targets: {glob!r} matches no linear of {source.name} that `keep` leaves")
    cost = with_search(plan, predict(plan), found)
    if isinstance(source, PackedSource):
        same = {key: getattr(source.plan, key) for key in ("format_name", "linears", "steps", "kept")}
        output = source.plan.predicted.output_bytes
        cost = replace(cost, output_bytes=output, disk_bytes=cost.disk_bytes - cost.output_bytes + output)
        plan = replace(plan, **same)
    return replace(plan, predicted=cost, notes=[describe(plan, len(found))])


def check(recipe: Recipe, source: ModelSource, step: RuntimeStep) -> None:
    """What every run-time step needs: data that is long enough, and linears that see all tokens."""
    options = step.options
    assert isinstance(options, Teal)
    if recipe.calibration is None:
        raise PlanError(f"{step.where}: {step.name} needs `calibration` data; add that block")
    length, samples = recipe.calibration.length, recipe.calibration.samples
    if length <= options.dense_tokens:
        raise PlanError(
            f"{step.where}.dense_tokens: the first {options.dense_tokens} tokens stay dense, and calibration samples "
            f"have only {length}; lower it, or raise calibration.length"
        )
    if options.allocation == "greedy" and options.search_samples > samples:
        raise PlanError(
            f"{step.where}.search_samples: {options.search_samples} windows, but calibration has {samples}; lower it"
        )
    if any(is_expert(name) for name in source.tensors):
        raise PlanError(f"{source.name}: a mixture of experts has no thresholds yet; leave {step.where} out")
    if recipe.output.format not in ("auto", "dense") and not isinstance(source, PackedSource):
        raise PlanError(
            f"output.format: {recipe.output.format!r} is for packed weights, and {step.where} ({step.name}) leaves "
            "dense ones; remove it, or quantize in an earlier step"
        )


def describe(plan: RuntimePlan, count: int) -> str:
    """The step in a line, with who takes notice of it."""
    options = plan.options
    return (
        f"{plan.step.name}: {options.sparsity:.0%} of the weights of {count} linears are left out for each token but "
        f"the first {options.dense_tokens}, by the thresholds in {FILE}, which llmcompress.load applies; weights stay "
        "as they are, and stock engines compute with all of them"
    )


def with_search(plan: RuntimePlan, cost: Cost, found: list[PlannedLinear]) -> Cost:
    """The cost of a plan and of finding the levels: passes of a block over a few windows, for every raise."""
    assert plan.recipe.calibration is not None
    extra = ENTRY * len(found)
    seconds = cost.seconds
    if plan.options.allocation == "greedy" and found:
        tokens = plan.options.search_samples * plan.recipe.calibration.length
        operations = 2.0 * linear_weights(plan) * tokens
        first = {linear.name: prod(linear.shape) for linear in found if linear.block == found[0].block}
        seconds += 2.0 * TRIES * raises(first, plan.options) * operations / speed(plan)
    return replace(cost, disk_bytes=cost.disk_bytes + extra, seconds=seconds)


def raises(sizes: Mapping[str, int], options: Teal) -> float:
    """Steps of the search in one block, if all linears end at the same level."""
    total = sum(sizes.values())
    return sum(options.sparsity / min(options.step * total / size, LARGEST_RAISE) for size in sizes.values())
