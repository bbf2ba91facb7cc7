"""docs/techniques.md is what the registry says, and every technique that prunes is on it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from llmcompress.at_runtime import RUNTIMES
from llmcompress.methods import METHODS
from llmcompress.methods.base import ScoreMethod
from llmcompress.methods.sparsegpt import SparseGPT
from llmcompress.shelf import Shelf
from llmcompress.training import TRAININGS, Learn

ROOT = Path(__file__).parents[1]
PRUNE = {("train", name) for name, options in TRAININGS.items() if issubclass(options, Learn)}
PRUNE |= {("method", name) for name, method in METHODS.items() if issubclass(method, ScoreMethod | SparseGPT)}
PRUNE |= {("runtime", name) for name in RUNTIMES}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "evals"))
        spec = importlib.util.spec_from_file_location("shelf", ROOT / "evals/shelf.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_registry_says(shelf):
    assert shelf.PAGE.read_text(encoding="utf-8") == shelf.page(), "run python evals/shelf.py"


def test_every_technique_that_prunes_is_on_the_page(shelf):
    entries = {(kind, name): (place, text) for kind, name, place, text in shelf.shelved()}
    assert entries.keys() >= PRUNE
    for (kind, name), (place, text) in entries.items():
        assert isinstance(place, Shelf)
        assert all((place.removes, place.helps, place.holds))
        assert shelf.section(kind, name, place, text).count("\n") >= 7
        if name not in ("dense", "random", "magnitude"):
            assert re.search(r" et al\. (19|20)\d\d|arXiv:", text), f"{kind}: {name} names no paper"


def test_every_training_technique_has_a_recipe(shelf):
    trained = {name for kind, name in PRUNE if kind == "train"}
    assert [name for name in trained if not shelf.recipes_of("train", name)] == ["masked"]  # it needs another's mask


def test_cells_tell_the_spread_over_seeds(shelf):
    row = {"parameters": 2_400_000, "zeros": 0.8, "perplexity": 40.0}
    assert shelf.cells(None) == " | | "
    assert shelf.cells({"0": row}) == "2,400,000 | 80% | 40.00"
    several = {str(seed): row | {"perplexity": value} for seed, value in enumerate((39.0, 40.0, 41.0))}
    assert shelf.cells(several) == "2,400,000 | 80% | 40.00 ± 1.00 (3 seeds)"
