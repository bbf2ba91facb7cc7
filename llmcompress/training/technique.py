"""What a technique is: something that happens beside the gradient steps of one plain loop.

    prepare       once, with the weights that training begins with: choose masks, add gates to the model
    begin_step    before the passes of a step: draw what is random, once for all of its micro-batches
    penalty       what is added to the loss of a step
    before_step   gradients are there, of pruned weights too: masks may move
    after_step    the optimizer has moved the weights: prune, shrink, rewind
    finish        once, after the last step: take away what `prepare` has added

A technique knows neither the loop nor the files. Of the model it sees a `Learner`; what it has to remember is in
tensors (`state`), so that a killed training continues exactly. A mask that it sets or replaces is kept by the loop:
gradients of pruned weights are cleared before their norm is taken, and after the step the weights and both of Adam's
moments are zero there, so that a weight which comes back begins like a new one.

To add one: `techniques/<name>.py` with its options, a class below `Technique`, and a row in `TRAININGS`.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmcompress.lazy import Tensor, torch
from llmcompress.training.step import Train

if TYPE_CHECKING:
    from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of what AdamW keeps of a parameter, beside its count of steps


@dataclass(slots=True)
class Learner:
    """What a technique sees of a training."""

    model: "nn.Module"
    weights: "Mapping[str, nn.Parameter]"  # by parameter name: the matrices that it is for, float32
    loss: Callable[[Tensor], Tensor]  # windows [n] int64 -> mean loss, with its graph
    rows: Tensor  # [n] int64: the windows that some step takes
    given: Mapping[str, Tensor] = field(default_factory=dict)  # masks of these weights that the options name
    optimizer: Any = None  # AdamW; None while the technique is prepared
    rate: float = 0.0  # learning rate of the step
    continues: bool = False  # an earlier run has left a state, which is loaded once the technique is prepared

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the weights."""
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in self.weights.items()}

    def moments(self, parameter: Tensor) -> list[Tensor]:
        """Adam's moments of a parameter, each of its shape; none before its first step."""
        state = self.optimizer.state
        return [state[parameter][key] for key in MOMENTS if key in state[parameter]] if parameter in state else []

    def gradients(self, rows: Tensor) -> dict[str, Tensor]:
        """Of the loss on some windows [n] int64, one at a time, with respect to every weight; parameters stay as they
        are, and so do their gradients. A model's own dropout is the same whenever a window is asked."""
        weights = list(self.weights.values())
        total = [torch.zeros_like(weight) for weight in weights]
        for row in rows:
            torch.manual_seed(int(row))
            found = torch.autograd.grad(self.loss(row[None]), weights)
            for place, gradient in zip(total, found, strict=True):
                place.add_(gradient, alpha=1 / len(rows))
        return dict(zip(self.weights, total, strict=True))


class Technique:
    """The base of all: does nothing, which is plain training."""

    def __init__(self, options: Train) -> None:
        self.options = options
        self.masks: dict[str, Tensor] = {}  # parameter name -> bool, True where a weight stays; none: all of them do

    def prepare(self, learner: Learner) -> None:
        """Before the first step, and again before a training continues, whose state is loaded afterwards."""

    def schedule(self, step: int) -> tuple[int, int]:
        """Which step of how many this is for the learning rate; rounds may begin it anew."""
        return step, self.options.steps

    def begin_step(self, step: int, learner: Learner) -> None:
        """Before the forward passes of a step; they, and those that recompute, all see what is drawn here."""

    def penalty(self, step: int, learner: Learner) -> Tensor | None:
        """Added to the loss of a step, with its graph; the curve does not show it."""
        return None

    def before_step(self, step: int, learner: Learner) -> bool:
        """With the step's gradients in `.grad`, dense ones; whether the optimizer takes this step."""
        return True

    def after_step(self, step: int, learner: Learner) -> None:
        """With the weights as the optimizer has left them."""

    def finish(self, learner: Learner) -> None:
        """After the last step."""

    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, besides weights, moments and the number of the step."""
        return {f"mask.{name}": mask for name, mask in self.masks.items()}

    def load(self, state: Mapping[str, Tensor], learner: Learner) -> None:
        """Continue from what `state` gave; tensors are on the CPU."""
        device = next(learner.model.parameters()).device
        self.masks = {
            name.removeprefix("mask."): mask.to(device) for name, mask in state.items() if name.startswith("mask.")
        }

    def record(self) -> dict[str, Any]:
        """What results.json says of it."""
        if not self.masks:
            return {}
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        density = kept / sum(mask.numel() for mask in self.masks.values())
        return {"density": density, "mask_sha256": mask_sha256(self.masks)}


def mask_sha256(masks: Mapping[str, Tensor]) -> str:
    """Fingerprint of masks: the same for the same names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name} {list(masks[name].shape)}".encode())
        digest.update(masks[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
