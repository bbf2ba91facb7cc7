"""The plan of a train step: what it needs, and what it costs."""

import os
import shutil
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from llmcompress.cost import HEADER, LIBRARIES, Cost, speed
from llmcompress.errors import PlanError
from llmcompress.layout import is_expert
from llmcompress.plan import Plan, PlannedLinear, check_length, dense_plan
from llmcompress.recipe import Recipe, TrainStep, matches
from llmcompress.source import ModelSource
from llmcompress.training import Recover


@dataclass(frozen=True, slots=True)
class TrainPlan(Plan):
    """A train step that fits a model."""

    step: TrainStep

    @property
    def needs_data(self) -> bool:
        """Whether it learns from the recipe's calibration text; without, that text still proves the result."""
        return self.recipe.calibration is not None

    @property
    def advice(self) -> str:
        """How to need less memory."""
        return "set `gradient_checkpointing: true`, a smaller micro_batch, or `parameters: lora`"


def plan_training(recipe: Recipe, source: ModelSource, step: TrainStep) -> TrainPlan:
    """Fit a train step to a dense model. Raises PlanError with the first thing that does not fit and what would."""
    options = step.options
    check_training(recipe, source, step)
    if recipe.output.format not in ("auto", "dense"):
        raise PlanError(
            f"output.format: {recipe.output.format!r} is for packed weights, and {step.where} ({step.name}) leaves "
            "dense ones; remove it, or quantize in a later step"
        )
    if isinstance(options, Recover) and options.parameters == "lora" and source.pruned:
        raise PlanError(
            f"{step.where}: merging LoRA would fill the zeros of {len(source.pruned)} pruned linears; set "
            "`parameters: all`, which keeps them"
        )
    dense = dense_plan(recipe, source)
    check_compiler(dense, step)
    values: dict[str, Any] = {name: getattr(dense, name) for name in Plan.__slots__}
    plan = TrainPlan(**values, step=step)
    return replace(plan, predicted=predict(plan), notes=[describe(plan)])


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


def describe(plan: TrainPlan) -> str:
    """The step in a line."""
    options = plan.step.options
    tokens = options.steps * options.batch * length_of(plan)
    what = ""
    if isinstance(options, Recover):
        losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in options.loss.items())
        what = f" of {'all parameters' if options.parameters == 'all' else 'LoRA'} by {losses}"
    return f"{plan.step.name}: {options.steps} steps{what}, {tokens:,} tokens"


def length_of(plan: TrainPlan) -> int:
    """Tokens of a training window."""
    source = plan.step.options.data or plan.recipe.calibration
    assert source is not None
    return source.length


def predict(plan: TrainPlan) -> Cost:
    """What the step will take: the whole model in float32, what of it is trained three times more, one pass."""
    options, length = plan.step.options, length_of(plan)
    parameters = sum(prod(info.shape) for info in plan.source.tensors.values())
    lora = isinstance(options, Recover) and options.parameters == "lora"
    trained = lora_parameters(plan) if lora else parameters
    first = [linear.shape for linear in plan.linears if linear.block == 0]
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    inside = 2 if options.precision == "bfloat16" else 4
    kept = (1 if options.gradient_checkpointing else plan.count) * 2.5 * sum(sum(shape) for shape in first)
    window = options.micro_batch * length * (kept * inside + 4 * 4 * vocabulary)
    memory = LIBRARIES + 4 * parameters + 3 * 4 * trained + window
    output = parameters * plan.itemsize + HEADER * len(plan.source.tensors)
    operations = 2.0 * parameters * options.steps * options.batch * length
    passes = 4.0 if options.gradient_checkpointing else 3.0
    seconds = 20.0 + 2.0 * passes * operations / speed(plan, options.precision)
    disk = output + plan.source.fetch_bytes
    disk += 2 * 3 * 4 * trained + parameters * plan.itemsize  # two states for a moment; what was learned
    if isinstance(options, Recover) and options.has_teacher:
        windows = min(options.steps * options.batch, windows_of(plan))
        seconds += 1.6 * 2.0 * parameters * windows * length / speed(plan)
        width = int(plan.source.config.get("hidden_size", plan.source.config.get("n_embd", 0)))
        disk += windows * length * (8 * options.top_k + (plan.itemsize * width if "hidden" in options.loss else 0))
    return Cost(
        peak_host_bytes=int(memory),
        peak_device_bytes=0 if plan.on_cpu else int(memory) - LIBRARIES,
        disk_bytes=int(disk),
        output_bytes=output,
        seconds=seconds,
    )


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
