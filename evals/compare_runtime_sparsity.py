"""What run-time sparsity costs in perplexity, and what it saves: bytes read per token, and time of decoding.

    python evals/compare_runtime_sparsity.py --calibration wiki.valid.raw --test wiki.test.raw
    python evals/compare_runtime_sparsity.py --only speed --layers 4         # a quick look at the time alone

Perplexity: SmolLM2-135M-Instruct (the listed model), thresholds from 32 x 512 tokens of `--calibration` at each share,
by `python -m llmcompress run`; perplexity over the first 48 windows of 512 tokens of `--test`, in float32, by
`python -m llmcompress eval`, which applies them; then the same windows in bfloat16 with a count of what was left out.
The exit code is 1 unless perplexity rises with the share and every share is met within 2 points.

Speed: a Llama of TinyLlama-1.1B's shape with random bfloat16 weights, decoding one token after another. One side is the
model as it is, the other the same weights with thresholds at 50% of each linear's input, found on the prompt; sides
alternate, and medians are shown, with the time of single linears beside them. The exit code does not depend on it.

What is unfair: with random weights, what comes into a linear is close to normal and has no outliers. That changes
nothing about how many bytes are read. Decoding is timed with a short context.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from provenance import in_words, provenance

SHARES = (0.25, 0.4, 0.5)
ALLOWED = 0.02  # between the share asked for and what was left out
SHAPE = {  # of TinyLlama-1.1B
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
HALF = 0.5  # left out where time is measured
PROMPT = 128  # tokens of a prompt whose time is taken


def main() -> int:
    args = arguments().parse_args()
    if args.only != "speed" and not (args.calibration and args.test):
        raise SystemExit("--calibration and --test: text files, such as WikiText-2 raw (valid and test)")
    print(f"{in_words(provenance())}\n", flush=True)
    report: dict[str, Any] = {"machine": provenance()}
    problems: list[str] = []
    if args.only != "speed":
        report["quality"] = rows = quality(args)
        problems = wrong(rows)
    if args.only != "quality":
        report["speed"] = speed(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(problems))
    return int(bool(problems))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="text that thresholds are found on")
    parser.add_argument("--test", type=Path, help="text for perplexity")
    parser.add_argument("--model", default="smollm2-135m", help="a listed name or a folder")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=48, help="test windows of 512 tokens")
    parser.add_argument("--only", choices=["quality", "speed"])
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
    rows = [shown(dense_row(args))]
    rows += [shown(sparse_row(share, args)) for share in args.shares]
    print()
    return rows


def dense_row(args: argparse.Namespace) -> dict[str, Any]:
    """The model as it is."""
    scores = command("eval", args.model, *eval_options(args))
    return {"share": 0.0, "perplexity": scores["perplexity"][0]["compressed"]["value"]}


def sparse_row(share: float, args: argparse.Namespace) -> dict[str, Any]:
    """The model with thresholds for one share."""
    recipe = {
        "model": args.model,
        "calibration": {"data": str(args.calibration.resolve()), "samples": args.samples, "length": 512},
        "steps": [{"runtime": "teal", "sparsity": share}],
    }
    with tempfile.TemporaryDirectory() as scratch:
        path, folder = Path(scratch) / "recipe.yaml", Path(scratch) / "out"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        results = command("run", str(path), "--output", str(folder))
        scores = command("eval", str(folder), *eval_options(args))
        left_out = achieved(folder, args)
    return {
        "share": share,
        "on_calibration": results["runtime"]["sparsity"],
        "on_test": left_out,
        "read_bytes": results["runtime"]["read_bytes"],
        "perplexity": scores["perplexity"][0]["compressed"]["value"],
        "seconds": results["plan"]["measured"]["seconds"],
        "predicted_seconds": results["plan"]["predicted"]["seconds"],
    }


def achieved(folder: Path, args: argparse.Namespace) -> float:
    """Share of the weights that the tokens of the test text leave out, those that stay dense aside."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmcompress.perplexity import text_windows
    from llmcompress.teal import apply_thresholds, mean_share, measured, weight_sizes
    from llmcompress.thresholds import thresholds_of

    thresholds = thresholds_of(folder)
    assert thresholds is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = text_windows(args.test.read_text("utf-8"), tokenizer, 512, args.windows, "test")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokens = apply_thresholds(model, thresholds)
    with torch.inference_mode(), measured(tokens) as meter:
        for window in windows:
            model(window[None], use_cache=False)
    return mean_share(meter.shares(), weight_sizes(model, thresholds.modules))


def eval_options(args: argparse.Namespace) -> list[str]:
    return ["--text", str(args.test.resolve()), "--length", "512", "--windows", str(args.windows)]


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
    return found


# Time


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Decoding, dense and with half of all inputs left out."""
    import torch

    dense, sparse = random_model(args.layers), random_model(args.layers)
    prompt = torch.randint(SHAPE["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(1))
    tokens = sparsify(sparse, prompt)
    times: dict[str, list[float]] = {"dense": [], "sparse": [], "dense_prompt": [], "sparse_prompt": []}
    for _ in range(args.rounds):
        for side, model in (("dense", dense), ("sparse", sparse)):
            times[side].append(decode_seconds(model, prompt, args.new))
            times[f"{side}_prompt"].append(prompt_seconds(model))
    left_out = left_out_in_decoding(sparse, tokens, prompt)
    plain, thin, plain_prompt, thin_prompt = (median(seconds) for seconds in times.values())
    linears = linear_times(sparse)
    print(f"{args.layers} layers of 1.1B's shape, {torch.get_num_threads()} threads, {left_out:.1%} left out\n")
    print("| | dense | 50% left out | dense / sparse |\n|---|---:|---:|---:|")
    print(f"| a token | {1e3 * plain:.1f} ms | {1e3 * thin:.1f} ms | {plain / thin:.2f} |")
    print(
        f"| {PROMPT} tokens at once | {plain_prompt:.2f} s | {thin_prompt:.2f} s | {plain_prompt / thin_prompt:.2f} |"
    )
    for name, (full, half) in linears.items():
        print(f"| {name} | {1e3 * full:.2f} ms | {1e3 * half:.2f} ms | {full / half:.2f} |")
    print(flush=True)
    return {
        "layers": args.layers,
        "threads": torch.get_num_threads(),
        "left_out": left_out,
        **times,
        "linears": linears,
    }


def random_model(layers: int) -> Any:
    """A Llama with random bfloat16 weights; the same ones at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**(SHAPE | {"num_hidden_layers": layers}))).eval()
    finally:
        torch.set_default_dtype(before)


def sparsify(model: Any, prompt: Any) -> Any:
    """Thresholds at the median of what comes into each linear with the prompt, applied."""
    import torch
    from torch import nn

    from llmcompress.histogram import InputHistogram
    from llmcompress.teal import apply_thresholds
    from llmcompress.thresholds import Threshold, Thresholds

    linears = {name: m for name, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    found = {name: InputHistogram() for name in linears}
    hooks = [m.register_forward_pre_hook(lambda _, x, h=found[name]: h.update(x[0])) for name, m in linears.items()]
    with torch.inference_mode():
        model(prompt, use_cache=False)
    for hook in hooks:
        hook.remove()
    modules = {name: Threshold(h.threshold(HALF), HALF, linears[name].in_features) for name, h in found.items()}
    return apply_thresholds(model, Thresholds(HALF, 0, modules))


def decode_seconds(model: Any, prompt: Any, new: int) -> float:
    """Median time of a token after the prompt."""
    import torch
    from transformers import DynamicCache

    cache, seconds = DynamicCache(config=model.config), []
    with torch.inference_mode():
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(new):
            start = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def prompt_seconds(model: Any) -> float:
    """Time of PROMPT tokens in one pass, which reads all weights, masked or not."""
    import torch

    with torch.inference_mode():
        start = time.perf_counter()
        model(torch.ones(1, PROMPT, dtype=torch.int64), use_cache=False, logits_to_keep=1)
        return time.perf_counter() - start


def left_out_in_decoding(model: Any, tokens: Any, prompt: Any) -> float:
    """Share of the linears' weights that a few decoded tokens left out."""
    from llmcompress.teal import mean_share, measured, weight_sizes

    with measured(tokens) as meter:
        decode_seconds(model, prompt[:, :1], 8)
    return mean_share(meter.shares(), weight_sizes(model, meter.seen))


def linear_times(model: Any) -> dict[str, tuple[float, float]]:
    """Seconds of single linears of the last block: all columns by rows, as stock models have them, and half of them."""
    import torch
    from llmcompress_kernels import teal_linear

    found = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        columns = model.model.layers[-1].get_submodule(name).weight.T
        rows = columns.T.contiguous()
        x = torch.randn(1, columns.shape[0]).bfloat16()
        at = float(x.abs().float().median())
        full = fastest(lambda x=x, rows=rows: torch.nn.functional.linear(x, rows))
        half = fastest(lambda x=x, columns=columns, at=at: teal_linear(x, columns, at))
        found[f"{name} {tuple(rows.shape)}"] = (full, half)
    return found


def fastest(call: Any) -> float:
    """Median of 30 calls; weights of one linear may stay in the cache, for both sides."""
    import torch

    seconds = []
    with torch.inference_mode():
        for _ in range(30):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return median(seconds)


if __name__ == "__main__":
    sys.exit(main())
