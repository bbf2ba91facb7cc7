"""The machine: where blocks are computed, and whether a run has room in memory and on disk."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.checkpoint import partial_folder, stages_folder
from llmcompress.cost import Cost
from llmcompress.errors import PlanError
from llmcompress.lazy import torch
from llmcompress.recipe import Recipe

if TYPE_CHECKING:
    from llmcompress.plan import Plan

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, AMD, and Windows below Linux


def device_of(recipe: Recipe) -> str:
    """Where blocks are computed, as torch spells it."""
    if recipe.device == "auto":
        return "cuda" if has_driver() and torch.cuda.is_available() else "cpu"
    if recipe.device == "cpu":
        return "cpu"
    try:
        kind = torch.device(recipe.device).type
    except RuntimeError:
        raise PlanError(f"device: {recipe.device!r} is not a device; try auto, cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise PlanError(f"device: {recipe.device!r} is not supported; try auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise PlanError("device: cuda was asked for and torch finds no CUDA device; use `device: cpu`")
    return recipe.device


def has_driver() -> bool:
    """Whether there may be a GPU, known without loading torch: a Linux system has a file for each driver."""
    return sys.platform != "linux" or any(Path(path).exists() for path in DRIVERS)


def check_machine(plan: "Plan", output: Path) -> None:
    """Memory and disk, before a weight is read. Raises PlanError with both numbers."""
    check_memory(plan)
    check_disk(plan.predicted, output)


def check_memory(plan: "Plan") -> None:
    """The recipe's bound on memory."""
    cost, limit = plan.predicted, plan.recipe.max_memory
    if limit is not None and cost.peak_host_bytes > limit:
        raise PlanError(
            f"max_memory: the run would need about {gib(cost.peak_host_bytes)}, {gib(limit)} are allowed; "
            f"{plan.advice}, or raise max_memory"
        )


def check_disk(cost: Cost, output: Path) -> None:
    """Room for a run into this folder, what it has written already included."""
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not place.is_dir():
        raise PlanError(f"{output}: cannot be made, {place} is a file; give another --output")
    free = shutil.disk_usage(place).free
    folders = (partial_folder(output), stages_folder(output))
    written = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    if cost.disk_bytes > free + written:  # a run that continues has written some of it already
        raise PlanError(
            f"{place}: the run needs {gib(cost.disk_bytes)} of disk and {gib(free + written)} are free; "
            "free some, or give another --output"
        )


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
