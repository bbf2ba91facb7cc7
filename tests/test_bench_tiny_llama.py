"""The unigram model that tiny-llama is held against, and what the script reads of a finished run."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from evals_modules import evals_module

from llmcompress.text import DataSource

bench = evals_module("bench_tiny_llama")


def test_a_unigram_model_predicts_by_counts_plus_one_and_never_a_first_token():
    counts = torch.tensor([0, 2, 5, 1])  # one added to each: 1, 3, 6 and 2 of 12
    windows = torch.tensor([[3, 2, 2, 1], [0, 0, 3, 2]])
    first = (2 * math.log(12 / 6) + math.log(12 / 3)) / 3
    second = (math.log(12 / 1) + math.log(12 / 2) + math.log(12 / 6)) / 3
    assert bench.unigram(counts, windows) == pytest.approx([first, second], rel=1e-6)


def test_a_run_is_measured_beside_the_unigram_model_of_its_text(tiny_folders, text, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folders("llama"), tmp_path / "run")
    results = {"recipe": {"calibration": {"data": str(text)}}, "training": [{"seconds": 7.0, "tokens": 64}]}
    (folder / "results.json").write_text(json.dumps(results))
    entry = SimpleNamespace(source=DataSource(data=str(text)), length=16, windows=3, name="held")
    monkeypatch.setattr(bench, "load_suite", lambda name: SimpleNamespace(perplexity=[entry]))
    found = bench.measured(folder)
    assert (found["windows"], found["seconds"], found["tokens"]) == (3, 7.0, 64)
    assert found["gain"] == pytest.approx(found["unigram"] - found["model"])
    assert 0 < found["unigram"] < math.log(128)  # it knows the text; a random model does not
    assert found["gain"] < 0
