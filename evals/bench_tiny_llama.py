"""Does tiny-llama learn? Held-out loss after training, beside that of a unigram model of the same tokenizer.

    python evals/bench_tiny_llama.py                       # trains recipes/tiny-llama/dense.yaml, minutes on two cores
    python evals/bench_tiny_llama.py --folder outputs/tiny-llama-dense     # of a run that is there already

The unigram model knows how often each token occurs in the text that the model is trained on (every count plus one), and
nothing of what came before; both predict the same tokens of the same held-out windows, which are those of the suite
`tiny`. The exit code is 1 if the gain is below 1.5 nats per token, or training took more than ten minutes.

What is unfair: both texts are Wikipedia passages of one dataset, though they share no run of twelve words.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import in_words, provenance
from torch import Tensor

from llmcompress.calibrate import DataSource, load_text
from llmcompress.evaluate import load_model
from llmcompress.perplexity import mean_stderr, score_windows, text_windows
from llmcompress.recipe import load_recipe, recipe_paths
from llmcompress.run import run
from llmcompress.suite import load_suite

LEAST_GAIN = 1.5  # nats per token
LONGEST = 600  # seconds of training


def main() -> int:
    args = arguments().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "dense"
        if args.folder is None:
            run(load_recipe(recipe_paths()["tiny-llama/dense"]), folder, evaluate=False)
        found = measured(folder)
    print(f"{in_words(found['machine'])}\n")
    print("| | held-out loss, nats per token |\n|---|---:|")
    for name in ("unigram", "model"):
        print(f"| {name} | {found[name]:.3f} ± {found[name + '_stderr']:.3f} |")
    print(f"\ngain {found['gain']:.3f}; {found['tokens']:,} tokens in {found['seconds']:.0f} s of training")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["gain"] < LEAST_GAIN or found["seconds"] > LONGEST)


def measured(folder: Path) -> dict[str, Any]:
    """Losses of a finished folder and of the unigram model on the windows of the suite, and what training took."""
    results = json.loads((folder / "results.json").read_text())
    model, tokenizer = load_model(folder, "float32")
    entry = load_suite("tiny").perplexity[0]
    held_out = load_text(entry.source, tokenizer).joined
    windows = text_windows(held_out, tokenizer, entry.length, entry.windows, entry.name)
    seen = load_text(DataSource(data=results["recipe"]["calibration"]["data"]), tokenizer).joined
    counts = torch.bincount(
        torch.tensor(tokenizer(seen, add_special_tokens=False)["input_ids"]), minlength=len(tokenizer)
    )
    losses = {"unigram": unigram(counts, windows), "model": score_windows(model, windows, batch_size=16).nll}
    found: dict[str, Any] = {"machine": provenance(), "folder": folder.name, "windows": len(windows)}
    for name, values in losses.items():
        found[name], found[f"{name}_stderr"] = mean_stderr(values)
    training = results["training"][0]
    found |= {"gain": found["unigram"] - found["model"], "seconds": training["seconds"], "tokens": training["tokens"]}
    return found


def unigram(counts: Tensor, windows: Tensor) -> list[float]:
    """Mean loss of each window [n, length] under token frequencies [vocabulary], one added to each; nats per token."""
    log_probs = ((counts + 1) / (counts + 1).sum()).log().double()
    return (-log_probs[windows[:, 1:]]).mean(1).tolist()  # a window's first token is predicted by no model


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a finished run, instead of training one")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
