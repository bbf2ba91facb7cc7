"""Every recipe that ships is read, and planned where its model is installed."""

import importlib.util
from pathlib import Path

import pytest

from llmcompress.catalog import DATASETS, MODELS
from llmcompress.methods import IntMethod
from llmcompress.plan import Plan
from llmcompress.recipe import load_recipe, recipe_paths
from llmcompress.runtime_plan import RuntimePlan
from llmcompress.source import open_source
from llmcompress.stages import plan_stages
from llmcompress.structure_budget import StructurePlan
from llmcompress.suite import load_suite
from llmcompress.training import TRAININGS
from llmcompress.training_plan import TrainPlan

ROOT = Path(__file__).parent.parent
RECIPES = recipe_paths()


def test_every_yaml_file_below_recipes_is_a_listed_recipe():
    assert set(RECIPES.values()) == set((ROOT / "recipes").rglob("*.yaml"))
    assert RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_and_says_what_it_is(name):
    recipe = load_recipe(RECIPES[name])
    first, *_ = RECIPES[name].read_text().splitlines()
    assert first.startswith("# ")
    assert recipe.publish is None, "a recipe that ships must not publish under somebody's name"
    if recipe.evaluate:
        load_suite(recipe.evaluate.suite)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_can_be_planned(name):
    recipe = load_recipe(RECIPES[name])
    if recipe.model not in MODELS:
        pytest.skip(f"{recipe.model} would have to be downloaded")
    package = MODELS[recipe.model].file.package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{recipe.model} needs the package {package}")
    plans = [plan for _, plan in plan_stages(recipe, open_source(recipe.model))]
    plan = plans[-1]
    assert plan.format_name != "dense" or recipe.output.format == "dense"
    if isinstance(plan, RuntimePlan):  # no weight changes, so that nothing becomes smaller
        assert all(plan.sparse(linear.name) for linear in plan.linears)
        return
    assert isinstance(plan, StructurePlan | TrainPlan) or all(linear.steps for linear in plan.linears)
    assert plan.predicted.output_bytes < plans[0].before_bytes or size_is_unknown(plan)
    for step in plan.steps:
        if isinstance(step.method, IntMethod):
            assert f"w{step.method.bits}a16" in name
            assert step.method.prunes or len(plans) > 1 or name.endswith(step.name)
        if step.method.prunes and step.method.prunes.kind == "n:m":
            assert str(step.method.prunes).replace(":", "to") in name


def size_is_unknown(plan: Plan) -> bool:
    """What training leaves is as large as before, or says by its zeros what is left."""
    return isinstance(plan, TrainPlan) or (
        isinstance(plan, StructurePlan) and getattr(plan.step.options, "zeros", None) is True
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_uses_data_that_is_listed_or_on_the_hub(name):
    recipe = load_recipe(RECIPES[name])
    for source in recipe.calibration.sources() if recipe.calibration else ():
        assert source.data in DATASETS or source.data.count("/") == 1


def test_every_technique_has_a_recipe():
    """`masked` needs a model of yours."""
    trained = {step["train"] for path in RECIPES.values() for step in load_recipe(path).steps if "train" in step}
    assert trained == set(TRAININGS) - {"masked"}
