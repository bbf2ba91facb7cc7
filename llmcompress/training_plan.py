"""The plan of a train step: what it needs, and what it costs."""

import os
import shutil
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from llmcompress.assignment import earlier_patterns
from llmcompress.cost import (
    Cost,
    Phase,
    block_shapes,
    cost_of,
    hidden_size,
    pass_seconds,
    speed,
    stored_bytes,
    vocabulary,
)
from llmcompress.errors import PlanError
from llmcompress.formats import FORMATS
from llmcompress.layout import is_expert
from llmcompress.plan import Plan, PlannedLinear, check_length, choose_format, dense_plan
from llmcompress.recipe import Recipe, TrainStep, matches
from llmcompress.source import ModelSource, open_source
from llmcompress.training import Recover
from llmcompress.weight import Kind

LOADING = 8.0  # seconds to load the whole model, and to write what it has learned
BEHIND = 1.25  # numbers that a pass leaves behind for each that goes into a linear or comes out


@dataclass(frozen=True, slots=True)
class TrainPlan(Plan):
    """A train step that fits a model."""

    step: TrainStep

    @property
    def needs_data(self) -> bool:
        """Whether it learns from the recipe's calibration text; without, that text still proves the result."""
        return self.recipe.calibration is not None

    @property
    def targets(self) -> list[PlannedLinear]:
        """The linears that the step prunes."""
        options = self.step.options
        return updated_linears(self) if options.leaves or options.unit_kinds else []

    @property
    def result(self) -> ModelSource:
        """The model with the zeros that the step leaves."""
        leaves = self.step.options.leaves
        pruned = {} if leaves is None else {linear.name: leaves for linear in self.targets}
        return replace(self.source, pruned=self.source.pruned | pruned)

    @property
    def kinds(self) -> dict[str, Kind]:
        """What is known of the linears that hold zeros of this step or an earlier one; a sparse format is for these."""
        return earlier_patterns(self.result.pruned, [], {linear.name: () for linear in self.linears})

    def kind_of(self, linear: str) -> Kind:
        """What the linear at this module path becomes."""
        return self.kinds.get(linear, Kind())

    @property
    def advice(self) -> str:
        """How to need less memory."""
        return "set `gradient_checkpointing: true`, a smaller micro_batch, or `parameters: lora`"


def plan_training(recipe: Recipe, source: ModelSource, step: TrainStep) -> TrainPlan:
    """Fit a train step to a dense model. Raises PlanError with the first thing that does not fit and what would."""
    options = step.options
    check_training(recipe, source, step)
    if options.lora and source.pruned:
        raise PlanError(
            f"{step.where}: merging LoRA would fill the zeros of {len(source.pruned)} pruned linears; set "
            "`parameters: all`, which keeps them"
        )
    dense = dense_plan(recipe, source)
    check_compiler(dense, step)
    values: dict[str, Any] = {name: getattr(dense, name) for name in Plan.__slots__}
    plan = TrainPlan(**values, step=step)
    check_start(plan)
    check_pruning(plan)
    check_units(plan)
    plan = stored_as_asked(plan)
    return replace(plan, predicted=predict(plan), notes=[describe(plan)])


def stored_as_asked(plan: TrainPlan) -> TrainPlan:
    """The plan with the recipe's format for what holds zeros. Raises PlanError if that has no form for some of it."""
    wanted, step, kinds = plan.recipe.output.format, plan.step, plan.kinds
    if wanted in ("auto", "dense"):
        return plan
    if not kinds:
        raise PlanError(
            f"output.format: {wanted!r} is for packed weights, and {step.where} ({step.name}) leaves dense ones; "
            "remove it, or quantize in a later step"
        )
    shapes = {linear.name: linear.shape for linear in plan.linears}
    name = choose_format(plan.recipe, kinds, shapes, plan.transposed, experts=False)
    sizes = {x: FORMATS[name].stored_bytes(kind, shapes[x], plan.itemsize) for x, kind in kinds.items()}
    linears = [replace(linear, after_bytes=sizes.get(linear.name, linear.after_bytes)) for linear in plan.linears]
    return replace(plan, format_name=name, linears=linears)


def check_training(recipe: Recipe, source: ModelSource, step: TrainStep) -> None:
    """What every train step needs: data, and a model that is no mixture of experts."""
    options = step.options
    if recipe.calibration is None and options.data is None:
        raise PlanError(f"{step.where}: {step.name} needs `calibration` data; add that block, or `data` to the step")
    if options.data:
        check_length(options.data.length, source, f"{step.where}.data")
    if any(is_expert(name) for name in source.tensors):
        raise PlanError(f"{source.name}: a mixture of experts cannot be trained yet; leave {step.where} out")


def check_compiler(dense: Plan, step: TrainStep) -> None:
    """torch.compile writes C++ for a CPU, and something must turn that into a program."""
    compiler = os.environ.get("CXX", "g++")
    if step.options.compile and dense.on_cpu and shutil.which(compiler) is None:
        raise PlanError(f"{step.where}.compile: there is no {compiler} on this machine; install it, or set it to false")


def check_start(plan: TrainPlan) -> None:
    """Random weights to begin with must not fill an earlier step's zeros, nor stay as they are drawn."""
    recipe, source, step = plan.recipe, plan.source, plan.step
    if not step.options.begins_anew:
        return
    if source.pruned:
        raise PlanError(
            f"{step.where}.start: random weights would fill the zeros of {len(source.pruned)} pruned linears; set "
            "`start: model`"
        )
    matrices = [name.removesuffix(".weight") for name, info in source.tensors.items() if len(info.shape) > 1]
    if left := [name for name in matrices if matches(name, recipe.keep)]:
        raise PlanError(
            f"{step.where}.start: random weights, of which `keep` {recipe.keep} would leave {left[0]} as it is drawn; "
            "set `keep: []`"
        )


def check_pruning(plan: TrainPlan) -> None:
    """Linears to prune that are not pruned yet, a budget that these can meet, and a mask of their shapes."""
    source, step, options = plan.source, plan.step, plan.step.options
    if options.leaves is None:
        return
    shapes = {linear.name: linear.shape for linear in plan.targets}
    if not shapes:
        raise PlanError(f"{step.where}: `keep` {plan.recipe.keep} leaves no linear for {step.name} to prune")
    if done := sorted(source.pruned.keys() & shapes.keys()):
        raise PlanError(
            f"{step.where}: {done[0]} is pruned already, and {step.name} would choose its zeros anew; `train: dense` "
            "keeps them"
        )
    try:
        options.check_shapes(shapes)
    except ValueError as exc:
        raise PlanError(f"{step.where} ({step.name}): {exc}") from None
    if options.mask_source is not None:
        check_mask(open_source(options.mask_source), plan)


def check_units(plan: TrainPlan) -> None:
    """Units to let go that the model has and that are not kept, and a budget that these can meet."""
    source, step, options = plan.source, plan.step, plan.step.options
    if not options.unit_kinds:
        return
    from llmcompress.building import build  # the model is built, so this needs torch
    from llmcompress.structure.groups import all_groups
    from llmcompress.width_plan import NO_GROUP, check_kept

    model, architecture = build(source, plan.dtype, trust_remote_code=plan.recipe.trust_remote_code)
    found = all_groups(model, architecture)
    for kind in options.unit_kinds:
        if kind not in found:
            raise PlanError(f"{source.name}: {type(model).__name__} has no {kind}: {NO_GROUP[kind]}")
        check_kept(plan, architecture, found[kind], step)
    try:
        options.check_units(model)
    except ValueError as exc:
        raise PlanError(f"{step.where} ({step.name}): {exc}") from None


def check_mask(other: ModelSource, plan: TrainPlan) -> None:
    """Raise PlanError unless another model has all linears that are pruned, in their shapes."""
    for linear in plan.targets:
        name = f"{linear.name}.weight"
        wanted = plan.source.tensors[name].shape
        found = other.tensors[name].shape if name in other.tensors else None
        if found != wanted:
            raise PlanError(
                f"{plan.step.where}.mask: {other.name} is a mask for another model: {name} is "
                f"{'missing' if found is None else list(found)} there and {list(wanted)} in {plan.source.name}"
            )


def describe(plan: TrainPlan) -> str:
    """The step in a line."""
    options = plan.step.options
    tokens = options.steps * options.batch * length_of(plan)
    losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in options.loss.items())
    what = f" of {'LoRA' if options.lora else 'all parameters'} by {losses}"
    what += " from random weights" if options.begins_anew else ""
    left = f"; prunes {len(plan.targets)} linears" if plan.targets else ""
    if options.unit_kinds:
        left = f"; units may go: {', '.join(options.unit_kinds)}"
    if options.leaves and options.leaves[1]:
        left += f", of whose weights {1 - options.leaves[1]:.4g} stay"
    return f"{plan.step.name}: {options.steps} steps{what}, {tokens:,} tokens{left}"


def length_of(plan: TrainPlan) -> int:
    """Tokens of a training window."""
    source = plan.step.options.data or plan.recipe.calibration
    assert source is not None
    return source.length


def predict(plan: TrainPlan) -> Cost:
    """What the step will take: lessons if there is a teacher, and learning; proving needs less than that."""
    parameters = sum(prod(info.shape) for info in plan.source.tensors.values())
    saved = sum(linear.before_bytes - linear.after_bytes for linear in plan.linears)
    output = stored_bytes(plan.source.tensors.values(), plan.itemsize) - saved
    return cost_of(plan, output, [teaching(plan, parameters), learning(plan, parameters)])


def learning(plan: TrainPlan, parameters: int) -> Phase:
    """The whole model in float32, both moments of what of it is trained, and a pass there and back.

    Gradients come while what the pass has left behind goes; they wait only where a step takes several passes. A
    technique may score all weights before there are moments, rank them later, and remember what they were. Two states
    are on disk for a moment, and what was learned before it is the result.
    """
    options = plan.step.options
    trained = lora_parameters(plan) if options.lora else parameters
    gradient, moments = 4 * trained, 2 * 4 * trained
    waiting = gradient if options.batch > options.micro_batch else 0
    pruned = sum(prod(linear.shape) for linear in plan.targets)  # a byte of mask each
    scoring: float = options.scoring_bytes * pruned
    scoring += passing_back(plan, parameters, 1) if options.scoring_bytes else 0
    ranking = moments + gradient + options.ranking_bytes * pruned
    at_work = max(moments + waiting + passing_back(plan, parameters, options.micro_batch), ranking)
    remembered = options.remembered_bytes * parameters
    memory = 4 * parameters + max(at_work, scoring) + remembered + pruned
    operations = 2.0 * parameters * options.steps * options.batch * length_of(plan)
    passes = 4.0 if options.gradient_checkpointing else 3.0
    seconds = LOADING + 2.0 * passes * operations / speed(plan, options.precision)
    return Phase(memory, seconds, 2 * (3 * 4 * trained + remembered + pruned) + parameters * plan.itemsize)


def passing_back(plan: TrainPlan, parameters: int, windows: int) -> float:
    """Bytes that a pass of some windows leaves behind: insides of blocks, logits with two gradients, rounded weights.

    With gradient checkpointing the inputs of all blocks, and the inside of one.
    """
    options, checkpointing = plan.step.options, plan.step.options.gradient_checkpointing
    item = 2 if options.precision == "bfloat16" else 4
    shapes = block_shapes(plan) if checkpointing else [linear.shape for linear in plan.linears]
    inside = BEHIND * item * sum(sum(shape) for shape in shapes)
    inputs = 4 * plan.count * hidden_size(plan) if checkpointing else 0
    rounded = item * parameters if item < 4 else 0
    return rounded + windows * length_of(plan) * (inside + inputs + 3 * item * vocabulary(plan))


def teaching(plan: TrainPlan, parameters: int) -> Phase:
    """What the dense model says of the windows; one block at a time, which is less than what learning holds."""
    options, length = plan.step.options, length_of(plan)
    if not options.has_teacher:
        return Phase()
    windows = min(options.steps * options.batch, windows_of(plan))
    hidden = plan.itemsize * hidden_size(plan) if "hidden" in options.loss else 0
    kept = windows * length * (8 * options.top_k + hidden)
    return Phase(seconds=pass_seconds(plan, windows * length, parameters), disk=kept)


def lora_parameters(plan: TrainPlan) -> int:
    """Numbers in the LoRA matrices of all linears [out, in] that are not kept: rank (in + out) each."""
    options = plan.step.options
    assert isinstance(options, Recover)
    return sum(options.rank * sum(linear.shape) for linear in updated_linears(plan))


def updated_linears(plan: TrainPlan) -> list[PlannedLinear]:
    """The linears that LoRA is for."""
    return [linear for linear in plan.linears if not matches(linear.name, plan.recipe.keep)]


def windows_of(plan: TrainPlan) -> int:
    """Windows of text that are read."""
    source = plan.step.options.data or plan.recipe.calibration
    assert source is not None
    return source.samples
