"""Scripts about run-time sparsity and caches that forget, on tiny models."""

import argparse
import json
import math

import pytest
import torch
from conftest import tiny_model
from evals_modules import evals_module
from transformers import DynamicCache

from llmcompress.eviction import EVICTIONS
from llmcompress.teal import SparseLinear

continuation, sparse_speed = evals_module("continuation"), evals_module("sparse_speed")
compare = evals_module("compare_runtime_sparsity")


@pytest.fixture
def windows():
    return torch.randint(128, (18, 40), generator=torch.Generator().manual_seed(0))


def entry_bytes(model):
    """Keys and values of one token in float32, of all layers."""
    config = model.config
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_with_every_token_kept_a_continuation_scores_as_one_pass_does(windows):
    model = tiny_model("llama")
    found = continuation.continued(model, windows, 24, continuation.maker({"cache": "all"}))
    with torch.inference_mode():
        logits = model(windows).logits[:, 23:-1]
    plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 24:], reduction="none").mean(1)
    assert found.losses == pytest.approx(plain.tolist(), rel=1e-5)
    assert found.kept == 39  # the last token is predicted, and never comes
    assert found.bytes == 39 * entry_bytes(model)


@pytest.mark.parametrize("name", EVICTIONS)
def test_caches_stay_within_their_budget_and_cost_something(name, windows):
    model = tiny_model("llama")
    options = {"snapkv": {"window": 2}}.get(name, {})
    exact = continuation.continued(model, windows, 24, lambda m: DynamicCache(config=m.config))
    values = {"cache": name, "budget": 20, "options": options}
    forgetful = continuation.continued(model, windows, 24, continuation.maker(values))
    assert forgetful.kept <= 20
    assert forgetful.bytes <= 20 * entry_bytes(model)
    assert not torch.allclose(torch.tensor(forgetful.losses), torch.tensor(exact.losses))
    generous = continuation.continued(model, windows, 24, continuation.maker(values | {"budget": 64}))
    assert generous.losses == pytest.approx(exact.losses, rel=1e-5)


def test_a_row_says_what_a_cache_held(tiny_folders, text, tmp_path, monkeypatch):
    values = {"cache": "streaming", "budget": 12, "model": str(tiny_folders("llama")), "data": str(text)}
    (tmp_path / "cache.json").write_text(json.dumps(values | {"prompt": 24, "length": 32, "windows": 3}))
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "cache.json"), "--output", str(tmp_path / "out")])
    assert continuation.main() == 0
    row = json.loads((tmp_path / "out/results.json").read_text())["row"]
    assert (row["kept"], row["predicted"], row["tokens"]) == (12, 24, 0)
    assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    assert row["cache_bytes"] == 12 * entry_bytes(tiny_model("llama"))


def test_sparse_products_are_compared_with_masked_ones(windows):
    model = tiny_model("llama")
    sparse_speed.sparsify(model, windows[:1])
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert compare.product_error(model, linears, windows[:1]) < compare.ROUNDING
    product = linears[3].forward
    linears[3].forward = lambda x: 1.001 * product(x)
    assert compare.product_error(model, linears, windows[:1]) == pytest.approx(1e-3, rel=0.01)


def test_what_does_not_hold_is_named():
    good = {"share": 0.25, "perplexity": 11.0, "on_test": 0.26, "product_error": 1e-7}
    rows = [{"share": 0.0, "perplexity": 10.0}, good, good | {"share": 0.4, "on_test": 0.39, "perplexity": 12.0}]
    assert compare.wrong(rows) == compare.wrong([]) == []
    bad = [rows[0], good | {"perplexity": 9.0, "on_test": 0.3, "product_error": 1e-3}]
    assert [line.split(":")[0] for line in compare.wrong(bad)] == ["NOT monotone", "NOT within 2%", "NOT equal"]


def test_times_and_what_is_read_are_told(monkeypatch, capsys):
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    monkeypatch.setattr(sparse_speed, "SHAPE", sparse_speed.SHAPE | tiny)
    found = sparse_speed.speed(argparse.Namespace(layers=2, new=3, rounds=2))
    assert found["left_out"] == pytest.approx(0.5, abs=0.15)
    assert len(found["dense"]) == len(found["sparse"]) == 2
    assert found["linears"]["mlp.down_proj (64, 96)"]["bytes"] == [2 * 64 * 96, 2 * 64 * 48]
    told = capsys.readouterr().out
    assert "Decoding is" in told
    assert told.count("GB/s") >= 8


def test_the_verdict_says_why_decoding_is_not_faster():
    row = {"dense": 1.0, "sparse": 2.0, "bytes": [8e9, 4e9]}
    assert sparse_speed.verdict(2.0, 1.0, {"a": row}).startswith("Decoding is 2.00 times as fast")
    assert "2.0 GB/s of kept columns and 8.0 GB/s of whole rows" in sparse_speed.verdict(1.0, 2.0, {"a": row})
    assert "take 2.00 of the time" in sparse_speed.verdict(1.0, 2.0, {"a": row})


@pytest.mark.slow
def test_the_whole_comparison_runs(tiny_folders, text, tmp_path, monkeypatch, capsys):
    for name, value in {"LENGTH": 120, "CONTEXT": 120, "CONTINUED": 100, "BUDGETS": (88,)}.items():
        monkeypatch.setattr(compare, name, value)
    line = [
        "",
        "--model",
        str(tiny_folders("llama")),
        "--calibration",
        str(text),
        "--test",
        str(text),
        "--samples",
        "4",
    ]
    line += ["--windows", "4", "--continued", "2", "--shares", "0.4", "--json", str(tmp_path / "all.json")]
    for part in ("quality", "caches"):
        monkeypatch.setattr("sys.argv", [*line, "--only", part])
        compare.main()
        found = json.loads((tmp_path / "all.json").read_text())
        assert len(found[part]) == {"quality": 2, "caches": 1 + len(EVICTIONS)}[part]
    assert found["caches"][0]["kept"] == 119
    assert "NOT equal" not in capsys.readouterr().out
