"""Whole runs with structure steps: the folder loads in stock transformers and computes what was masked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from tiny_runs import proof_inside, recipe, reloaded, write_text

from llmcompress.run import run

CHANNELS = {"structure": "mlp_channel", "score": "magnitude", "ratio": 0.25, "of": "group"}
BLOCKS = {"structure": "block", "score": "block_influence", "ratio": 0.5, "of": "decoder"}
GROUPED = [kind for kind in ARCHITECTURES if kind not in ("gpt2", "gpt_neox", "opt")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def run_here(tiny_folders: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Folder and results of a run of some steps, proved in this process."""

    def go(kind: str, *steps: dict[str, Any], **more: Any) -> tuple[Path, dict[str, Any]]:
        with proof_inside(monkeypatch):
            return tmp_path / "out", run(recipe(tiny_folders(kind), text, *steps, **more), tmp_path / "out")

    return go


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_narrower_models_of_every_architecture_are_proved(kind, run_here):
    folder, results = run_here(kind, CHANNELS)
    assert results["proof"]["passed"]
    before = ARCHITECTURES[kind].get("intermediate_size", ARCHITECTURES[kind].get("ffn_dim", 384))
    keys, config = ("intermediate_size", "ffn_dim", "n_inner"), config_of(folder)
    assert next(config[key] for key in keys if config.get(key)) == before * 3 // 4
    assert results["size"]["after_bytes"] < results["size"]["before_bytes"]


@pytest.mark.parametrize("kind", GROUPED)
def test_fewer_key_value_groups_and_fewer_query_heads(kind, run_here):
    step = {"structure": "kv_group", "score": "activation", "ratio": 0.5, "of": "group"}
    folder, _ = run_here(kind, step)
    config = config_of(folder)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (3, 1)
    assert config["head_dim"] == ARCHITECTURES[kind].get("head_dim", 16)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fewer_blocks_generate_with_a_cache(kind, run_here):
    folder, results = run_here(kind, BLOCKS)
    model = reloaded(folder)
    assert model.config.num_hidden_layers == 1
    assert results["proof"]["passed"]
    tokens = torch.tensor([[3, 4, 5, 6]])
    cached = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))
