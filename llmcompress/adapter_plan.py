"""The plan of LoRA on a quantized model: nothing of it changes, and what is learned stays in a folder beside it."""

from dataclasses import dataclass, replace
from typing import Any

from llmcompress.cost import HEADER
from llmcompress.errors import PlanError
from llmcompress.formats import OWN
from llmcompress.packed_source import PackedSource
from llmcompress.plan import Plan, dense_plan
from llmcompress.recipe import Recipe, TrainStep
from llmcompress.training_plan import (
    TrainPlan,
    check_training,
    describe,
    lora_parameters,
    predict,
    updated_linears,
)


@dataclass(frozen=True, slots=True)
class AdapterPlan(TrainPlan):
    """LoRA that fits a quantized model; linears, steps and format are those of the stage that has quantized it."""

    @property
    def advice(self) -> str:
        """How to need less memory."""
        return "set `gradient_checkpointing: true`, or a smaller micro_batch"


def plan_adapter(recipe: Recipe, source: PackedSource, step: TrainStep) -> AdapterPlan:
    """Fit LoRA to a quantized model. Raises PlanError with the first thing that does not fit and what would."""
    check_training(recipe, source, step)
    made = source.plan
    if made.format_name in OWN:
        raise PlanError(
            f"output.format: {made.format_name!r} has linears of its own, for which the peft library has no LoRA, so "
            f"{step.where} ({step.name}) cannot follow; set `output: {{format: pack-quantized}}`"
        )
    values: dict[str, Any] = {name: getattr(dense_plan(recipe, source), name) for name in Plan.__slots__}
    same = {key: getattr(made, key) for key in ("format_name", "linears", "steps", "kept")}
    plan = AdapterPlan(**(values | same), step=step)
    if not updated_linears(plan):
        raise PlanError(f"{step.where}: `keep` {recipe.keep} leaves no linear for LoRA")
    adapter = adapter_bytes(plan)
    cost, dense = predict(plan), 2 * plan.before_bytes + HEADER * len(source.tensors)  # written, and learned
    output = made.predicted.output_bytes + adapter
    cost = replace(cost, output_bytes=output, disk_bytes=cost.disk_bytes - dense + output)
    note = (
        f"{describe(plan)}, kept in adapter/ ({adapter:,} bytes) beside the quantized weights, which stay as they are; "
        "the result is proved and scored with it"
    )
    return replace(plan, predicted=cost, notes=[note])


def adapter_bytes(plan: AdapterPlan) -> int:
    """Of the LoRA file: two matrices for each linear."""
    return lora_parameters(plan) * plan.itemsize + 2 * HEADER * len(updated_linears(plan))
