"""What a run measured, gathered into results.json and the manifest; the card and the report show nothing else."""

import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import torch

from llmcompress.checkpoint import Checkpoint
from llmcompress.engines import verdicts
from llmcompress.files import read_json
from llmcompress.plan import Plan

PACKAGES = ("llmcompress", "torch", "transformers", "compressed-tensors", "tokenizers", "safetensors", "lm_eval")
PARTS = (
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "fc1", "fc2", "ffn")),
    ("embeddings", ("emb", "wte", "wpe", "lm_head")),
    ("norms", ("norm", "ln_")),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a finished run knows."""

    plan: Plan
    checkpoint: Checkpoint
    parameters: int
    calibration: dict[str, Any] | None
    proof: dict[str, Any]
    scores: dict[str, Any] | None
    clock: "Clock"
    peak_bytes: int  # of this process, up to the written checkpoint
    peak_device_bytes: int  # of the same on a CUDA device; 0 without one
    fetched_bytes: int  # downloaded or converted


def collect_results(outcome: Outcome) -> dict[str, Any]:
    """Everything that the card and the report may show, as results.json holds it."""
    plan, checkpoint, records = outcome.plan, outcome.checkpoint, outcome.checkpoint.records()
    source, config = plan.source, read_json(checkpoint.partial / "config.json")
    layers = [row for record in records for row in record["layers"]]
    notes = [note for record in records for note in record["notes"]]
    output = sum(path.stat().st_size for path in checkpoint.partial.glob("*.safetensors"))
    compress_seconds = sum(record["seconds"] for record in records)
    stages = outcome.clock.stages | {"compress": max(outcome.clock.stages["compress"], compress_seconds)}
    measured = {
        "peak_host_bytes": max([outcome.peak_bytes, *(record["peak_bytes"] for record in records)]),
        "peak_device_bytes": outcome.peak_device_bytes,
        "disk_bytes": disk_bytes(checkpoint.partial) + outcome.fetched_bytes,
        "output_bytes": output,
        "seconds": sum(stages[name] for name in ("source", "calibrate", "compress")),
    }
    return {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "name": checkpoint.folder.name,
        "base_model": {
            "id": source.name,
            "hub_id": source.hub_id,
            "revision": source.revision,
            "license": source.license,
            "model_type": config.get("model_type"),
            "parameters": outcome.parameters,
        },
        "recipe": plan.recipe.plain(),
        "format": plan.format_name,
        "calibration": outcome.calibration,
        "size": {
            "before_bytes": plan.before_bytes,
            "after_bytes": output,
            "ratio": output / plan.before_bytes,
            "parts": parts(plan, layers),
        },
        "sparsity": sparsity(plan, layers, outcome.parameters),
        "layers": layers,
        "kept": [{"name": name, "reason": reason} for name, reason in plan.kept.items()],
        "notes": list(dict.fromkeys(plan.notes + notes)),
        "plan": {"predicted": asdict(plan.predicted), "measured": measured},
        "timing": {"total_seconds": sum(stages.values()), "stages": stages},
        "proof": outcome.proof,
        "engines": verdicts(config),
        "scores": outcome.scores,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": machine(),
    }


def manifest(results: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """llmcompress.json: what made the folder, for `inspect` and for anyone who wants to make it again."""
    keys = (
        "schema",
        "created",
        "name",
        "base_model",
        "recipe",
        "format",
        "calibration",
        "sparsity",
        "layers",
        "kept",
        "notes",
        "plan",
        "proof",
        "engines",
        "versions",
        "machine",
    )
    return {"fingerprint": fingerprint} | {key: results[key] for key in keys}


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.monotonic()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - start


def parts(plan: Plan, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes before and after by part of the model."""
    after = {row["name"] + ".weight": row["after_bytes"] for row in layers}
    sizes: dict[str, list[int]] = {}
    for info in plan.source.tensors.values():
        dense = prod(info.shape) * plan.dtype.itemsize
        size = sizes.setdefault(part_of(info.name), [0, 0])
        size[0] += dense
        size[1] += after.get(info.name, dense)
    return [{"part": name, "before_bytes": before, "after_bytes": now} for name, (before, now) in sizes.items()]


def sparsity(plan: Plan, layers: list[dict[str, Any]], parameters: int) -> dict[str, Any] | None:
    """Zeros in the pruned linears, as shares of three totals; None if nothing was pruned."""
    pruned = [row for row in layers if "zeros" in row]
    if not pruned:
        return None
    shapes = {linear.name: prod(linear.shape) for linear in plan.linears}
    zeros = sum(row["zeros"] for row in pruned)
    return {
        "zeros": zeros,
        "of_pruned_linears": zeros / sum(shapes[row["name"]] for row in pruned),
        "of_decoder_linears": zeros / sum(shapes.values()),
        "of_parameters": zeros / parameters,
    }


def part_of(tensor: str) -> str:
    """Which part of a model a tensor belongs to, by its name; norms first, as they sit inside the others."""
    for name, marks in (PARTS[3], *PARTS[:3]):
        if any(mark in tensor for mark in marks):
            return name
    return "other"


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:  # getrusage also counts the process that this one was forked from
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine that the measurements are from."""
    import psutil

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "gpu": gpu}


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
