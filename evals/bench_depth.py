"""Does peak memory grow with depth? The same run on a random-weight Llama of 30 and of 120 layers.

    python evals/bench_depth.py
    python evals/bench_depth.py --layers 4 16 --samples 8 --length 64      # a quick look

Widths are SmolLM2-135M's (hidden 576, MLP 1536, 9 query and 3 key heads, vocabulary 49152, tied), weights are random,
the run is gptq, int4, group 64, 128 x 512 calibration tokens, without `max_memory`. Each depth is one call of
bench_large.py, which makes the model, runs `python -m llmcompress run` in a fresh process, polls its peak resident
memory (VmHWM) and removes everything. The second peak must be within 10% of the first, else the exit code is 1.

What is unfair: only the run itself is held to the bound. The proof of loading starts a process of its own, which loads
the whole result with stock libraries, so its memory does grow with depth; it is shown beside.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import in_words

ALLOWED = 0.10  # of the smaller depth's peak


def main() -> int:
    args = arguments().parse_args()
    shallow, deep = (peak(layers, args) for layers in args.layers)
    ratio = deep["run_peak_bytes"] / shallow["run_peak_bytes"]
    print(f"{in_words(shallow['machine'])}\n")
    print("| layers | peak of the run | predicted | peak of its children | time |\n|---|---|---|---|---|")
    for report in (shallow, deep):
        predicted = report["plan"]["predicted"]["peak_host_bytes"]
        print(
            f"| {report['layers']} | {gib(report['run_peak_bytes'])} | {gib(predicted)} | "
            f"{gib(report['children_peak_bytes'])} | {report['seconds']:.0f} s |"
        )
    good = abs(ratio - 1) <= ALLOWED
    print(f"\nRatio {ratio:.3f}: {'within' if good else 'NOT within'} {ALLOWED:.0%}.")
    if args.output:
        args.output.write_text(json.dumps({"runs": [shallow, deep], "ratio": ratio}, indent=1) + "\n")
    return 0 if good else 1


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[30, 120], help="the two depths")
    parser.add_argument("--method", choices=["rtn", "hqq", "gptq", "awq"], default="gptq")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="disk for models and results")
    parser.add_argument("--output", type=Path, help="write everything measured to this JSON file")
    return parser


def peak(layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """The report of bench_large.py for this depth."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, str(Path(__file__).with_name("bench_large.py")), "--shape", "smollm2-135m"]
        command += ["--layers", str(layers), "--method", args.method, "--group-size", "64", "--max-memory", "none"]
        command += ["--samples", str(args.samples), "--length", str(args.length), "--scratch", str(args.scratch)]
        code = subprocess.run([*command, "--output", str(file)], stdout=sys.stderr).returncode
        if code:
            raise SystemExit(f"{layers} layers: the run failed with exit code {code}, see above")
        return json.loads(file.read_text())


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
