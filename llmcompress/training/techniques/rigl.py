"""RigL: a sparse model that trades weights while it learns. Evci et al. 2020, arXiv:1911.11134.

Every `every` steps until `until`, each matrix gives up its n smallest weights and takes as many where the gradient of
the dense matrix is largest, so that its count never changes:

    n = f(t) nnz          f(t) = drop / 2 (1 + cos(pi t / T))

Weights that are new begin at zero, with no moments in Adam; one that is given up and taken in the same update stays as
it was. The optimizer takes no step when masks move, as in the paper's algorithm 1. Dense gradients are there at every
step anyway, as products with masks are dense ones on common hardware.
"""

from math import cos, pi
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.sparsity import Spread, best, random_masks, spread_counts
from llmcompress.training.technique import Learner, Technique


class Moving(Spread):
    """What techniques have whose masks move."""

    drop: float = Field(0.3, gt=0, lt=1, description="share of a matrix's weights that the first update trades")
    every: int = Field(100, ge=1, description="steps between updates of the masks")
    until: float = Field(0.75, gt=0, le=1, description="share of the steps after which masks stay")

    @property
    def end(self) -> int:
        """The step from which on masks stay."""
        return int(self.until * self.steps)

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.end <= self.every:
            raise ValueError(
                f"masks would never move: the first update is at step {self.every}, and from step {self.end} of "
                f"{self.steps} on they stay; use fewer steps between updates"
            )
        return self


class RigL(Moving):
    """Options of `train: rigl`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training",
        "single weights",
        WEIGHTS,
        "counts of every matrix stay while masks move, and masks stay from a step on; what is new has no moments",
    )

    def technique(self) -> Technique:
        """Weights come where the gradient is largest."""
        return GradientGrowth(self)


class Trade(Technique):
    """Masks whose matrices trade their smallest weights for others."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Random masks to begin with."""
        counts = spread_counts(learner.shapes, self.options.density, self.options.spread)
        self.masks = random_masks(learner, counts, self.options.seed)

    def before_step(self, step: int, learner: Learner) -> bool:
        """Move the masks if it is time; the optimizer then takes no step."""
        if not 0 < step < self.options.end or step % self.options.every:
            return True
        share = self.options.drop / 2 * (1 + cos(pi * step / self.options.end))
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        for name, weight in learner.weights.items():
            mask = self.masks[name]
            count = int(mask.sum())
            moved = min(int(share * count), mask.numel() - count)
            size = weight.detach().abs().masked_fill(~mask, -torch.inf)
            stay = best(size, count - moved)
            wish = self.wish(weight, generator).masked_fill(stay, -torch.inf)
            self.masks[name] = stay | best(wish, moved)
        return False

    def wish(self, weight: Tensor, generator: "torch.Generator") -> Tensor:
        """How much each place of a matrix is worth having, of its shape."""
        raise NotImplementedError


class GradientGrowth(Trade):
    """Weights come where the gradient is largest."""

    def wish(self, weight: Tensor, generator: "torch.Generator") -> Tensor:
        """|dL/dW|."""
        assert weight.grad is not None
        return weight.grad.abs()
