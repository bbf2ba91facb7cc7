"""Does a packed folder load as fast as a dense one? Both sides alternate in fresh processes on the same machine.

    python evals/bench_load.py DIR [DIR ...] [--repeats 7] [--json FILE]

Every DIR is a folder that `llmcompress run` has made in one of its own formats. It is exported to `dense` once, into a
temporary folder, so both hold the same values. Then, alternating, a fresh process imports what it needs, loads one of
them with `from_pretrained` and takes the time of that call alone; medians and their ratio are shown, and the exit code
is 1 if a ratio is above 1.5. The page cache is warm for both sides: this is the time of the loader, not of the disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from provenance import in_words, provenance

from llmcompress.export import export
from llmcompress.formats import OWN

ALLOWED = 1.5
LOADER = """
import sys, time, torch
from transformers import AutoModelForCausalLM
if sys.argv[2] == "packed":
    import llmcompress.runtime
start = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", local_files_only=True)
print(time.perf_counter() - start)
"""


def main() -> int:
    args = arguments().parse_args()
    print(f"{in_words(provenance())}; medians of {args.repeats}\n")
    print("| folder | format | packed | dense | packed / dense |\n|---|---|---|---|---|")
    rows = []
    for folder in args.folders:
        config = json.loads((folder / "config.json").read_text())
        name = config.get("quantization_config", {}).get("format", "dense")
        if name not in OWN:
            raise SystemExit(f"{folder}: is in the format {name}, expected one of {', '.join(OWN)}")
        with tempfile.TemporaryDirectory() as scratch:
            dense = Path(scratch) / "dense"
            export(folder, "dense", dense)
            times: dict[str, list[float]] = {"packed": [], "dense": []}
            for _ in range(args.repeats):
                times["packed"].append(seconds(folder, "packed"))
                times["dense"].append(seconds(dense, "dense"))
        packed, plain = median(times["packed"]), median(times["dense"])
        rows.append({"folder": folder.name, "format": name, "ratio": packed / plain, **times})
        print(f"| {folder.name} | {name} | {packed:.2f} s | {plain:.2f} s | {packed / plain:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": provenance(), "runs": rows}, indent=1) + "\n")
    return int(any(row["ratio"] > ALLOWED for row in rows))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="results in formats of this project")
    parser.add_argument("--repeats", type=int, default=7, help="loads per side")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def seconds(folder: Path, side: str) -> float:
    """Time of one load in a fresh process."""
    done = subprocess.run([sys.executable, "-c", LOADER, str(folder), side], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
