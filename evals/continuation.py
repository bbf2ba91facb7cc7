"""How well a model goes on with a text when its KV cache forgets: perplexity of the tokens after a prompt.

    python evals/continuation.py cache.json --output outputs/knorm

The prompt goes through the model in one pass, the tokens after it one at a time, as in generation; every token is the
text's own, whatever the model would have said. Policies get a budget of entries for each layer; `cache: all` keeps
every token and is what they are compared with. The file says

    {"cache": "knorm", "budget": 64, "options": {"recent": 16}, "model": FOLDER,
     "data": "boolq-heldout", "prompt": 128, "length": 256, "windows": 200}

What is unfair: windows are short, so there is little to forget. A model that was trained on windows of this length has
no use for more.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 16  # windows at a time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("values", type=Path, help="what to measure, in JSON")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    row = measured(json.loads(args.values.read_text(encoding="utf-8")))
    (args.output / "results.json").write_text(json.dumps({"row": row}, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(values: dict[str, Any]) -> dict[str, Any]:
    """The row of one cache."""
    from llmcompress.calibrate import DataSource, load_text
    from llmcompress.evaluate import load_model
    from llmcompress.perplexity import perplexity, text_windows

    model, tokenizer = load_model(Path(values["model"]), "float32")
    text = load_text(DataSource(data=values["data"]), tokenizer).joined
    windows = text_windows(text, tokenizer, values["length"], values["windows"], values["data"])
    found = continued(model, windows, values["prompt"], maker(values))
    score = perplexity(found.losses)
    return {
        "perplexity": score["value"],
        "nll": score["nll"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "zeros": 0.0,
        "kept": found.kept,
        "cache_bytes": found.bytes,
        "predicted": len(windows) * (values["length"] - values["prompt"]),
        "tokens": 0,  # that are learned from
        "seconds": 0.0,  # of training
    }


def maker(values: dict[str, Any]) -> Callable[[Any], Any]:
    """What makes the cache of a model."""
    from transformers import DynamicCache

    from llmcompress.eviction import EVICTIONS

    if values["cache"] == "all":
        return lambda model: DynamicCache(config=model.config)
    policy: Any = EVICTIONS[values["cache"]]
    return lambda model: policy(model, budget=values["budget"], **values.get("options", {}))


@dataclass(frozen=True, slots=True)
class Continued:
    """What came of going on with some windows."""

    losses: list[float]  # mean of each window's tokens after its prompt, nats per token
    kept: int  # most entries that some layer holds
    bytes: int  # most keys and values that all layers hold, of one window


@torch.inference_mode()
def continued(model: Any, windows: Tensor, prompt: int, make_cache: Callable[[Any], Any]) -> Continued:
    """Go on with each window after its first `prompt` tokens, one token at a time.

    windows: [n, length] int64, length > prompt.  make_cache: from a model, for each batch.
    Entries are counted between passes, after the prompt: what an evicting cache holds then is within its budget.
    """
    losses, kept, most = list[float](), 0, 0
    for batch in windows.split(BATCH):
        cache, total = make_cache(model), torch.zeros(len(batch), dtype=torch.float64)
        logits = model(batch[:, :prompt], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        for place in range(prompt, batch.shape[1]):
            total += torch.nn.functional.cross_entropy(logits.float(), batch[:, place], reduction="none").double()
            kept, most = max(kept, entries(cache)), max(most, held_bytes(cache) // len(batch))
            if place + 1 < batch.shape[1]:
                logits = model(batch[:, place : place + 1], past_key_values=cache).logits[:, -1]
        losses += (total / (batch.shape[1] - prompt)).tolist()
    if not all(map(math.isfinite, losses)):
        raise SystemExit("a loss is not finite")
    return Continued(losses, kept, most)


def entries(cache: Any) -> int:
    """Most tokens that some layer holds."""
    return max(int(layer.keys.shape[-2]) for layer in cache.layers)


def held_bytes(cache: Any) -> int:
    """Of the keys and values of all layers and of the whole batch."""
    return sum(int(tensor.nbytes) for layer in cache.layers for tensor in (layer.keys, layer.values))


if __name__ == "__main__":
    sys.exit(main())
