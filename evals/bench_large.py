"""Peak memory, time and size of a run on a model larger than its memory bound, beside what `plan` predicted.

    python evals/bench_large.py                                   # Llama-3-8B's shape, 16 GB on disk, max_memory 6GiB
    python evals/bench_large.py --layers 1 --samples 2 --length 64               # a quick look at the same code
    python evals/bench_large.py --shape smollm2-135m --layers 120 --max-memory none --group-size 64 --output deep.json
    python evals/bench_large.py --structure taylor --max-memory none                  # scoring, and an MLP a fifth less

The model has random weights (normal, standard deviation 0.02, fixed seed; norms are 1) in bfloat16 and a byte-level
tokenizer trained on the spot on random words, so nothing is downloaded. It is written shard by shard into a new folder
below `--scratch`, and that folder is removed at the end, after a failure too (unless `--keep`). Then

    python -m llmcompress run RECIPE --output DIR --no-eval --json

runs in a fresh process: int4 (or MLPs of fewer channels), 8 x 256 calibration tokens, no evaluation. What is measured:
- peak of the run: VmHWM of that process, polled until it ends (every mapped page that was resident counts);
- peak of children: the same for the largest of the processes it starts (the proof of loading is one), apart from the
  run's own, because `max_memory` and `plan` speak of the run; the largest sum of all at one moment stands beside;
- the run's own measurement, its plan's prediction, seconds by stage, bytes of the model and of the result.

What is unfair: random weights have no outliers and random words no meaning, so errors say nothing and are not shown.
Seconds include reading 16 GB from whatever disk `--scratch` is on, part of it from the page cache because the model was
written a moment ago.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provenance import in_words, provenance
from random_model import SHAPES, model_bytes, write_model, write_text, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.1


@dataclass
class Usage:
    """Resident memory of a process and of everything below it, in bytes."""

    run: int = 0  # VmHWM of the process itself
    children: dict[int, int] = field(default_factory=dict)  # VmHWM of each process below it, by id
    together: int = 0  # largest sum of VmRSS at one moment


def main() -> int:
    args = arguments().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the scratch folder is removed then too
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    args.scratch.mkdir(parents=True, exist_ok=True)
    check_disk(args.scratch, shape)
    folder = Path(tempfile.mkdtemp(prefix="bench-large-", dir=args.scratch))
    try:
        start = time.perf_counter()
        write_model(folder / "model", shape)
        write_text(folder / "text.txt", args.samples * args.length)
        write_tokenizer(folder / "model", folder / "text.txt")
        say(f"model of {tree_bytes(folder / 'model') / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s")
        if args.only_model:
            return 0
        report = measure(folder, args)
    finally:
        if args.keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return int(report["exit_code"] != 0 or report["under_max_memory"] is False)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="decoder blocks, in place of the shape's own number")
    parser.add_argument("--method", choices=["rtn", "hqq", "gptq", "awq"], default="gptq")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--structure", metavar="SCORE", help="in place of a method: narrower MLPs by this score")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--max-memory", default="6GiB", help="bound of the run in GiB, such as 6GiB, or none")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="disk for model and result")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder for a look")
    parser.add_argument("--only-model", action="store_true", help="write the model and stop")
    parser.add_argument("--output", type=Path, help="write everything measured to this JSON file")
    return parser


def check_disk(scratch: Path, shape: dict[str, Any]) -> None:
    """Refuse to start without room for the model, the result and what a run keeps meanwhile."""
    need = int(1.6 * model_bytes(shape)) + 2 * 10**9
    free = shutil.disk_usage(scratch).free
    say(f"{scratch}: {free / 1e9:.0f} GB free, {need / 1e9:.0f} GB needed (model of {model_bytes(shape) / 1e9:.1f} GB)")
    if free < need:
        raise SystemExit(f"{scratch}: {free / 1e9:.1f} GB free, expected {need / 1e9:.1f} GB; try another --scratch")


# ---- the run -------------------------------------------------------------------------------------------------------


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run the recipe in a fresh process, watch its memory, and put everything in one record."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(folder, args), indent=1))  # JSON is YAML
    output = folder / "result"
    command = [sys.executable, "-m", "llmcompress", "run", str(recipe), "--output", str(output), "--no-eval", "--json"]
    log = folder / "run.log"
    say(" ".join(command))
    start = time.perf_counter()
    code, usage = watch(command, log)
    seconds = time.perf_counter() - start
    if code:
        say(log.read_text()[-4000:])
    results = json.loads((output / "results.json").read_text()) if code == 0 else {}
    bound = None if args.max_memory == "none" else gibibytes(args.max_memory)
    return {
        "machine": provenance(),
        "shape": args.shape,
        "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"],
        "recipe": recipe_of(folder, args),
        "exit_code": code,
        "seconds": seconds,
        "max_memory_bytes": bound,
        "run_peak_bytes": usage.run,
        "children_peak_bytes": max(usage.children.values(), default=0),
        "together_peak_bytes": usage.together,
        "under_max_memory": None if bound is None else usage.run <= bound,
        "model_bytes": tree_bytes(folder / "model"),
        "result_bytes": tree_bytes(output) if code == 0 else None,
        "plan": results.get("plan"),
        "timing": results.get("timing"),
        "versions": results.get("versions"),
    }


def recipe_of(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    calibration = {"data": str(folder / "text.txt"), "samples": args.samples, "length": args.length, "seed": 0}
    step: dict[str, Any] = {"method": args.method, "bits": 4, "group_size": args.group_size}
    if args.structure:
        step = {"structure": "mlp_channel", "score": args.structure, "ratio": 0.2, "of": "group", "multiple": 128}
    recipe = {"model": str(folder / "model"), "dtype": "bfloat16", "calibration": calibration, "steps": [step]}
    return recipe if args.max_memory == "none" else recipe | {"max_memory": args.max_memory}


def watch(command: list[str], log: Path) -> tuple[int, Usage]:
    """Run `command` to its end; returns its exit code and the memory of it and its children."""
    usage = Usage()
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                sample(process.pid, usage)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode, usage


def sample(root: int, usage: Usage) -> None:
    """Raise the peaks of `usage` to what the process `root` and its descendants show now."""
    together = 0
    for pid in [root, *descendants(root)]:
        peak, now = memory(pid)
        together += now
        if pid == root:
            usage.run = max(usage.run, peak)
        else:
            usage.children[pid] = max(usage.children.get(pid, 0), peak)
    usage.together = max(usage.together, together)


def descendants(pid: int) -> list[int]:
    """Ids of all processes below `pid`; one that ends meanwhile is left out."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(child) for child in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in below:
            found += [child, *descendants(child)]
    return found


def memory(pid: int) -> tuple[int, int]:
    """VmHWM and VmRSS in bytes; zeros for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return 1024 * kilobytes.get("VmHWM", 0), 1024 * kilobytes.get("VmRSS", 0)


# ---- the report ----------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """Predicted beside measured, as Markdown."""
    here, plan = report["machine"], report["plan"] or {}
    predicted, measured = plan.get("predicted", {}), plan.get("measured", {})
    rows = [
        ("peak memory of the run", predicted.get("peak_host_bytes"), report["run_peak_bytes"]),
        ("the same, measured by itself", None, measured.get("peak_host_bytes")),
        ("peak memory of its children", None, report["children_peak_bytes"]),
        ("peak of all at one moment", None, report["together_peak_bytes"]),
        ("size of the result", predicted.get("output_bytes"), measured.get("output_bytes")),
    ]
    times = [
        ("time up to the checkpoint", predicted.get("seconds"), measured.get("seconds")),
        ("time of the whole process", None, report["seconds"]),
    ]
    lines = [
        f"{in_words(here)}; {report['shape']} with {report['layers']} layers, {report['model_bytes'] / 1e9:.2f} GB, "
        f"{next(iter(report['recipe']['steps'][0].values()))}, exit code {report['exit_code']}.",
        "",
        "| | predicted | measured |",
        "|---|---|---|",
        *(f"| {name} | {gib(before)} | {gib(after)} |" for name, before, after in rows),
        *(f"| {name} | {seconds_text(before)} | {seconds_text(after)} |" for name, before, after in times),
    ]
    stages = (report["timing"] or {}).get("stages", {})
    lines += ["", f"Stages: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in stages.items()) or 'none'}."]
    if report["max_memory_bytes"] is not None:
        answer = "yes" if report["under_max_memory"] else "NO"
        lines.append(f"Stayed under max_memory ({gib(report['max_memory_bytes'])}): {answer}.")
    return "\n".join(lines)


def gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f} GiB"


def seconds_text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f} s"


def gibibytes(text: str) -> int:
    """Bytes of "6GiB"."""
    return int(float(text.removesuffix("GiB")) * 2**30)


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def say(message: str) -> None:
    sys.stderr.write(message + "\n")


if __name__ == "__main__":
    sys.exit(main())
