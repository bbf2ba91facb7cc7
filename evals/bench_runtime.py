"""Are packed models as fast and small as they should be? Random weights of real shapes, packed beside dense.

    python evals/bench_runtime.py [SHAPE ...] [--prompt 512] [--new 64] [--rounds 5] [--compile] [--json FILE]
    python evals/bench_runtime.py --python peers/bin/python    # of bench_cpu_peers.py: llama.cpp beside them

Each SHAPE (of random_model.py; default tinyllama-1.1b and smollm2-135m) is written to a temporary folder twice: with
random 4-bit codes in groups of 64, and with random weights in bfloat16. Both are measured as `llmcompress bench` does:
each in processes of its own, which hold that one model in that one form, in turn. The exit code is 1 if a bound below
is missed. Speed does not depend on the values of weights.

For smollm2-135m, and with --compile for every shape, both are also measured with a static cache and a compiled step.

With an interpreter that has llama-cpp-python (--python, or peers/bin/python if it is there) llama.cpp takes turns with
them: the same shape in Q4_0, in as many threads. On a CPU with AMX build it with clang (CC=clang CXX=clang++ pip
install llama-cpp-python): what g++ 12 makes of it leaves the tiles unconfigured, and ends at the first prompt. What is
unfair: Q4_0 has groups of 32, and llama-quantize makes the head 6 or 8 bits, where it is bfloat16 here; llama.cpp
rounds activations to int8; and it chooses no token.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import in_words, provenance
from random_gguf import write_q4_0_model
from random_model import SHAPES, write_int4_model, write_model

from llmcompress.bench import bench, ratios
from llmcompress.speed import Case

GROUP = 64
AT_LEAST = {  # packed over dense, for 2 cores
    "tinyllama-1.1b": {"decode": 2.2, "prefill": 0.95},
    "smollm2-135m": {"decode": 1.0, "prefill": 0.95},
}
AT_MOST = {"tinyllama-1.1b": {"resident": 0.40}}
COMPILED = ("smollm2-135m",)  # small layers, of which most time is Python's
LLAMA = "llama.cpp Q4_0"
DRIVER = Path(__file__).with_name("llama_cpp_driver.py")
PEER = Path("peers/bin/python")
ROWS = {  # key of a measurement, unit, words
    "decode": ("decode_tokens_per_second", 1, "tokens/s"),
    "prefill": ("prefill_tokens_per_second", 1, "tokens/s"),
    "resident": ("resident_bytes", 2**20, "MiB"),
    "peak": ("peak_bytes", 2**20, "MiB"),
    "read": ("read_bytes", 2**20, "MiB"),
}


def main() -> int:
    args = arguments().parse_args()
    if args.python is None and PEER.exists():
        args.python = PEER
    print(f"{in_words(provenance())}; prompt {args.prompt}, {args.new} new tokens, medians of {args.rounds}")
    print(f"{LLAMA}: {args.python or f'not measured, there is no {PEER} and no --python'}\n")
    print(f"| shape | | packed | bf16 | ratio | wanted | {LLAMA} | packed / it |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    runs, missed = [], False
    for name in args.shapes:
        found = measure(name, args)
        runs.append({"shape": name} | found)
        missed |= show(name, found)
    if args.json:
        args.json.write_text(json.dumps({"machine": provenance(), "runs": runs}, indent=1) + "\n")
    return int(missed)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape, as `bench` returns it."""
    with tempfile.TemporaryDirectory() as scratch:
        packed, dense, file = (Path(scratch) / part for part in ("int4", "bf16", "q4_0.gguf"))
        write_int4_model(packed, SHAPES[name], GROUP)
        write_model(dense, SHAPES[name])
        sides = {
            "packed": Case(str(packed), True, args.prompt, args.new, device="cpu"),
            "dense": Case(str(dense), False, args.prompt, args.new, device="cpu"),
        }
        if args.compile or name in COMPILED:
            sides |= {f"{side}, compiled": replace(case, compiled=True) for side, case in sides.items()}
        beside: dict[str, Callable[[], dict[str, Any]]] = {}
        if args.python:
            write_q4_0_model(file, SHAPES[name])
            beside[LLAMA] = lambda: llama_cpp(args, file)
        return bench(sides, rounds=args.rounds, beside=beside)


def llama_cpp(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """What the driver finds, in a process of the other interpreter."""
    asked = {"model": str(file), "prompt": args.prompt, "new": args.new, "threads": torch.get_num_threads()}
    ran = subprocess.run([args.python, DRIVER], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{LLAMA}: {args.python} ended with code {ran.returncode}; see the head of bench_runtime.py")
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def show(name: str, found: dict[str, Any]) -> bool:
    """Print the rows of one shape; whether a bound is missed."""
    measured, missed = found["measured"], False
    for what, (key, unit, words) in ROWS.items():
        ratio, wanted = found["ratios"][what], ""
        if (least := AT_LEAST.get(name, {}).get(what)) is not None:
            wanted, missed = f">= {least:.2f}", missed or ratio < least
        if (most := AT_MOST.get(name, {}).get(what)) is not None:
            wanted, missed = f"<= {most:.2f}", missed or ratio > most
        show_row(name, f"{what}, {words}", measured, ("packed", "dense"), (key, unit), ratio, wanted)
    compiled = ("packed, compiled", "dense, compiled")
    if compiled[0] in measured:
        among = ratios(*(measured[side] for side in compiled))
        for what in ("decode", "prefill"):
            key, unit, words = ROWS[what]
            show_row(name, f"{what}, compiled, {words}", measured, compiled, (key, unit), among[what], "")
    return missed


def show_row(
    name: str, label: str, measured: dict[str, Any], sides: tuple[str, str], number: tuple[str, int], ratio: float,
    wanted: str,
) -> None:  # fmt: skip
    """Print one row; number: which of a measurement, and its unit."""
    key, unit = number
    packed, dense = (measured[side][key] / unit for side in sides)
    other = measured.get(LLAMA, {}).get(key)
    beside = "| |" if other is None else f"{other / unit:.1f} | {packed * unit / other:.2f} |"
    print(f"| {name} | {label} | {packed:.1f} | {dense:.1f} | {ratio:.2f} | {wanted} | {beside}", flush=True)


def shape_name(text: str) -> str:
    """One that there is; `choices` would refuse the default, which is a list of them."""
    if text not in SHAPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SHAPES)}")
    return text


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(AT_LEAST), type=shape_name, metavar="SHAPE")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to make, at least 3")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--compile", action="store_true", help="also with a static cache and a compiled step")
    parser.add_argument("--python", type=Path, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
