"""Gradual magnitude pruning: the smallest weights go, few at a time, while the others learn on. Zhu and Gupta 2017,
arXiv:1710.01878.

    s_t = s_f (1 - (1 - (t - t_0) / (n every))³)          t = t_0, t_0 + every, ..., t_0 + n every

s_f = 1 - density is the share of zeros at the end. Many go at first, when there are many to spare. What has gone is
zero, the smallest there is, so it stays away.
"""

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.schedule import ramp
from llmcompress.training.sparsity import Spread, best, spread_counts
from llmcompress.training.technique import Learner, Technique


class Gradual(Spread):
    """Options of `train: gradual`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training",
        "single weights",
        WEIGHTS,
        "density follows the cubic schedule to the weight; what went stays away",
    )

    begin: float = Field(0.1, ge=0, lt=1, description="share of the steps after which weights begin to go")
    until: float = Field(0.75, gt=0, le=1, description="share of the steps after which none goes any more")
    every: int = Field(20, ge=1, description="steps between prunings")

    @property
    def first(self) -> int:
        """The step after which weights begin to go."""
        return int(self.begin * self.steps)

    @property
    def prunings(self) -> int:
        """How many follow that one."""
        return (min(int(self.until * self.steps), self.steps - 1) - self.first) // self.every

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.prunings < 1:
            raise ValueError(
                f"pruning would end before it starts: from step {self.first} to step {int(self.until * self.steps)} of "
                f"{self.steps} there is no second pruning after {self.every} steps; use fewer between them, or other "
                "shares `begin` and `until`"
            )
        return self

    def technique(self) -> Technique:
        """Fewer and fewer weights."""
        return GradualPruning(self)


class GradualPruning(Technique):
    """Fewer and fewer weights."""

    options: Any

    def after_step(self, step: int, learner: Learner) -> None:
        """Prune if it is time."""
        number, rest = divmod(step - self.options.first, self.options.every)
        if rest or not 0 <= number <= self.options.prunings:
            return
        counts = spread_counts(learner.shapes, self.density(number), self.options.spread)
        self.masks = {name: best(w.detach().abs(), counts[name]) for name, w in learner.weights.items()}

    def density(self, number: int) -> float:
        """Share of the weights that stays after pruning `number`, from 0."""
        density: float = self.options.density
        return density + (1 - density) * (1 - ramp(number / self.options.prunings, power=3))
