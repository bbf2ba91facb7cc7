"""The plan of a structure step: how much goes, what the smaller model looks like, and what it costs to get there.

Sizes follow from the configuration alone, but which linears make which must be found out (`arch/couplings.py`), so
this plan builds the model without weights; it takes some seconds where that of method steps takes a fraction.
"""

from dataclasses import replace

from llmcompress.depth_plan import plan_depth
from llmcompress.errors import PlanError
from llmcompress.plan import dense_plan
from llmcompress.recipe import Recipe, StructureStep
from llmcompress.source import ModelSource
from llmcompress.structure import Depth
from llmcompress.structure_budget import StructurePlan, needs_data
from llmcompress.structure_cost import predict, scoring_of
from llmcompress.width_plan import plan_width


def plan_structure(recipe: Recipe, source: ModelSource, step: StructureStep, keep: int | None = None) -> StructurePlan:
    """Fit a structure step to a model. Raises PlanError with the first thing that does not fit and what would.

    keep: how much stays, as `StructurePlan.extent` counts it; by default what the budget says.
    """
    check_step(recipe, source, step)
    dense = dense_plan(recipe, source)
    removal = plan_depth(dense, step, keep) if isinstance(step.options, Depth) else plan_width(dense, step, keep)
    scored = replace(removal, scoring=scoring_of(removal))
    return replace(scored, predicted=predict(scored))


def check_step(recipe: Recipe, source: ModelSource, step: StructureStep) -> None:
    """What all structure steps want of a recipe and a model."""
    if recipe.calibration is None and needs_data(step.options):
        raise PlanError(f"{step.where}: {step.name} needs `calibration` data; add that block")
    if recipe.output.format not in ("auto", "dense"):
        raise PlanError(
            f"output.format: {recipe.output.format!r} is for packed weights, and {step.where} ({step.name}) leaves "
            "dense ones; remove it, or quantize in a later step"
        )
    if source.pruned:
        raise PlanError(
            f"{source.name}: {len(source.pruned)} of its linears were pruned, and {step.where} ({step.name}) would "
            "break their pattern; structure steps come first"
        )
