"""Several processes of one `accelerate launch`: the first does the run, the others join when it trains.

    accelerate launch --num_processes 2 -m llmcompress run RECIPE

The first process tells the others what to join and when to end; until then they wait. All of them must see the same
files. A launch of a kind that does not work is refused by the first one before anything is done, and the others end.
Where nothing was launched, nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from llmcompress.errors import LLMCompressError, PlanError

PATIENCE = timedelta(days=7)  # other processes wait while the first one compresses


def launched() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that does the run."""
    return int(os.environ.get("RANK", "0")) == 0


def switched_on(variable: str) -> bool:
    """Whether `accelerate launch` has set a switch."""
    return os.environ.get(variable, "").lower() in ("true", "1")


def refusal(found: str, remedy: str) -> PlanError:
    """What to raise for a launch."""
    return PlanError(f"accelerate launch: accelerate {found}, which training does not work with; {remedy}")


@contextmanager
def leading(*, cpu: bool) -> Iterator[None]:
    """For the first process: the others end when this is left, whatever happened; cpu: where training will be.

    Raises PlanError for a launch that training does not work with.
    """
    if launched() > 1:
        connect(cpu=cpu)
    try:
        yield
    finally:
        tell_others(None)


@contextmanager
def training_together() -> Iterator[None]:
    """For the first process while all of them train: an error of its own parts it from the others.

    They are in the middle of a step and could not be told anything; without it their next exchange fails, and the
    launcher ends them. An LLMCompressError is one that all of them have come to, and the others wait for a task.
    """
    try:
        yield
    except LLMCompressError:
        raise
    except BaseException:
        if launched() > 1:
            import torch

            torch.distributed.destroy_process_group()
        raise


def tell_others(task: dict[str, Any] | None) -> None:
    """Let the other processes join `task`, or end."""
    if launched() > 1 and connected():
        exchange(task)


def tasks(*, cpu: bool) -> Iterator[dict[str, Any]]:
    """For every other process: what the first one asks for, one after another, until it ends."""
    try:
        connect(cpu=cpu)
    except PlanError:
        return  # the first process says it
    while (task := exchange(None)) is not None:
        yield task


def connect(*, cpu: bool) -> None:
    """Join the group of processes; raises PlanError for a launch that training does not work with."""
    from llmcompress.training.sharding import start

    start(cpu=cpu, timeout=PATIENCE)


def connected() -> bool:
    """Whether this process can still reach the others."""
    import torch

    return torch.distributed.is_initialized()


def exchange(task: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the first process hands out."""
    from accelerate.utils import broadcast_object_list

    found: list[dict[str, Any] | None] = [task]
    return broadcast_object_list(found, from_process=0)[0]
