"""What run-time sparsity costs in perplexity, and what it saves: bytes read per token, and time of decoding.

    python evals/compare_runtime_sparsity.py --calibration wiki.valid.raw --test wiki.test.raw --json runtime.json
    python evals/compare_runtime_sparsity.py --only speed --layers 4         # a quick look at the time alone

Quality: SmolLM2-135M-Instruct (the listed model), thresholds from 16 x 512 tokens of `--calibration` at each share, by
`python -m llmcompress run`; then perplexity over the first 48 windows of 512 tokens of `--test` in float32, as
`llmcompress.load` computes it, and in the same passes a count of what was left out. Then some tokens are decoded, and
in each linear the sparse product is compared with the masked one of the same input. The exit code is 1 unless
perplexity rises with the share, every share is met within 2 points, and products agree to float32.

Caches: the same model, dense, goes on with a few windows of 2048 tokens of the test text after 1536 of them, one token
at a time, under each eviction policy with budgets of a quarter and half of the prompt (`continuation.py`). Bytes are
those of the keys and values of one window, in float32.

Speed: a Llama of TinyLlama-1.1B's shape with random bfloat16 weights, decoding one token after another. One side is the
model as it is, the other the same weights with thresholds at 50% of each linear's input, found on the prompt; sides
alternate, and medians are shown. Below, single linears, called block after block so that weights come from memory, with
the bytes that each side reads per second: where sparse decoding is not faster, that says why. The exit code does not
depend on it.

What is unfair: with random weights, what comes into a linear is close to normal and has no outliers. That changes
nothing about how many bytes are read. Decoding is timed with a short context. Caches are tried on few windows, all that
minutes allow: differences between policies are to be read beside the error of each.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from continuation import continued, maker
from provenance import in_words, provenance
from sparse_speed import SHAPE, speed

SHARES = (0.1, 0.25, 0.4, 0.5)
ALLOWED = 0.02  # between the share asked for and what was left out
ROUNDING = 1e-5  # between sparse and masked products, relative; sums of up to 1536 float32 numbers
LENGTH = 512  # tokens of a window that is scored
DECODED = 32  # tokens that products are compared on, after as many that are not counted
CONTEXT, CONTINUED = 2048, 1536  # tokens of a window that is gone on with, and of its prompt
BUDGETS = (384, 768)  # entries that caches may hold
OPTIONS: dict[str, dict[str, int]] = {"snapkv": {"window": 16}}  # as on the shelf, so that most entries are free
PARTS = ("quality", "caches", "speed")


def main() -> int:
    args = arguments().parse_args()
    parts = [args.only] if args.only else list(PARTS)
    if parts != ["speed"] and not (args.calibration and args.test):
        raise SystemExit("--calibration and --test: text files, such as WikiText-2 raw (valid and test)")
    print(f"{in_words(provenance())}\n", flush=True)
    report: dict[str, Any] = {"machine": provenance()}
    measures: dict[str, Callable[[argparse.Namespace], Any]] = {"quality": quality, "caches": caches, "speed": speed}
    for part in parts:
        report[part] = measures[part](args)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    problems = wrong(report.get("quality", []))
    print("\n".join(problems))
    return int(bool(problems))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="text that thresholds are found on")
    parser.add_argument("--test", type=Path, help="text for perplexity")
    parser.add_argument("--model", default="smollm2-135m", help="a listed name or a folder")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=48, help="test windows of 512 tokens")
    parser.add_argument("--continued", type=int, default=4, help="test windows that caches are tried on")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="of the model that is timed")
    parser.add_argument("--new", type=int, default=24, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


# Perplexity and sparsity


def quality(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the dense model and for each share."""
    print("| left out, asked for | on calibration | on the test text | bytes read per token | perplexity | time |")
    print("|---:|---:|---:|---:|---:|---:|")
    rows = [shown(scored(dense_folder(args), args) | {"share": 0.0})]
    rows += [shown(sparse_row(share, args)) for share in args.shares]
    print()
    return rows


def dense_folder(args: argparse.Namespace) -> Path:
    """The model as it is."""
    from llmcompress.source import open_source

    folder = open_source(args.model).fetch().folder
    assert folder is not None
    return folder


def sparse_row(share: float, args: argparse.Namespace) -> dict[str, Any]:
    """The model with thresholds for one share."""
    recipe = {
        "model": args.model,
        "calibration": {"data": str(args.calibration.resolve()), "samples": args.samples, "length": LENGTH},
        "steps": [{"runtime": "teal", "sparsity": share}],
    }
    with tempfile.TemporaryDirectory() as scratch:
        path, folder = Path(scratch) / "recipe.yaml", Path(scratch) / "out"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        results = command("run", str(path), "--output", str(folder))
        found = scored(folder, args)
    return found | {
        "share": share,
        "on_calibration": results["runtime"]["sparsity"],
        "read_bytes": results["runtime"]["read_bytes"],
        "seconds": results["plan"]["measured"]["seconds"],
        "predicted_seconds": results["plan"]["predicted"]["seconds"],
    }


def scored(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a folder; with thresholds also what tokens leave out, the dense ones aside, and how exactly."""
    from llmcompress.evaluate import load_model
    from llmcompress.perplexity import perplexity, score_windows
    from llmcompress.teal import SparseLinear, mean_share, measured, weight_sizes

    model, tokenizer = load_model(folder, "float32")
    windows = test_windows(args, tokenizer, LENGTH, args.windows)
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if not linears:
        return {"perplexity": perplexity(score_windows(model, windows, batch_size=8).nll)["value"]}
    with measured(linears[0].tokens) as meter:
        score = perplexity(score_windows(model, windows, batch_size=8).nll)
    return {
        "perplexity": score["value"],
        "on_test": mean_share(meter.shares(), weight_sizes(model, meter.seen)),
        "product_error": product_error(model, linears, windows[:1, : 2 * DECODED]),
    }


def test_windows(args: argparse.Namespace, tokenizer: Any, length: int, count: int) -> Any:
    """The first windows of the test text, [count, length] int64."""
    from llmcompress.perplexity import text_windows

    return text_windows(args.test.read_text("utf-8"), tokenizer, length, count, "test")


def product_error(model: Any, linears: list[Any], tokens: Any) -> float:
    """Largest relative difference of a linear's sparse product from the masked one, decoding the second half of a
    text [1, 2 n] int64; both have the input that the sparse model gives them."""
    import torch
    from transformers import DynamicCache

    from llmcompress.teal import masked

    errors: list[float] = []

    def compare(linear: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if linear.tokens.all_sparse:
            x = masked(inputs[0], linear.threshold, linear.tokens.sparse)
            product = torch.nn.functional.linear(x, linear.weight, linear.bias)
            errors.append(float((output - product).norm() / product.norm().clamp(min=torch.finfo(x.dtype).tiny)))

    prompt = tokens.shape[1] // 2
    cache = DynamicCache(config=model.config)
    hooks = [linear.register_forward_hook(compare) for linear in linears]
    with torch.inference_mode():
        model(tokens[:, :prompt], past_key_values=cache)
        for place in range(prompt, tokens.shape[1]):
            model(tokens[:, place : place + 1], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    if len(errors) != prompt * len(linears):
        raise SystemExit(f"{len(errors)} sparse products in {prompt} tokens of {len(linears)} linears")
    return max(errors)


def command(*words: str) -> dict[str, Any]:
    """One command of llmcompress, its JSON."""
    line = [sys.executable, "-m", "llmcompress", *words, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed."""
    if "read_bytes" in row:
        cells = [
            f"{row['on_calibration']:.1%}",
            f"{row['on_test']:.1%}",
            f"{row['read_bytes']['after'] / 2**20:.1f} MiB",
        ]
        end = f"{row['seconds']:.0f} s (predicted {row['predicted_seconds']:.0f} s)"
    else:
        cells, end = ["", "", ""], ""
    print(f"| {row['share']:.0%} | {' | '.join(cells)} | {row['perplexity']:.2f} | {end} |", flush=True)
    return row


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold."""
    found = []
    for less, more in pairwise(rows):
        if less["perplexity"] > more["perplexity"]:
            found.append(
                f"NOT monotone: {less['perplexity']:.2f} at {less['share']:.0%}, {more['perplexity']:.2f} after it"
            )
    for row in rows[1:]:
        if abs(row["on_test"] - row["share"]) > ALLOWED:
            found.append(f"NOT within {ALLOWED:.0%}: {row['on_test']:.1%} left out, {row['share']:.0%} asked for")
        if row["product_error"] > ROUNDING:
            found.append(
                f"NOT equal: sparse and masked products differ by {row['product_error']:.1e} at {row['share']:.0%}"
            )
    return found


# Caches


def caches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the ordinary cache, and for each policy and budget."""
    from llmcompress.evaluate import load_model
    from llmcompress.eviction import EVICTIONS
    from llmcompress.perplexity import perplexity

    model, tokenizer = load_model(dense_folder(args), "float32")
    windows = test_windows(args, tokenizer, CONTEXT, args.continued)
    print(f"{len(windows)} windows, prompt of {CONTINUED} tokens, perplexity of the {CONTEXT - CONTINUED} after it\n")
    print("| cache | entries held | MiB | perplexity |\n|---|---:|---:|---:|")
    kinds: list[dict[str, Any]] = [{"cache": "all"}]
    kinds += [
        {"cache": name, "budget": budget, "options": OPTIONS.get(name, {})} for budget in BUDGETS for name in EVICTIONS
    ]
    rows = []
    for kind in kinds:
        found = continued(model, windows, CONTINUED, maker(kind))
        score = perplexity(found.losses)
        rows.append(kind | {"kept": found.kept, "cache_bytes": found.bytes} | score)
        reached = f"{score['value']:.2f}" + (f" ± {score['stderr']:.2f}" if score["stderr"] is not None else "")
        print(f"| {kind['cache']} | {found.kept} | {found.bytes / 2**20:.2f} | {reached} |", flush=True)
    print()
    return rows


if __name__ == "__main__":
    sys.exit(main())
