"""Time of int4 products at one token: int4_linear beside onnxruntime and llama.cpp.

    python -m venv peers && peers/bin/pip install onnxruntime onnx llama-cpp-python
    python evals/bench_cpu_peers.py --python peers/bin/python

The peers run in their own interpreter (cpu_peer_driver.py), which need not have all of them. They and int4_linear take
turns, process by process, and medians count. Every engine calls one weight again and again.

What is unfair: llama.cpp and onnxruntime's second row round activations to integers of 8 bits, int4_linear to such of
16; llama.cpp has groups of 32 and so 9% more bytes; it runs without the repacking that it does when it loads a model,
and its row leaves out the start of a graph, of which the others' calls have their own; activations are float32 there.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_cpu_linear import SHAPES, alternate, random_weight
from llmcompress_kernels.int4_linear import int4_linear
from provenance import in_words, provenance

DRIVER = Path(__file__).with_name("cpu_peer_driver.py")
OURS = "int4_linear, bfloat16"


def main() -> int:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    versions: dict[str, str] = {}
    turns: list[dict[str, dict[str, float]]] = []
    for _ in range(args.turns):
        peers = peer_times(args)
        versions = peers["versions"]
        turns.append(peers["seconds"] | {OURS: {shape: ours(shape, args.rounds) for shape in args.shapes}})
    engines = {
        name: {shape: statistics.median(turn[name][shape] for turn in turns) for shape in args.shapes}
        for name in turns[0]
    }
    machine = provenance() | {"torch": torch.__version__, "threads": args.threads} | versions
    print(f"{in_words(machine)}, {args.threads} threads, {versions}\n")
    print(table(engines, args.shapes))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "seconds": engines}, indent=1) + "\n")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="an interpreter that has the peers")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out x in")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def peer_times(args: argparse.Namespace) -> dict[str, Any]:
    """What the driver finds, in a process of the other interpreter."""
    shapes = [[int(side) for side in shape.split("x")] for shape in args.shapes]
    asked = json.dumps({"shapes": shapes, "threads": args.threads, "rounds": args.rounds})
    ran = subprocess.run([args.python, DRIVER], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


def ours(shape: str, rounds: int) -> float:
    weight, columns = random_weight(shape)
    x = torch.randn(1, columns).bfloat16()
    return alternate({OURS: lambda: int4_linear(x, *weight)}, rounds)[OURS]


def table(engines: dict[str, dict[str, float]], shapes: list[str]) -> str:
    lines = ["| us per product | " + " | ".join(shapes) + " |", "|---" * (len(shapes) + 1) + "|"]
    for name, times in engines.items():
        lines.append(f"| {name} | " + " | ".join(f"{times[shape] * 1e6:.0f}" for shape in shapes) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
