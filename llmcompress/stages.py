"""The plans of a recipe's stages, each for the model that the one before it leaves.

A structure step of several rounds is several stages: each scores what is left and removes its part of the way.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.adapter_plan import plan_adapter
from llmcompress.cost import Cost
from llmcompress.errors import PlanError
from llmcompress.machine import check_disk, check_memory
from llmcompress.methods import IntMethod
from llmcompress.packed_source import PackedSource, result_after
from llmcompress.plan import Plan, make_plan
from llmcompress.proof import proof_blocks
from llmcompress.recipe import Recipe, RuntimeStep, Stage, Step, StructureStep, TrainStep
from llmcompress.runtime_plan import plan_runtime
from llmcompress.source import ModelSource
from llmcompress.structure import Hidden
from llmcompress.training_plan import plan_training

if TYPE_CHECKING:
    from llmcompress.structure_budget import StructurePlan


@dataclass(frozen=True, slots=True)
class Link:
    """One stage, or one round of one, and how to plan it once its model exists."""

    stage: Stage
    keep: int | None  # what stays after this round, as `StructurePlan.extent` counts it

    def plan(self, source: ModelSource) -> Plan:
        """The plan for a model, which may be one that an earlier link is going to make."""
        step = self.stage.steps[0]
        if isinstance(step, StructureStep):
            return plan_units(self.stage.recipe, source, step, self.keep)
        if isinstance(step, RuntimeStep):
            return plan_runtime(self.stage.recipe, source, step)
        if isinstance(step, TrainStep) and isinstance(source, PackedSource):
            return plan_adapter(self.stage.recipe, source, step)
        if isinstance(step, TrainStep):
            return plan_training(self.stage.recipe, source, step)
        return make_plan(self.stage.recipe, source, [s for s in self.stage.steps if isinstance(s, Step)])

    @property
    def name(self) -> str:
        """What it does, for folders and tables."""
        return " + ".join(step.name for step in self.stage.steps)


def plan_stages(recipe: Recipe, source: ModelSource) -> list[tuple[Link, Plan]]:
    """Every stage of a recipe with its plan. Raises PlanError with the first thing that does not fit."""
    planned, teacher = list[tuple[Link, Plan]](), source
    check_order(recipe)
    for stage in recipe.stages():
        check_teacher(stage, teacher, source)
        for link in rounds(stage, source):
            plan = link.plan(source)
            if planned:  # what it starts from is there already
                cost = plan.predicted
                plan = replace(plan, predicted=replace(cost, disk_bytes=cost.disk_bytes - source.fetch_bytes))
            planned.append((link, plan))
            source = result_after(plan)
    return planned


def check_order(recipe: Recipe) -> None:
    """Structure before masks, then integers, then LoRA or thresholds; and a teacher unlike what it teaches."""
    pruned, quantized, adapted, measured = None, None, None, None
    for place, step in enumerate(recipe.parsed_steps()):
        where = f"{step.where} ({step.name})"
        if measured:
            raise PlanError(f"{where}: would change the model whose activations {measured} has measured; put it first")
        if adapted and isinstance(step, RuntimeStep):
            raise PlanError(
                f"{where}: needs plain or packed linears, and {adapted} leaves LoRA beside them; leave one out"
            )
        if adapted:
            raise PlanError(f"{where}: would change the model that {adapted} has learned to correct; put it first")
        if isinstance(step, Step):
            pruned = where if step.method.prunes else pruned
            quantized = where if isinstance(step.method, IntMethod) else quantized
            continue
        if isinstance(step, RuntimeStep):
            measured = where
        elif quantized and isinstance(step, TrainStep) and step.options.leaves_weights:
            adapted = where
        elif quantized:
            raise PlanError(
                f"{where}: would give other values to what {quantized} has quantized; quantize last"
                + (", or set `parameters: lora`" if isinstance(step, TrainStep) else "")
            )
        if isinstance(step, StructureStep) and pruned:
            raise PlanError(f"{where}: would break the pattern that {pruned} has pruned; put structure steps first")
        if not isinstance(step, TrainStep):
            continue
        options = step.options
        changes = options.leaves is not None or bool(options.unit_kinds) or options.begins_anew
        pruned = where if options.leaves else pruned
        if options.has_teacher and not changes and place == 0:
            raise PlanError(
                f"{where}: the model that the run begins with is the teacher, so there is nothing to learn from it "
                "yet; put it after a step that changes the model, or set `loss: cross_entropy`"
            )


def check_teacher(stage: Stage, teacher: ModelSource, source: ModelSource) -> None:
    """Hidden states are compared number by number, so both models must have as many."""
    step = stage.steps[0]
    if not isinstance(step, TrainStep) or "hidden" not in step.options.loss:
        return
    there, here = (each.config.get("hidden_size", each.config.get("n_embd")) for each in (teacher, source))
    if there != here:
        raise PlanError(
            f"{step.where}.loss: hidden compares hidden states, of which the dense model has {there} and this one "
            f"{here}; use distillation"
        )


def rounds(stage: Stage, source: ModelSource) -> list[Link]:
    """A stage as one link, or as one for every round of its structure step."""
    step = stage.steps[0]
    if not isinstance(step, StructureStep) or step.options.rounds == 1:
        return [Link(stage, None)]
    plan, count = plan_units(stage.recipe, source, step), step.options.rounds
    before, gone, grain = plan.extent
    if count > gone // grain:
        raise PlanError(
            f"{step.where}.rounds: {count} rounds, but only {gone} of {before} {plan.counted} go"
            + (f", {grain} at a time" if grain > 1 else "")
            + f"; use at most {gone // grain}"
        )
    between = [grain * round((before - gone * i / count) / grain) for i in range(1, count)]
    return [Link(stage, keep) for keep in [*between, before - gone]]


def plan_units(recipe: Recipe, source: ModelSource, step: StructureStep, keep: int | None = None) -> "StructurePlan":
    """The plan of a structure step; keep: what stays, by default as the budget says."""
    if isinstance(step.options, Hidden):  # both build the model, so they need torch
        from llmcompress.hidden_plan import plan_hidden

        return plan_hidden(recipe, source, step, keep)
    from llmcompress.structure_plan import plan_structure

    return plan_structure(recipe, source, step, keep)


def check_stages(plans: list[Plan], output: Path) -> None:
    """Memory and disk for all stages, before a weight is read. Raises PlanError with both numbers."""
    check_disk(combined([plan.predicted for plan in plans]), output)
    for plan in plans:
        check_memory(plan)
        proof_blocks(plan)


def plain_stages(plans: list[Plan]) -> dict[str, Any]:
    """For `--json`: the plan of a run of one stage, or all of them and what they take together."""
    if len(plans) == 1:
        return plans[0].plain()
    predicted = asdict(combined([plan.predicted for plan in plans]))
    return {"stages": [plan.plain() for plan in plans], "predicted": predicted}


def combined(costs: list[Cost]) -> Cost:
    """What all stages take together: times add up, memory does not, and every stage's result stays until the end."""
    return Cost(
        peak_host_bytes=max(cost.peak_host_bytes for cost in costs),
        peak_device_bytes=max(cost.peak_device_bytes for cost in costs),
        disk_bytes=sum(cost.disk_bytes for cost in costs),
        output_bytes=costs[-1].output_bytes,
        seconds=sum(cost.seconds for cost in costs),
    )
