"""Growing regularization: units to go are chosen first, then pulled to zero ever harder, and only then removed. GReg-1,
Wang et al. 2021, arXiv:2012.09243.

    λ_t = ceiling · k / K        at the k-th of K times that it grows, every `every` steps
    W_G <- exp(-η λ_t) W_G       for the units that were chosen; all others learn as ever

Chosen are, in every block, the units with the smallest sum of |w|. Pulled slowly, the model has time to give their work
to others, so that removing them at the end changes little. The paper adds λ/2 ||W_G||² to the loss; under Adam, which
divides a gradient by its size, that would not grow, so the pull is taken apart from the gradient as AdamW's decay is
(Loshchilov and Hutter 2019). Adam moves a weight by up to η, so what it holds against the pull is about 1 / λ. η: the
learning rate of the step. For a model that has been trained already.
"""

from collections.abc import Mapping
from math import exp
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import UNITS, Shelf
from llmcompress.training.schedule import ramp
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import Fewer, UnitTechnique, lowest


class GrowingL2(Fewer):
    """Options of `train: growing_l2`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "MLP channels, KV groups, heads",
        UNITS,
        "every block loses the same share; the smaller model computes the same",
    )

    ceiling: float = Field(1000.0, gt=0, description="λ at the end; a weight is multiplied by exp(-η λ) at each step")
    every: int = Field(5, ge=1, description="steps between two λ")

    @property
    def times(self) -> int:
        """How often λ grows."""
        return (self.end - self.first) // self.every

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.times < 1:
            raise ValueError(
                f"λ would never grow: from step {self.first} to step {self.end} of {self.steps} there are fewer than "
                f"{self.every} steps; use a smaller `every`, or other shares `begin` and `until`"
            )
        return self

    def strength(self, step: int) -> float:
        """λ after a step."""
        return self.ceiling * ramp(((step - self.first) // self.every + 1) / self.times)

    def technique(self) -> Technique:
        """Some units are pulled to zero, and then go."""
        return Growing(self)


class Growing(UnitTechnique):
    """Some units are pulled to zero, and then go."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Choose them."""
        super().prepare(learner)
        ratio = self.options.ratio
        self.stay = {each.name: lowest(each.sums(torch.abs), round(ratio * each.count)) for each in self.units}

    def after_step(self, step: int, learner: Learner) -> None:
        """Pull; at the end, remove."""
        if not self.options.active(step):
            return
        factor = exp(-learner.rate * self.options.strength(step))
        for units in self.units:
            stay = self.stay[units.name]
            units.scale(stay.float().masked_fill(~stay, factor))
            if step == self.options.end:
                units.mask(self.masks, stay)

    def state(self) -> dict[str, Tensor]:
        """Also who was chosen."""
        return super().state() | {f"stay.{name}": stay for name, stay in self.stay.items()}

    def load(self, state: Mapping[str, Tensor], learner: Learner) -> None:
        """Also who was chosen."""
        super().load(state, learner)
        device = next(learner.model.parameters()).device
        self.stay = {name: state[f"stay.{name}"].to(device) for name in self.stay}
