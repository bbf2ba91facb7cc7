"""Structured pruning, recovery and int4 in one recipe: what each stage leaves of size and perplexity.

    python evals/compare_recovery.py --calibration wiki.valid.raw --test wiki.test.raw
    python evals/compare_recovery.py --calibration wiki.valid.raw --test wiki.test.raw --rows distillation

Case: SmolLM2-135M-Instruct (the listed model), MLPs of 1024 instead of 1536 channels (fluctuation scores and least
squares on 128 x 512 tokens of `--calibration`), then `--steps` steps of 2048 tokens of the same text, then AWQ in 4
bits, groups of 64. Perplexity over the first 48 windows of 512 tokens of `--test`, in float32, of the reloaded folder
of every stage. One row learns from the dense model's predictions, the other one from the text alone.

The exit code is 1 if distillation closes less than 40% of the gap in log perplexity between the dense and the smaller
model, if its steps take 30 minutes, or if the result has 40% of the dense model's bytes. What is unfair: text for
recovery is of the same collection as the test text (Wikipedia articles), which the dense model was not tuned on.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import in_words, provenance

ROWS = ("distillation", "cross_entropy")
CLOSED, SECONDS, SIZE = 0.4, 1800, 0.4  # what distillation must reach on two cores, and the bytes of the whole recipe


def main() -> int:
    args = arguments().parse_args()
    found: dict[str, Any] = {"machine": provenance(), "rows": {}}
    print(f"{in_words(found['machine'])}\n")
    for name in args.rows:
        found["rows"][name] = results = measure(name, args)
        print(f"\n{name}: {args.steps} steps\n\n{table(results)}\n\n{summary(results)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    missed = [line for name, results in found["rows"].items() for line in shortfalls(name, results)]
    print(*missed, sep="\n")
    return int(bool(missed))


def shortfalls(name: str, results: dict[str, Any]) -> list[str]:
    """What should hold and does not."""
    smallest = results["stages"][-1]["bytes"] / results["size"]["before_bytes"]
    found = [] if smallest < SIZE else [f"{name}: {smallest:.1%} of the dense bytes, expected under {SIZE:.0%}"]
    if name == "distillation":
        share, seconds = closed(results), results["training"][0]["seconds"]
        found += [] if share >= CLOSED else [f"{name}: {share:.1%} of the gap closed, expected {CLOSED:.0%}"]
        found += [] if seconds < SECONDS else [f"{name}: {seconds:.0f} s of steps, expected under {SECONDS} s"]
    return found


def closed(results: dict[str, Any]) -> float:
    """Share of the gap in log perplexity that recovery closed."""
    dense, small, recovered, _ = perplexities(results)
    return math.log(small / recovered) / math.log(small / dense)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="text for scores and recovery, a row per line")
    parser.add_argument("--test", type=Path, required=True, help="text for perplexity, a row per line")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="both if left out")
    parser.add_argument("--steps", type=int, default=200, help="of recovery")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def measure(loss: str, args: argparse.Namespace) -> dict[str, Any]:
    """results.json of one recipe."""
    text = str(args.calibration.resolve())
    recover = {
        "train": "recover",
        "loss": loss,
        "steps": args.steps,
        "batch": 4,
        "micro_batch": 4,
        "learning_rate": args.learning_rate,
        "compile": True,
    }
    with tempfile.TemporaryDirectory() as scratch:
        suite = Path(scratch) / "suite.yaml"
        perplexity = [{"name": "test", "source": str(args.test.resolve()), "length": 512, "windows": 48}]
        suite.write_text(json.dumps({"name": "test", "version": 1, "dtype": "float32", "perplexity": perplexity}))
        recipe = {
            "model": "smollm2-135m",
            "calibration": {"data": text, "samples": 128, "length": 512},
            "steps": [
                {"structure": "mlp_channel", "score": "fluctuation", "ratio": 0.2, "multiple": 128},
                recover | {"data": {"data": text, "samples": 300, "length": 512}},
                {"method": "awq", "bits": 4, "group_size": 64},
            ],
            "evaluate": {"suite": str(suite)},
        }
        path, folder = Path(scratch) / "recipe.yaml", Path(scratch) / "out"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        line = [sys.executable, "-m", "llmcompress", "run", str(path), "--output", str(folder), "--json"]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(line)}: exit code {done.returncode}")
        results: dict[str, Any] = json.loads(done.stdout)
    return results


def perplexities(results: dict[str, Any]) -> list[float]:
    """Of the dense model, then of every stage."""
    scores = results["scores"]["perplexity"][0]
    stages = [stage["perplexity"][0]["value"] for stage in results["stages"][1:-1]]
    return [scores["base"]["value"], *stages, scores["compressed"]["value"]]


def table(results: dict[str, Any]) -> str:
    """A row for every stage."""
    dense = results["size"]["before_bytes"]
    lines = ["| stage | parameters | size | of the dense | perplexity | time |", "|---|---|---|---|---|---|"]
    for stage, perplexity in zip(results["stages"], perplexities(results), strict=True):
        seconds = f"{stage['seconds']:.0f} s" if stage.get("seconds") else ""
        size = f"{stage['bytes'] / 2**20:.1f} MiB | {stage['bytes'] / dense:.1%}"
        lines.append(f"| {stage['name']} | {stage['parameters']:,} | {size} | {perplexity:.2f} | {seconds} |")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """How much of the gap was closed, and how fast."""
    curve, memory = results["training"][0], results["plan"]["measured"]["peak_host_bytes"]
    predicted = results["plan"]["predicted"]["peak_host_bytes"]
    return (
        f"recovery closed {closed(results):.1%} of the gap in log perplexity: {curve['tokens']:,} tokens, loss "
        f"{curve['losses'][0]:.3f} -> {curve['losses'][-1]:.3f}, {curve['seconds']:.0f} s of steps "
        f"({curve['tokens'] / curve['seconds']:.0f} tokens/s); peak memory {memory / 2**30:.2f} GiB, "
        f"{predicted / 2**30:.2f} GiB predicted"
    )


if __name__ == "__main__":
    sys.exit(main())
