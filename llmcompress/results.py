"""What a run measured, gathered into results.json and the manifest; the card and the report show nothing else."""

import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from llmcompress.adapter import CONFIG, FOLDER, WEIGHTS, adapter_of, weight_bytes
from llmcompress.checkpoint import Checkpoint
from llmcompress.cost import Cost
from llmcompress.engines import verdicts
from llmcompress.files import read_json
from llmcompress.plan import Plan
from llmcompress.recipe import Recipe
from llmcompress.runtime_plan import RuntimePlan
from llmcompress.safetensors_file import read_header
from llmcompress.source import CODE, ModelSource
from llmcompress.structure_budget import StructurePlan
from llmcompress.thresholds import FILE as THRESHOLDS
from llmcompress.thresholds import thresholds_of

LIBRARIES = ("torch", "transformers", "compressed-tensors", "tokenizers", "safetensors", "lm_eval", "peft")
PACKAGES = ("llmcompress", *LIBRARIES)
PARTS = (
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "fc1", "fc2", "ffn")),
    ("embeddings", ("emb", "wte", "wpe", "lm_head")),
    ("norms", ("norm", "ln_")),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run began with."""

    recipe: Recipe  # the whole one
    source: ModelSource
    parameters: int  # of the model; those that are tied count once
    fetched_bytes: int  # downloaded or converted

    @property
    def item(self) -> int:
        """Bytes of a parameter in the recipe's dtype."""
        return int(getattr(torch, self.recipe.dtype).itemsize)

    @property
    def bytes(self) -> int:
        """Of everything stored, in the recipe's dtype."""
        return stored_parameters(self.source) * self.item

    def named(self, stage: ModelSource) -> ModelSource:
        """The result of a stage under the name and licence of the model it was made from."""
        kept = {key: getattr(self.source, key) for key in ("name", "hub_id", "revision", "license")}
        return replace(stage, **kept)


@dataclass(frozen=True, slots=True)
class Story:
    """The stages of a run."""

    predicted: Cost  # of all of them
    last: str  # name of the last one
    earlier: list[dict[str, Any]]  # records of the others
    training: list[dict[str, Any]]  # loss curves of all that trained
    seconds: float = 0.0  # of the last stage, its proof included, as the records of the others have it


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a finished run knows."""

    plan: Plan
    origin: Origin
    checkpoint: Checkpoint
    story: Story
    calibration: dict[str, Any] | None
    proof: dict[str, Any]
    scores: dict[str, Any] | None
    clock: "Clock"
    peak_bytes: int  # of this process, up to the written checkpoint
    peak_device_bytes: int  # of the same on a CUDA device; 0 without one


def collect_results(outcome: Outcome) -> dict[str, Any]:
    """Everything that the card and the report may show, as results.json holds it."""
    plan, checkpoint, records = outcome.plan, outcome.checkpoint, outcome.checkpoint.records()
    origin, config = outcome.origin, read_json(checkpoint.partial / "config.json")
    source, before = origin.source, origin.bytes
    layers = [row for record in records for row in record["layers"]]
    notes = [note for record in records for note in record["notes"]]
    output = weight_bytes(checkpoint.partial)
    compress_seconds = sum(record["seconds"] for record in records)
    stages = outcome.clock.stages | {"compress": max(outcome.clock.stages["compress"], compress_seconds)}
    earlier, adapter = outcome.story.earlier, adapter_record(checkpoint.partial)
    runtime = runtime_record(checkpoint.partial, plan, output)
    peaks = [
        outcome.peak_bytes,
        *(record["peak_bytes"] for record in records),
        *(s["peak_host_bytes"] for s in earlier),
    ]
    measured = {
        "peak_host_bytes": max(peaks),
        "peak_device_bytes": outcome.peak_device_bytes,
        "disk_bytes": disk_bytes(checkpoint.partial) + sum(s["bytes"] for s in earlier) + origin.fetched_bytes,
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
            "parameters": origin.parameters,
        },
        "recipe": origin.recipe.plain(),
        "format": plan.format_name,
        "calibration": outcome.calibration,
        "size": {
            "before_bytes": before,
            "after_bytes": output,
            "ratio": output / before,
            "parts": parts(origin, plan, layers) + adapter_part(adapter),
        },
        "adapter": adapter,
        "runtime": runtime,
        "stages": stages_of(outcome, output),
        "training": outcome.story.training,
        "sparsity": sparsity(origin, plan, layers),
        "layers": layers,
        "kept": [{"name": name, "reason": reason} for name, reason in plan.kept.items()],
        "notes": list(dict.fromkeys([*(n for s in earlier for n in s["notes"]), *plan.notes, *notes])),
        "plan": {"predicted": asdict(outcome.story.predicted), "measured": measured},
        "timing": {"total_seconds": sum(stages.values()), "stages": stages},
        "proof": outcome.proof,
        "engines": verdicts(config, adapter=adapter is not None, thresholds=runtime is not None),
        "code": CODE if "per_layer_config" in config else None,
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
        "adapter",
        "runtime",
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
        self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Also what an earlier try has spent, where its work is not done again."""
        self.stages[name] = self.stages.get(name, 0.0) + seconds


def parts(origin: Origin, plan: Plan, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes before and after by part of the model."""
    packed = {row["name"] + ".weight": row["after_bytes"] for row in layers}
    sizes: dict[str, list[int]] = {}
    for info in origin.source.tensors.values():
        sizes.setdefault(part_of(info.name), [0, 0])[0] += prod(info.shape) * origin.item
    for info in result_of(plan).tensors.values():
        sizes.setdefault(part_of(info.name), [0, 0])[1] += packed.get(info.name, prod(info.shape) * origin.item)
    return [{"part": name, "before_bytes": before, "after_bytes": now} for name, (before, now) in sizes.items()]


def adapter_record(folder: Path) -> dict[str, Any] | None:
    """What is said of the LoRA weights beside a model; None if it has none."""
    place = adapter_of(folder)
    if place is None:
        return None
    config, tensors = read_json(place / CONFIG), read_header(place / WEIGHTS)
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "linears": len(tensors) // 2,
        "parameters": sum(prod(info.shape) for info in tensors.values()),
        "bytes": (place / WEIGHTS).stat().st_size,
    }


def runtime_record(folder: Path, plan: Plan, size: int) -> dict[str, Any] | None:
    """What is said of the thresholds beside a model; None if it has none.

    read_bytes: what one token of decoding reads of the weights, the embedding table aside where that is not the head.
    Packed weights have no columns that could be left out.
    """
    found = thresholds_of(folder)
    if found is None:
        return None
    table = unread_bytes(plan)
    shapes = {linear.name: prod(linear.shape) * plan.itemsize for linear in plan.linears}
    left_out = found.sparsity * sum(size for name, size in shapes.items() if sparse(plan, name))
    return {
        "method": "teal",
        "sparsity": found.sparsity,
        "dense_tokens": found.dense_tokens,
        "linears": len(found.modules),
        "file": THRESHOLDS,
        "read_bytes": {"before": size - table, "after": int(size - table - left_out)},
    }


def sparse(plan: Plan, linear: str) -> bool:
    """Whether columns of a linear are left out at run time."""
    return isinstance(plan, RuntimePlan) and plan.format_name == "dense" and plan.sparse(linear)


def unread_bytes(plan: Plan) -> int:
    """Of the embedding table, of which a token reads one row; 0 where the head is the same table."""
    vocabulary = plan.source.config.get("vocab_size")
    tables = [info.shape for info in plan.tensors_of(None) if len(info.shape) == 2 and info.shape[0] == vocabulary]
    return prod(tables[0]) * plan.itemsize if len(tables) > 1 else 0


def adapter_part(adapter: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The LoRA weights as a part of the model; it had none before."""
    return [{"part": FOLDER, "before_bytes": 0, "after_bytes": adapter["bytes"]}] if adapter else []


def sparsity(origin: Origin, plan: Plan, layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Zeros in the pruned linears, as shares of three totals; None if nothing was pruned."""
    pruned = [row for row in layers if "zeros" in row]
    if not pruned:
        return None
    shapes = {linear.name: prod(linear.shape) for linear in plan.linears}
    zeros = sum(row["zeros"] for row in pruned)
    parameters = origin.parameters - stored_parameters(origin.source) + stored_parameters(plan.source)
    return {
        "zeros": zeros,
        "of_pruned_linears": zeros / sum(shapes[row["name"]] for row in pruned),
        "of_decoder_linears": zeros / sum(shapes.values()),
        "of_parameters": zeros / parameters,
    }


def result_of(plan: Plan) -> ModelSource:
    """The tensors that a plan leaves, before anything is packed."""
    return plan.result if isinstance(plan, StructurePlan) else plan.source


def stored_parameters(source: ModelSource) -> int:
    """Numbers in all tensors of a checkpoint, old buffers included."""
    return sum(prod(info.shape) for info in source.tensors.values())


def stage_record(
    plan: Plan, checkpoint: Checkpoint, name: str, proof: dict[str, Any], peak: int, scores: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is kept of a stage that is not the last."""
    records, curve = checkpoint.records(), read_json(checkpoint.state / "curve.json")
    return {
        "name": name,
        "parameters": stored_parameters(result_of(plan)),
        "bytes": weight_bytes(checkpoint.partial),
        "seconds": sum(record["seconds"] for record in records),
        "peak_host_bytes": max([peak, *(record["peak_bytes"] for record in records)]),
        "proof": proof,
        "perplexity": scores,
        "training": [curve] if curve else [],
        "notes": [*plan.notes, *(note for record in records for note in record["notes"])],
    }


def stages_of(outcome: Outcome, output: int) -> list[dict[str, Any]]:
    """Size and perplexity before the first stage and after each; empty for a run of one."""
    if not outcome.story.earlier:
        return []
    scored = outcome.scores["perplexity"] if outcome.scores else []

    def texts(side: str) -> list[dict[str, Any]]:
        return [{"name": row["name"], "value": row[side]["value"]} for row in scored if row[side]]

    origin = outcome.origin
    before = {"name": "before", "parameters": origin.parameters, "bytes": origin.bytes, "seconds": None}
    before |= {"perplexity": texts("base")}
    keys = ("name", "parameters", "bytes", "seconds", "perplexity")
    earlier = [{key: stage[key] for key in keys} for stage in outcome.story.earlier]
    parameters = stored_parameters(result_of(outcome.plan))
    last = {"name": outcome.story.last, "parameters": parameters, "bytes": output, "seconds": outcome.story.seconds}
    return [before, *earlier, last | {"perplexity": texts("compressed")}]


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


@cache
def version(package: str) -> str | None:
    """Installed version, or None; looked up once, as it takes milliseconds."""
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
