"""Recipes: strict reading, overrides, names and sizes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llmcompress.errors import RecipeError
from llmcompress.methods import METHODS, IntMethod, Pruner
from llmcompress.options import parse_bytes
from llmcompress.recipe import default_output, load_recipe, matches, override, parse_recipe, parse_step

SMALLEST = {"model": "m", "steps": [{"method": "rtn"}]}


def test_defaults_of_the_smallest_recipe():
    recipe = parse_recipe(SMALLEST)
    assert (recipe.dtype, recipe.device, recipe.keep, recipe.output.format) == ("bfloat16", "auto", ["lm_head"], "auto")
    assert recipe.evaluate is None
    assert recipe.publish is None
    assert not recipe.trust_remote_code
    step = recipe.parsed_steps()[0]
    assert step.name == "rtn"
    assert step.targets == ("*",)
    assert step.method == METHODS["rtn"]()


def test_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        parse_recipe(SMALLEST).model = "other"


def test_plain_values_are_what_was_given_and_make_the_recipe_again(tmp_path):
    given = SMALLEST | {"calibration": {"data": "x", "samples": 3}, "max_memory": 1000, "output": {"format": "dense"}}
    recipe = parse_recipe(given)
    assert recipe.plain() == given
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.plain()))
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_method_option_can_be_written(name):
    needed = {"sparsity": 0.5} if issubclass(METHODS[name], Pruner) else {}
    options = {key: field.default for key, field in METHODS[name].model_fields.items()} | needed
    step = parse_step({"method": name, "targets": ["*.q_proj"], **options}, "steps[0]")
    assert step.method == METHODS[name](**needed)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if issubclass(cls, IntMethod)])
def test_options_of_a_method_are_strict(name):
    with pytest.raises(RecipeError, match=r"steps\[3\]\.symmetric: .*bool.*'yes'"):
        parse_step({"method": name, "symmetric": "yes"}, "steps[3]")


def test_the_first_bad_key_is_named_with_its_file(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(SMALLEST | {"stpes": []}))
    with pytest.raises(RecipeError, match="stpes: unknown option; did you mean 'steps'") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert caught.value.__notes__ == [f"recipe: {tmp_path / 'r.yaml'}"]


# overrides


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", "n", {"model": "n"}),
        ("output.format", "dense", {"output": {"format": "dense"}}),
        ("calibration.data", "x", {"calibration": {"data": "x", "samples": 2}}),
        ("steps.1.bits", 8, {"steps": [{"method": "rtn"}, {"method": "gptq", "bits": 8}]}),
        ("steps.0", {"method": "hqq"}, {"steps": [{"method": "hqq"}, {"method": "gptq"}]}),
    ],
)
def test_override_sets_one_value(key, value, expected):
    values: dict[str, Any] = {
        "model": "m",
        "calibration": {"samples": 2},
        "steps": [{"method": "rtn"}, {"method": "gptq"}],
    }
    unchanged = yaml.safe_load(yaml.safe_dump(values))
    override(values, key, value)
    assert values == unchanged | expected


@pytest.mark.parametrize("key", ["steps.2.bits", "steps.-1.bits", "steps.first.bits", "steps.2", "model.name.x"])
def test_override_of_a_place_that_is_not_there(key):
    with pytest.raises(RecipeError, match=f"--set {key}: "):
        override({"model": "m", "steps": [{}, {}]}, key, 1)


# sizes, names, globs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1024", 1024),
        ("6GiB", 6 * 2**30),
        ("6 gib", 6 * 2**30),
        ("1.5MB", 1_500_000),
        ("500 KB", 500_000),
        ("2TiB", 2 * 2**40),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected
    assert parse_recipe(SMALLEST | {"max_memory": text}).max_memory == expected


@pytest.mark.parametrize("text", ["", "GiB", "six", "6 GiBs", "-6GiB", "6GiB 5"])
def test_sizes_that_are_none(text):
    with pytest.raises(RecipeError, match="max_memory: expected a size such as 6GiB"):
        parse_recipe(SMALLEST | {"max_memory": text})


@pytest.mark.parametrize("value", [0, -1])
def test_memory_bound_is_positive(value):
    with pytest.raises(RecipeError, match="max_memory"):
        parse_recipe(SMALLEST | {"max_memory": value})


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*", True), ("q_proj", True), ("*_proj", True), ("*.q_proj", True), ("model.layers.0.*", True),
        ("model.layers.1.*", False), ("layers.0", False), ("Q_PROJ", False), ("q", False), ("self_attn.q_proj", False),
    ],
)  # fmt: skip
def test_globs(glob, expected):
    assert matches("model.layers.0.self_attn.q_proj", [glob]) is expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("smollm2-135m", "smollm2-135m-w4"),
        ("me/Model-1B", "Model-1B-w4"),
        ("/data/model/", "model-w4"),
        ("a/b.gguf", "b-w4"),
    ],
)
def test_default_output(model, expected):
    assert (
        default_output(parse_recipe(SMALLEST | {"model": model}), Path("recipes/x/w4.yaml"))
        == Path("outputs") / expected
    )
