"""Measure every operator on one NVIDIA GPU, within ten minutes: correctness first, then time against other ways.

    make bench-gpu                                                # or
    python kernels/benchmarks/gpu.py [--output gpu.json] [--minutes 10]

1. Every operator and every baseline is compared with float64; one that is wrong is not timed. Operators are so in
   float16, with biases, other activations and strides, too, and twice each, for the same bits (variants.py).
2. Bandwidth of a copy in memory.
3. Operators x linears of Llama 1B, 8B and 70B x M = 1, 4, 16, 64, 256, 4096 tokens, in bfloat16, symmetric groups of
   128, against torch in bfloat16, torch's int4 operator and, where they are installed, gemlite and marlin (timing.py
   says how). Large layers come first; what the time did not allow stands in `left_out`.

Written as JSON: times, shares of the copy's bandwidth (of weights as packed, x and y, each counted once), ratios (time
of the baseline over that of the operator), targets with the worst case of each, machine, versions, date and commit. The
exit code is 0 if all is right and no target is missed, 1 if something is wrong or missed, 2 if there is no GPU.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[1]
sys.path[:0] = [  # a machine with a GPU need not have this project installed
    str(KERNELS / "torch-ext"),
    str(KERNELS.parent / "evals"),
]

import torch
from cases import OPERATORS, TARGETS
from layers import GROUP, Shape
from measuring import Check, Clock, Plan, check, measure, wrong
from provenance import commit
from summary import in_words, lines, verdict
from timing import copy_bandwidth
from variants import check_variants

PACKAGES = ("torch", "triton", "gemlite", "marlin")
QUICK = (Shape("tiny", "gate, up", 192, 128), Shape("tiny", "q, o", 128, 128))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    parser.add_argument("--minutes", type=float, default=10, help="time budget; what does not fit is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # hardly anything, to try the program
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu.py: torch {torch.__version__} finds no CUDA device; this needs an NVIDIA GPU of compute capability "
            "8.0 or more, its driver, and a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    found = report(plan(torch.device(asked.device), asked.quick), Clock(60 * asked.minutes))
    asked.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(*lines(found["results"]), *map(in_words, found["targets"]), *notes(found), sep="\n")
    print(f"{found['seconds']:.0f} s, written to {asked.output}")
    return exit_code(found)


def plan(device: torch.device, quick: bool) -> Plan:
    """What to measure on this device."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 16
    if not quick:
        return Plan(device, cache)
    checks = (Check(24, 96, 32, False), Check(64, 128, GROUP, True))
    return Plan(device, cache, 2, 1 << 20, (1, 4), checks, (1, 3), QUICK)


@torch.inference_mode()
def report(what: Plan, clock: Clock) -> dict[str, Any]:
    """Everything that is written."""
    checks = [row for operator in OPERATORS for row in check(operator, what)]
    checks += check_variants(what.device)
    copied = copy_bandwidth(what.device, what.copy_bytes, what.samples)
    findings = measure(what, clock, copied, wrong(checks))
    return {
        "schema": 1,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine(what.device),
        "versions": versions(),
        "group": GROUP,
        "dtype": "bfloat16",
        "budget_seconds": clock.seconds,
        "seconds": clock.used(),
        "copy_bytes_per_second": copied,
        "correctness": checks,
        "missing": missing(what.device),
        "results": findings.results,
        "failures": findings.failures,
        "left_out": findings.left_out,
        "targets": [verdict(target, findings.results) for target in TARGETS],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The device by name, and what its time depends on."""
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine()}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cache_bytes": found.L2_cache_size,
    }


def versions() -> dict[str, str]:
    """Of Python, CUDA and the packages that are installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def missing(device: torch.device) -> dict[str, str]:
    """Why an implementation was not measured."""
    reasons = {made.name: made.missing(device) for operator in OPERATORS for made in operator.baselines}
    return {name: why for name, why in reasons.items() if why}


def notes(found: dict[str, Any]) -> Iterator[str]:
    """What was wrong, absent or left out, in words."""
    for operator, name in sorted(wrong(found["correctness"])):
        yield f"WRONG  {name} as {operator}: not timed, see `correctness`"
    for name, why in found["missing"].items():
        yield f"not measured  {name}: {why}"
    for row in found["failures"]:
        yield f"failed  {row['name']}, {row['model']} {row['parts']}, M = {row['tokens'] or 'any'}: {row['why']}"
    if found["left_out"]:
        yield f"{len(found['left_out'])} cases did not fit in {found['budget_seconds'] / 60:g} minutes, see `left_out`"


def exit_code(found: dict[str, Any]) -> int:
    """1 if an operator is wrong, fails or misses a target; baselines may do what they like."""
    ours = {operator.name for operator in OPERATORS}
    bad = any(name == operator for operator, name in wrong(found["correctness"]))
    failed = any(row["name"] == row["operator"] and row["name"] in ours for row in found["failures"])
    return int(bad or failed or any(target["met"] is False for target in found["targets"]))


if __name__ == "__main__":
    sys.exit(main())
