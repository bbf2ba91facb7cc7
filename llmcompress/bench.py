"""Packed beside dense: tokens per second, memory, and bytes read for each token.

Each measurement is a process of its own (`speed.py`), and the two sides alternate, so that what else the machine does
falls on both. The numbers are medians over rounds; the ratios are those of the medians.

A dense side that is the packed folder, unpacked, has held both forms while it was loaded, and its peak says so; a dense
folder (`--base`) has not.
"""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llmcompress.errors import FormatError, SourceError

if TYPE_CHECKING:
    from llmcompress.speed import Case

LIBRARIES = ("torch", "transformers", "compressed-tensors")
Progress = Callable[[str, int, int], None]  # what is being measured, how much is done, of how much
Turn = Callable[[], dict[str, Any]]  # one measurement


def bench(
    sides: dict[str, "Case"],
    *,
    rounds: int = 3,
    progress: Progress | None = None,
    beside: dict[str, Turn] | None = None,
) -> dict[str, Any]:
    """Measure `packed`, `dense` and whatever else is in `sides` in turn; the object that `--json` prints.

    beside: measurements of other engines that take turns with these; they return at least the seconds of `Measured`.
    Raises SourceError if a side cannot be loaded.
    """
    turns: dict[str, Turn] = {name: functools.partial(measured, case) for name, case in sides.items()} | (beside or {})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
    for number in range(rounds):
        for place, (name, turn) in enumerate(turns.items()):
            if progress:
                progress("measuring", number * len(turns) + place, rounds * len(turns))
            found[name].append(turn())
    medians = {name: summary(rows, sides.get(name, sides["packed"])) for name, rows in found.items()}
    return {
        "sides": {name: asdict(case) for name, case in sides.items()},
        "rounds": rounds,
        "machine": machine(),
        "measured": medians,
        "ratios": ratios(medians["packed"], medians["dense"]),
        "all": found,
    }


def measured(case: "Case") -> dict[str, Any]:
    """One measurement in a new process, with this process's import path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "llmcompress.speed", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, input="", check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"code {done.returncode} and no message"])[-1]
        kind, _, message = last.partition(": ")
        wrong = FormatError if kind.endswith("FormatError") else SourceError
        raise wrong(message if kind.endswith("Error") and message else f"{case.folder}: measuring it ended with {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(rows: list[dict[str, Any]], case: "Case") -> dict[str, Any]:
    """Medians, and tokens per second from them."""
    middle = {
        key: median(row[key] for row in rows) if isinstance(value, int | float) else value
        for key, value in rows[0].items()
    }
    return middle | {
        "prefill_tokens_per_second": case.prompt / middle["prefill_seconds"],
        "decode_tokens_per_second": 1 / middle["decode_seconds"],
    }


def ratios(packed: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Packed over dense: speeds, where more is better, and bytes, where less is."""
    keys = {
        "prefill": "prefill_tokens_per_second",
        "decode": "decode_tokens_per_second",
        "resident": "resident_bytes",
        "peak": "peak_bytes",
        "read": "read_bytes",
    }
    return {name: packed[key] / dense[key] for name, key in keys.items()}


def machine() -> dict[str, Any]:
    """What the numbers are worth nothing without."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def processor() -> str:
    """Name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines: Iterable[str] = path.read_text("utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
