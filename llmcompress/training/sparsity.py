"""How many weights of each matrix stay, and masks that keep exactly so many.

A density for all matrices together is spread over them evenly or by Erdős-Rényi-Kernel (`budget.py`); shares are
rounded by largest remainder, so that the total is right to the weight. Masks are permutations with a count, not coin
tosses with a probability.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

from pydantic import Field

from llmcompress.budget import erk_densities
from llmcompress.errors import NumericalError
from llmcompress.lazy import Tensor, torch
from llmcompress.mask import first_of
from llmcompress.training.step import Learn
from llmcompress.training.technique import Learner, Technique

RANKING = 26  # bytes per weight: its score, as it is, raised, joined with all others and sorted; its place; masks
Shapes = Mapping[str, tuple[int, int]]  # name -> [out, in]


class Sparse(Learn):
    """What all techniques have that end with a share of zeros."""

    density: float = Field(gt=0, lt=1, description="share of the weights of all decoder linears that stays")

    @property
    def leaves(self) -> tuple[str, float] | None:
        """Zeros anywhere in a matrix."""
        return "layer", 1 - self.density

    def check_shapes(self, shapes: Shapes) -> None:
        """Raise ValueError if some matrix would have to go as a whole."""
        total, fewest = kept_in_all(shapes, self.density), len(shapes)
        if total < fewest:
            raise ValueError(
                f"a density of {self.density:g} leaves {total} weights to {fewest} matrices, and each needs one; "
                f"use at least {fewest / sum(map(prod, shapes.values())):.2g}"
            )


class Spread(Sparse):
    """What techniques have that give every matrix a density of its own before training."""

    spread: Literal["erk", "uniform"] = Field(
        "erk", description="densities: erk, more where a matrix is small; uniform, the same everywhere"
    )

    def check_shapes(self, shapes: Shapes) -> None:
        """Also if the spread leaves some matrix without a weight."""
        super().check_shapes(shapes)
        check_spread(shapes, self.density, self.spread)


def check_spread(shapes: Shapes, density: float, spread: str) -> None:
    """Raise ValueError if a spread leaves some matrix without a weight."""
    if empty := [name for name, count in spread_counts(shapes, density, spread).items() if count == 0]:
        raise ValueError(f"a density of {density:g} leaves no weight of {empty[0]}; use a larger one")


def kept_in_all(shapes: Shapes, density: float) -> int:
    """How many weights stay in all matrices together."""
    return round(density * sum(map(prod, shapes.values())))


def spread_counts(shapes: Shapes, density: float, spread: str) -> dict[str, int]:
    """How many weights of each matrix stay; they add up to `kept_in_all`."""
    shares = erk_densities(shapes, 1 - density) if spread == "erk" else dict.fromkeys(shapes, density)
    exact = {name: shares[name] * prod(shape) for name, shape in shapes.items()}
    counts = {name: min(int(share), prod(shapes[name])) for name, share in exact.items()}
    left = kept_in_all(shapes, density) - sum(counts.values())
    open_ = [name for name in shapes if counts[name] < prod(shapes[name])]
    by_remainder = sorted(open_, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[:left]:
        counts[name] += 1
    return counts


def best(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` highest scores of a tensor of any shape; of equal ones the first."""
    return first_of(score.reshape(1, -1), count).reshape(score.shape)


def best_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the `count` highest scores of all tensors together; of equal ones the first."""
    joined = best(torch.cat([score.flatten() for score in scores.values()]), count)
    parts = joined.split([score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def best_with_least(scores: Mapping[str, Tensor], density: float, least: float) -> dict[str, Tensor]:
    """Masks of the best scores of all matrices [out, in] together, a share `density` of them, of which each matrix has
    its own best, whatever their rank, up to a share `least` of `density`.

    Raises NumericalError if a matrix would lose all its weights: nothing that passes through it could be learned.
    """
    shapes = {name: (score.shape[0], score.shape[1]) for name, score in scores.items()}
    sure = {name: best(score, int(least * density * score.numel())) for name, score in scores.items()}
    above = {name: score.masked_fill(sure[name], torch.inf) for name, score in scores.items()}
    masks = best_of_all(above, kept_in_all(shapes, density))
    if empty := [name for name, mask in masks.items() if not bool(mask.any())]:
        count = prod(shapes[empty[0]])
        raise NumericalError(
            f"{empty[0]}: none of its {count:,} scores is among the best {density:.2%} of all; use a larger `least`, "
            "or `train: random`, which gives every matrix its share"
        )
    return masks


def random_masks(learner: Learner, counts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Masks with these counts at random places, the same ones for the same seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: best(torch.rand(weight.shape, generator=generator), counts[name]).to(weight.device)
        for name, weight in learner.weights.items()
    }


class Static(Technique):
    """A mask that is chosen before training and never moves."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Choose it; where a training continues it is in the state."""
        if not learner.continues:
            self.masks = self.choose(learner)

    def choose(self, learner: Learner) -> dict[str, Tensor]:
        """Masks of all weights, from those that training begins with."""
        raise NotImplementedError
