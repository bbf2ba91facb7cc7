"""The state of a training: what is on disk, so that a run that was killed continues to the same bytes.

    train-000100.safetensors   weights, both moments of Adam, and what the technique remembers, after 100 steps
    train.json                 how far that is, and the losses so far; written last, and names its file
    train-000000.safetensors   before there are steps: what a technique has found by passes over the text

The tensors are those of a plain run, however the weights were shared out over processes; the first process writes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.checkpoint import read_tensors, write_tensors
from llmcompress.files import read_json, write_json
from llmcompress.training.sharding import shared_out, whole
from llmcompress.training.technique import MOMENTS, Technique


@dataclass(slots=True)
class Curve:
    """The loss of every step, and how fast they went."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Saved:
    """What a killed run has left to continue from; empty if it left nothing."""

    curve: Curve
    tensors: Mapping[str, Tensor]

    @property
    def remembered(self) -> dict[str, Tensor]:
        """What the technique remembers."""
        mine = "technique."
        return {key.removeprefix(mine): tensor for key, tensor in self.tensors.items() if key.startswith(mine)}


def state_tensors(trained: Mapping[str, Tensor], optimizer: Any, *, keep: bool) -> dict[str, Tensor]:
    """Trained tensors and Adam's moments, whole; empty unless this process is to keep them, but all have to call."""
    tensors = {}
    for name, parameter in trained.items():
        for key, value in {"weight": parameter.detach(), **optimizer.state[parameter]}.items():
            found = whole(value)
            if keep:
                tensors[f"{key}.{name}"] = found.cpu()
    return tensors


def save_state(folder: Path, tensors: Mapping[str, Tensor], technique: Technique, curve: Curve) -> None:
    """Everything that a run continues from; the record comes last and names its file."""
    file = state_file(folder, len(curve.losses))
    write_tensors(file, {**tensors, **of_technique(technique)})
    record = {"file": file.name, "losses": curve.losses}
    write_json(folder / "train.json", record | {"tokens": curve.tokens, "seconds": curve.seconds})
    for old in folder.glob("train-*.safetensors"):
        if old.name != record["file"]:
            old.unlink()


def save_choice(folder: Path, technique: Technique) -> None:
    """What a technique has chosen before the first step, so that a run that continues need not choose again."""
    write_tensors(state_file(folder, 0), of_technique(technique))


def state_file(folder: Path, done: int) -> Path:
    """Where tensors are after so many steps; after none, what the technique has chosen before."""
    return folder / f"train-{done:06d}.safetensors"


def of_technique(technique: Technique) -> dict[str, Tensor]:
    """What it remembers, by names in the state."""
    return {f"technique.{key}": tensor for key, tensor in technique.state().items()}


def read_state(folder: Path) -> Saved:
    """What `save_state` wrote last, or what was chosen before the first step, or nothing."""
    if record := read_json(folder / "train.json"):
        curve = Curve(list(record["losses"]), int(record["tokens"]), float(record["seconds"]))
        return Saved(curve, read_tensors(folder / record["file"]))
    chosen = state_file(folder, 0)
    return Saved(Curve(), read_tensors(chosen) if chosen.exists() else {})


@torch.no_grad()
def restored(saved: Saved, trained: Mapping[str, Tensor], optimizer: Any) -> Curve:
    """Give parameters and optimizer what was saved, if steps were taken before; the curve so far."""
    if not saved.curve.losses:
        return saved.curve
    for name, parameter in trained.items():
        parameter.copy_(shared_out(saved.tensors[f"weight.{name}"], parameter))
        if f"step.{name}" in saved.tensors:  # a parameter that no step has reached has no moments
            moments = {key: shared_out(saved.tensors[f"{key}.{name}"], parameter) for key in MOMENTS}
            optimizer.state[parameter] = {"step": saved.tensors[f"step.{name}"], **moments}
    return saved.curve
