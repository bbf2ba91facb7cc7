"""Are packed models as fast and small as they should be? Random weights of real shapes, packed beside dense.

    python evals/bench_runtime.py [SHAPE ...] [--prompt 512] [--new 64] [--rounds 5] [--compile] [--json FILE]

Each SHAPE (of random_model.py; default tinyllama-1.1b and smollm2-135m) is written to a temporary folder with random
4-bit codes in groups of 64, and measured as `llmcompress bench` does: each side in processes of its own, in turn, as
packed linears and as the same weights unpacked to bfloat16. The exit code is 1 if a bound below is missed. Speed does
not depend on the values of weights.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import in_words, provenance
from random_model import SHAPES, write_int4_model

from llmcompress.bench import bench
from llmcompress.speed import Case

GROUP = 64
AT_LEAST = {  # packed over dense, for 2 cores
    "tinyllama-1.1b": {"decode": 2.2, "prefill": 0.95},
    "smollm2-135m": {"decode": 1.0, "prefill": 0.95},
}
AT_MOST = {"tinyllama-1.1b": {"resident": 0.40}}


def main() -> int:
    args = arguments().parse_args()
    print(f"{in_words(provenance())}; prompt {args.prompt}, {args.new} new tokens, medians of {args.rounds}\n")
    print("| shape | | packed | bf16 | ratio | wanted |\n|---|---|---:|---:|---:|---:|")
    runs, missed = [], False
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            write_int4_model(folder, SHAPES[name], GROUP)
            packed = Case(str(folder), True, args.prompt, args.new, device="cpu", compiled=args.compile)
            found = bench({"packed": packed, "dense": replace(packed, packed=False)}, rounds=args.rounds)
        runs.append({"shape": name} | found)
        missed |= show(name, found)
    if args.json:
        args.json.write_text(json.dumps({"machine": provenance(), "runs": runs}, indent=1) + "\n")
    return int(missed)


def show(name: str, found: dict[str, Any]) -> bool:
    """Print the rows of one shape; whether a bound is missed."""
    missed = False
    units = {
        "decode": ("decode_tokens_per_second", 1, "tokens/s"),
        "prefill": ("prefill_tokens_per_second", 1, "tokens/s"),
        "resident": ("resident_bytes", 2**20, "MiB"),
        "peak": ("peak_bytes", 2**20, "MiB"),
        "read": ("read_bytes", 2**20, "MiB"),
    }
    for what, (key, unit, words) in units.items():
        packed, dense = (found["measured"][side][key] / unit for side in ("packed", "dense"))
        ratio, wanted = found["ratios"][what], ""
        if (least := AT_LEAST.get(name, {}).get(what)) is not None:
            wanted, missed = f">= {least:.2f}", missed or ratio < least
        if (most := AT_MOST.get(name, {}).get(what)) is not None:
            wanted, missed = f"<= {most:.2f}", missed or ratio > most
        print(f"| {name} | {what}, {words} | {packed:.1f} | {dense:.1f} | {ratio:.2f} | {wanted} |", flush=True)
    return missed


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(AT_LEAST), choices=[*SHAPES], metavar="SHAPE")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to make")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--compile", action="store_true", help="compile the step that makes one token")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
