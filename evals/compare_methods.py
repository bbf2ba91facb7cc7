"""Every method of this project on one case: perplexity, zeros, size, time and memory, each run in a process of its own.

    python evals/compare_methods.py --calibration wiki.valid.raw --test wiki.test.raw
    python evals/compare_methods.py --calibration wiki.valid.raw --test wiki.test.raw --rows wanda-2to4 sparsegpt-2to4

Case: SmolLM2-135M-Instruct (the listed model), 128 x 512 tokens of `--calibration`, perplexity over the first 48
windows of 512 tokens of `--test`, in float32, on the reloaded folder. Per row `python -m llmcompress run` and then
`python -m llmcompress eval`, as a user would; the first one's results.json has time, memory, zeros and size. Then the
orders that must hold are looked at, and the exit code is 1 if one does not.

What is unfair: one seed and 24576 tokens of one text; the standard error of a perplexity here is about 5% of it, but
rows share the text, so differences between them are far more certain than that.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from provenance import in_words, provenance

INT4 = {"bits": 4, "group_size": 64}
NARROW = {"structure": "mlp_channel", "ratio": 0.2, "multiple": 128}  # 1536 -> 1024 channels
SHALLOW = {"structure": "block", "ratio": 0.1, "of": "decoder"}  # 30 -> 27 blocks
SEEDS = (0, 1, 2)
SCORES = ("random", "magnitude", "wanda", "ria", "snip", "taylor", "sparsegpt")
ROWS: dict[str, tuple[list[dict[str, Any]], str]] = (
    {f"{name}-2to4": ([{"method": name, "pattern": "2:4"}], "sparse24") for name in SCORES}
    | {f"{name}-row50": ([{"method": name, "pattern": "row", "sparsity": 0.5}], "bitmask") for name in SCORES}
    | {
        "joint-2to4-int4": ([{"method": "gptq", "pattern": "2:4", **INT4}], "sparse24-int4"),
        "sparsegpt-then-gptq": (
            [{"method": "sparsegpt", "pattern": "2:4"}, {"method": "gptq", **INT4}],
            "sparse24-int4",
        ),
        "wanda-then-rtn": ([{"method": "wanda", "pattern": "2:4"}, {"method": "rtn", **INT4}], "sparse24-int4"),
        "sparsegpt-row60": ([{"method": "sparsegpt", "sparsity": 0.6}], "bitmask"),
        "sparsegpt-owl60": ([{"method": "sparsegpt", "sparsity": 0.6, "budget": "owl"}], "bitmask"),
        "wanda-row60": ([{"method": "wanda", "sparsity": 0.6}], "bitmask"),
        "wanda-owl60": ([{"method": "wanda", "sparsity": 0.6, "budget": "owl"}], "bitmask"),
    }
    | {f"{name}-int4": ([{"method": name, **INT4}], "pack-quantized") for name in ("rtn", "hqq", "awq", "gptq")}
    | {
        f"{name}-int4-asymmetric": ([{"method": name, **INT4, "symmetric": False}], "pack-quantized")
        for name in ("rtn", "hqq", "awq", "gptq")
    }
    | {
        f"width-{name}{suffix}": ([NARROW | {"score": name, "compensate": how}], "dense")
        for name in ("taylor", "fluctuation", "activation", "wanda", "magnitude", "geometric_median")
        for suffix, how in (("", "none"), ("-least-squares", "least_squares"))
    }
    | {
        f"{kind}-random-{seed}": ([options | {"score": {"method": "random", "seed": seed}}], "dense")
        for kind, options in (("width", NARROW | {"compensate": "none"}), ("depth", SHALLOW))
        for seed in SEEDS
    }
    | {f"depth-{name}": ([SHALLOW | {"score": name}], "dense") for name in ("greedy", "block_influence")}
)
ORDERS = [  # from the best to the worst
    ["sparsegpt-2to4", "wanda-2to4", "magnitude-2to4", "random-2to4"],
    ["sparsegpt-row50", "wanda-row50", "magnitude-row50", "random-row50"],
    ["joint-2to4-int4", "wanda-then-rtn"],
    ["gptq-int4", "awq-int4", "rtn-int4"],
    ["width-taylor", "width-random", "width-magnitude"],  # random: the mean of its seeds
    ["width-fluctuation", "width-random"],
    ["width-taylor-least-squares", "width-taylor"],
    ["width-fluctuation-least-squares", "width-fluctuation"],
    ["depth-greedy", "depth-block_influence", "depth-random"],
]


def main() -> int:
    args = arguments().parse_args()
    found: dict[str, Any] = {"machine": provenance(), "rows": {}}
    print(f"{in_words(found['machine'])}\n")
    columns = ["row", "perplexity", "zeros", "bits per decoder weight", "size", "time", "peak memory"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in args.rows:
        found["rows"][name] = row = measure(name, args)
        print(f"| {' | '.join([name, *cells(row)])} |", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    wrong = disorder(with_means({name: row["perplexity"] for name, row in found["rows"].items()}))
    print(*wrong, sep="\n")
    return int(bool(wrong))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="text for calibration, one row per line")
    parser.add_argument("--test", type=Path, required=True, help="text for perplexity, one row per line")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="all if left out"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--windows", type=int, default=48, help="perplexity windows of 512 tokens")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, without its name."""
    return [
        f"{row['perplexity']:.2f}",
        "" if row["zeros"] is None else f"{row['zeros']:.1%}",
        "" if row["bits"] is None else f"{row['bits']:.2f}",
        f"{row['bytes'] / 2**20:.1f} MiB",
        f"{row['seconds']:.0f} s",
        f"{row['peak_bytes'] / 2**20:.0f} MiB",
    ]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run and score one row."""
    steps, format_name = ROWS[name]
    recipe = {
        "model": "smollm2-135m",
        "calibration": {"data": str(args.calibration.resolve()), "samples": args.samples, "length": 512},
        "steps": steps,
        "output": {"format": format_name},
    }
    with tempfile.TemporaryDirectory() as scratch:
        path, folder = Path(scratch) / "recipe.yaml", Path(scratch) / "out"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        results = command("run", str(path), "--output", str(folder))
        options = ["--text", str(args.test.resolve()), "--length", "512", "--windows", str(args.windows)]
        scores = command("eval", str(folder), *options)
    measured, layers = results["plan"]["measured"], results["layers"]
    weights = sum(row["before_bytes"] for row in layers) / 2  # in bfloat16
    return {
        "perplexity": scores["perplexity"][0]["compressed"]["value"],
        "zeros": (results["sparsity"] or {}).get("of_decoder_linears"),
        "bits": 8 * sum(row["after_bytes"] for row in layers) / weights if layers and "method" in steps[0] else None,
        "bytes": measured["output_bytes"],
        "seconds": measured["seconds"],
        "peak_bytes": measured["peak_host_bytes"],
        "predicted": results["plan"]["predicted"],
    }


def command(*words: str) -> dict[str, Any]:
    """One command of llmcompress, its JSON."""
    line = [sys.executable, "-m", "llmcompress", *words, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def with_means(perplexity: dict[str, float]) -> dict[str, float]:
    """Also the mean over seeds, for rows that have them all."""
    found = dict(perplexity)
    for kind in ("width-random", "depth-random"):
        seeds = [perplexity[f"{kind}-{seed}"] for seed in SEEDS if f"{kind}-{seed}" in perplexity]
        if len(seeds) == len(SEEDS):
            found[kind] = sum(seeds) / len(seeds)
    return found


def disorder(perplexity: dict[str, float]) -> list[str]:
    """Neighbours of ORDERS that were measured and are the wrong way round."""
    found = []
    for order in ORDERS:
        here = [name for name in order if name in perplexity]
        for better, worse in pairwise(here):
            if perplexity[better] > perplexity[worse]:
                found.append(f"NOT in order: {better} {perplexity[better]:.2f}, {worse} {perplexity[worse]:.2f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
