"""Lottery tickets: prune what training has made small, go back to the weights of early on, and train again. Frankle and
Carbin 2019, arXiv:1803.03635; rewinding to a step k, Frankle et al. 2020, arXiv:1912.05671; of the learning rate alone,
Renda et al. 2020, arXiv:2003.02389.

    train to the end -> keep the largest (1 - fraction) of what is left, of all matrices together -> θ = M * θ_k -> ...

After r rounds the density is (1 - fraction)^r. θ_k are the weights after step k of the first training: `rewind: 0` goes
back to where that began, which for a pretrained model is the pretrained one. Every training after the first begins at
its step k, with no moments in Adam. With `back: rate` only the learning rate goes back, and weights stay as they are.
What the last training leaves is not pruned any more. `steps` are those of all trainings together. One ranking of all
matrices may leave one of them empty, and then nothing passes through it any more; so every matrix keeps some weights of
its own, the largest, out of the same total; with `least: 0` an empty one is refused, as the paper knows no such share.
"""

from math import prod
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.sparsity import RANKING, Shapes, best_with_least
from llmcompress.training.step import Learn
from llmcompress.training.technique import Learner, Technique


class LotteryTicket(Learn):
    """Options of `train: lottery_ticket`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights",
        WEIGHTS,
        "density (1 - fraction)^r to the weight; weights go back to the bit; the same seed gives the same mask",
    )

    rounds: int = Field(4, ge=1, le=50, description="how often is pruned; a training before the first and after each")
    fraction: float = Field(0.2, gt=0, lt=1, description="share of the weights left that goes in each round")
    rewind: int = Field(0, ge=0, description="step of the first training that the others begin from")
    back: Literal["weights", "rate"] = Field("weights", description="what goes back: weights and rate, or the rate")
    least: float = Field(0.1, ge=0, le=1, description="share of a round's density that every matrix has at least")

    @property
    def density(self) -> float:
        """Share of the weights of all decoder linears that stays in the end."""
        return (1 - self.fraction) ** self.rounds

    @property
    def leaves(self) -> tuple[str, float] | None:
        """Zeros anywhere in a matrix."""
        return "layer", 1 - self.density

    @property
    def later(self) -> int:
        """Steps of every training but the first."""
        return (self.steps - self.rewind) // (self.rounds + 1)

    @property
    def shortest(self) -> int:
        """That of a training which begins anew."""
        return self.rewind + max(1, self.later)

    @property
    def ranking_bytes(self) -> int:
        """One ranking of all weights at the end of every round."""
        return RANKING

    @property
    def remembered_bytes(self) -> int:
        """The weights to go back to, in float32."""
        return 4 if self.back == "weights" else 0

    @property
    def first(self) -> int:
        """Steps of the first training, which also has those that do not divide."""
        return self.steps - self.rounds * self.later

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.later < 1:
            raise ValueError(
                f"{self.steps} steps are too few for {self.rounds + 1} trainings, the first of them with {self.rewind} "
                f"steps more; use at least {self.rewind + self.rounds + 1}"
            )
        return self

    def check_shapes(self, shapes: Shapes) -> None:
        """Raise ValueError if not every matrix could have a weight left."""
        total = sum(map(prod, shapes.values()))
        if round(self.density * total) < len(shapes):
            raise ValueError(f"rounds: {self.rounds} leave fewer weights than there are matrices; use fewer")

    def place(self, step: int) -> tuple[int, int, int]:
        """Which training a step is in, which step of it that is, and how many that training has."""
        if step < self.first:
            return 0, step, self.first
        number, within = divmod(step - self.first, self.later)
        return number + 1, self.rewind + within, self.rewind + self.later

    def technique(self) -> Technique:
        """Train, prune, go back."""
        return Rounds(self)


class Rounds(Technique):
    """Train, prune, go back."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Nothing is pruned yet; remember the beginning, if that is where the others begin too."""
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in learner.weights.items()}
        self.early: dict[str, Tensor] = {}
        self.remember(0, learner)

    def schedule(self, step: int) -> tuple[int, int]:
        """That of its training."""
        _, within, length = self.options.place(step)
        return within, length

    def after_step(self, step: int, learner: Learner) -> None:
        """Remember early weights; at the end of a training but the last, prune and go back."""
        number, within, length = self.options.place(step)
        if number == 0:
            self.remember(step + 1, learner)
        if within + 1 < length or number == self.options.rounds:
            return
        size = {name: w.detach().abs().masked_fill(~self.masks[name], -1) for name, w in learner.weights.items()}
        self.masks = best_with_least(size, (1 - self.options.fraction) ** (number + 1), self.options.least)
        if self.options.back == "weights":
            self.go_back(learner)

    def remember(self, steps: int, learner: Learner) -> None:
        """Keep all weights, if they are those to go back to."""
        if self.options.back == "weights" and steps == self.options.rewind:
            self.early = {name: p.detach().clone() for name, p in learning(learner)}

    def go_back(self, learner: Learner) -> None:
        """Early weights for all that learns, and an optimizer that has not seen a gradient; the loop applies masks."""
        with torch.no_grad():
            for name, parameter in learning(learner):
                parameter.copy_(self.early[name])
                for value in learner.optimizer.state[parameter].values():
                    value.zero_()

    def state(self) -> dict[str, Tensor]:
        """Also the early weights."""
        return super().state() | {f"early.{name}": weight for name, weight in self.early.items()}

    def load(self, state: Any, learner: Learner) -> None:
        """Also the early weights."""
        super().load(state, learner)
        place = next(learner.model.parameters()).device
        found = {name.removeprefix("early."): value for name, value in state.items() if name.startswith("early.")}
        self.early = {name: value.to(place) for name, value in found.items()}


def learning(learner: Learner) -> list[tuple[str, Any]]:
    """All parameters that learn, by name, whatever the technique is for."""
    return [(name, p) for name, p in learner.model.named_parameters() if p.requires_grad]
