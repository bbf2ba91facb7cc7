"""The training loop: plain, through accelerate, and exact to the bit when a killed run continues.

Each optimizer step takes `batch` windows of a fixed order, so what a step sees depends on its number alone. Every
`checkpoint_every` steps its state is written (`state.py`), from which a killed run continues. Pruned weights stay zero:
their gradients are cleared before the norm is taken, and they are set to zero again after the step, since Adam's
moments would move them. Weight decay is AdamW's, a share of the weight itself, which leaves zeros alone.

What is done beside these steps is the business of a technique (`technique.py`), which is called before and after them
and keeps masks of its own; its tensors are part of the state. What it has found by passes over the text before the
first step is written at once, so that no run that continues does them again. Parameters that it adds are clipped by
themselves: the gradient of a gate says nothing of how far weights may go.

A loss or a gradient that is no number ends the training before the optimizer sees it.

Processes of one launch share the windows of a step, and under FSDP also the weights, see `sharding.py`, or the state of
the optimizer, see `deepspeed.py`. The first one writes everything and keeps the result.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import CalibrationError
from llmcompress.training.deepspeed import Zero
from llmcompress.training.sharding import put_together, shared_out, start, whole
from llmcompress.training.state import Curve, read_state, restored, save_choice, save_state, state_tensors
from llmcompress.training.step import Train
from llmcompress.training.technique import Learner, Technique

FLOOR = 0.1  # of the learning rate, at the end of the cosine
BETAS = (0.9, 0.95)

Loss = Callable[[Any, Tensor], Tensor]  # (model, rows of the windows [n] int64) -> loss, with its graph
Tell = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """What is learned."""

    windows: int  # how many there are
    length: int  # tokens of each
    loss: Loss
    masks: Mapping[str, Tensor]  # parameter name -> bool, False where the weight must stay zero
    cpu: bool  # stay there, whatever the machine has
    technique: Technique | None = None  # what happens beside the steps
    targets: tuple[str, ...] = ()  # names of the parameters that the technique is for
    given: Mapping[str, Tensor] = field(default_factory=dict)  # masks of these for it


def train(model: Any, options: Train, task: Task, state: Path, tell: Tell) -> Curve:
    """Train the parameters of `model` that require gradients, in place; the first process has the result.

    state: folder for what a killed run continues from.  tell: called with the steps done, and what to show.
    Raises CalibrationError if the loss or a gradient is no number, or a batch cannot be shared by the processes;
    PlanError for a launch of a kind that does not work.
    """
    accelerator = start(cpu=task.cpu, options=options)
    technique = task.technique or Technique(options)
    saved = read_state(state)
    learner = learner_of(model, options, task, accelerator)
    learner.continues = bool(saved.tensors)
    own = set(trainable(model))
    model.train()  # now, as blocks recompute for `gradient_checkpointing` in this mode alone
    technique.prepare(learner)
    agreed(technique, learner, accelerator)
    groups = parameter_groups(trainable(model), options)
    fused = True if task.cpu else None  # one pass over memory; on GPUs torch chooses
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=BETAS, fused=fused)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    learner.optimizer = optimizer
    trained = trainable(model)  # only now: sharding replaces parameters
    masks = {name: shared_out(mask, trained[name]) for name, mask in task.masks.items()}
    if isinstance(accelerator, Zero):
        accelerator.hold(trained, masks)
    added = trained.keys() - own
    curve = restored(saved, trained, optimizer)
    if learner.continues:
        technique.load(saved.remembered, learner)
    elif options.scoring_bytes and accelerator.is_main_process:
        save_choice(state, technique)
    del saved  # weights, which the model has
    cleared(trained, technique.masks, learner)
    for step in range(len(curve.losses), options.steps):
        began = time.monotonic()
        torch.manual_seed(options.seed * 1_000_003 + step)  # of a model's own dropout, if it has any
        technique.begin_step(step, learner)
        penalty = partial(technique.penalty, step, learner)
        mean = backward(accelerator, wrapped, task.loss, batch_rows(task.windows, options, step), options, penalty)
        masked(trained, masks, gradients=True)
        learner.rate = rate(step, options, technique.schedule(step))
        taken = technique.before_step(step, learner)
        masked(trained, technique.masks, gradients=True)
        norm = clipped(accelerator, trained, added, options.clip)
        if wrong := no_number(step, mean, norm):
            if not accelerator.is_main_process:
                return curve  # the first process says so
            raise wrong
        for group in optimizer.param_groups:
            group["lr"] = learner.rate
        if taken:
            optimizer.step()
        technique.after_step(step, learner)
        optimizer.zero_grad(set_to_none=True)
        masked(trained, masks, gradients=False)
        cleared(trained, technique.masks, learner)
        curve.losses.append(mean)
        curve.tokens += options.batch * task.length
        curve.seconds += time.monotonic() - began
        tell(step + 1, f"loss {mean:.3f}, {curve.tokens / curve.seconds:.0f} tokens/s")
        if (step + 1) % options.checkpoint_every == 0:
            tensors = state_tensors(trained, optimizer, keep=accelerator.is_main_process)
            if accelerator.is_main_process:
                save_state(state, tensors, technique, curve)
    technique.finish(learner)
    put_together(model, keep=accelerator.is_main_process)
    accelerator.free_memory()
    model.eval()
    return curve


def share_of_batch(options: Train, processes: int) -> int:
    """Windows of a step for each process; raises CalibrationError if they cannot be shared evenly."""
    share = options.batch // processes
    if share * processes != options.batch or share % options.micro_batch:
        raise CalibrationError(
            f"batch: {options.batch} windows cannot be shared by {processes} processes in passes of "
            f"{options.micro_batch}; set `batch` to a multiple of {processes * options.micro_batch}"
        )
    return share


def learner_of(model: Any, options: Train, task: Task, accelerator: Any) -> Learner:
    """What the technique sees; where there are weights for it, the model is put where it will learn."""
    if task.targets:  # only then: weights that will be shared out need not fit one device
        model.to(accelerator.device)
    weights = {name: model.get_parameter(name) for name in task.targets}
    rows = torch.tensor(drawn_rows(task.windows, options))
    return Learner(model, weights, partial(task.loss, model), rows, task.given)


def agreed(technique: Technique, learner: Learner, accelerator: Any) -> None:
    """Let all processes have what the first has chosen, masks and whatever else is bool in the state of the technique:
    sums on GPUs may round differently, and scores lie close."""
    state = technique.state()
    chosen = [key for key, tensor in state.items() if tensor.dtype == torch.bool]
    if accelerator.num_processes > 1 and chosen:
        from accelerate.utils import broadcast

        same = {key: broadcast(state[key].to(accelerator.device, torch.uint8)).bool() for key in chosen}
        technique.load(state | same, learner)


def backward(
    accelerator: Any, wrapped: Any, loss: Loss, rows: Tensor, options: Train, penalty: Callable[[], Tensor | None]
) -> float:
    """Gradients of a step's loss and penalty over the windows `rows` [batch] of all processes; the mean loss alone."""
    share = share_of_batch(options, accelerator.num_processes)
    mine = rows[accelerator.process_index * share :][:share]
    total = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(mine.split(options.micro_batch)):
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            value = loss(wrapped, part) * (len(part) / share)
        total += value.detach()
        extra = None if number else penalty()
        accelerator.backward(value if extra is None else value + extra)
    return float(accelerator.reduce(total, "mean"))


def clipped(accelerator: Any, trained: Mapping[str, Tensor], added: Collection[str], limit: float) -> float:
    """Clip the gradients of the weights, and of what a technique has added, by themselves; the norm of all before."""
    weights = [p for name, p in trained.items() if name not in added]
    others = [p for name, p in trained.items() if name in added]
    norms = [whole(accelerator.clip_grad_norm_(part, limit)) for part in (weights, others) if part]
    return math.hypot(*map(float, norms))


def no_number(step: int, loss: float, norm: float) -> CalibrationError | None:
    """What to raise if the loss of a step, or the norm of its gradient, is NaN or infinite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return None
    return CalibrationError(
        f"step {step}: the loss is {loss} and the norm of its gradient {norm}, so the weights would be lost; lower "
        "`learning_rate`, set `precision: float32`, or look at the data"
    )


def trainable(model: Any) -> dict[str, Tensor]:
    """Parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(trained: Mapping[str, Tensor], options: Train) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without."""
    matrices = [p for p in trained.values() if p.ndim > 1]
    others = [p for p in trained.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def rate(step: int, options: Train, place: tuple[int, int] | None = None) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine down to FLOOR of it.

    place: which step of how many it is in a schedule that is not that of all steps.
    """
    step, steps = place or (step, options.steps)
    if step < options.warmup:
        return options.learning_rate * (step + 1) / (options.warmup + 1)
    done = (step - options.warmup) / max(1, steps - options.warmup)
    return options.learning_rate * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)


def batch_rows(windows: int, options: Train, step: int) -> Tensor:
    """Windows of a step, [batch] int64: those of shuffled passes over all windows, one pass after another."""
    places = range(step * options.batch, (step + 1) * options.batch)
    return torch.tensor([int(order(windows, options.seed, at // windows)[at % windows]) for at in places])


def drawn_rows(windows: int, options: Train) -> list[int]:
    """All windows that some step takes, in order."""
    return sorted({int(row) for step in range(options.steps) for row in batch_rows(windows, options, step)})


@lru_cache(maxsize=2)  # a step may take the last windows of one pass and the first of the next
def order(windows: int, seed: int, passed: int) -> Tensor:
    """A permutation of the windows, another one for each pass."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + passed))


@torch.no_grad()
def masked(trained: Mapping[str, Tensor], masks: Mapping[str, Tensor], *, gradients: bool) -> None:
    """Clear masked weights, or their gradients; masks are placed, and cut, as their parameters are."""
    for name, mask in masks.items():
        target = trained[name].grad if gradients else trained[name]
        if target is not None:
            target.masked_fill_(~mask, 0)  # a product would make NaN of an infinity


@torch.no_grad()
def cleared(trained: Mapping[str, Tensor], masks: Mapping[str, Tensor], learner: Learner) -> None:
    """Zero where a technique has pruned: the weight, and its moments, which masks that move would leave behind."""
    masked(trained, masks, gradients=False)
    for name, mask in masks.items():
        for moment in learner.moments(trained[name]):
            moment.masked_fill_(~mask, 0)
