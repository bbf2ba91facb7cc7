"""SNIP: before training, keep the weights whose removal would change the loss most. Lee et al. 2019, arXiv:1810.02340.

    S_ij = |W_ij dL/dW_ij|          the gradient over some windows, at the weights that training begins with

One ranking over all matrices, so densities differ between them; the mask never moves. At high sparsities the ranking
may leave some matrix without a weight, which is a known weakness of the method: such a mask is refused.
"""

from math import prod
from typing import ClassVar

from pydantic import Field

from llmcompress.errors import NumericalError
from llmcompress.lazy import Tensor, torch
from llmcompress.training.sparsity import RANKING, Sparse, Static, best_of_all, kept_in_all
from llmcompress.training.technique import Learner, Technique

WINDOWS = 32


class Snip(Sparse):
    """Options of `train: snip`."""

    scoring_bytes: ClassVar[int] = RANKING

    windows: int = Field(WINDOWS, ge=1, description="windows of text that the score is taken on")

    def technique(self) -> Technique:
        """A mask by this score."""
        return SnipMask(self)


class SnipMask(Static):
    """A mask by this score."""

    def choose(self, learner: Learner) -> dict[str, Tensor]:
        """The highest of all scores; raises NumericalError if a matrix would lose all its weights."""
        return ranked(snip_scores(learner, self.options.windows, self.options.seed), self.options.density)


def snip_scores(learner: Learner, windows: int, seed: int) -> dict[str, Tensor]:
    """|W dL/dW| of every weight, float32."""
    gradients = learner.gradients(drawn(learner, windows, seed))
    return {name: (weight.detach() * gradients[name]).abs() for name, weight in learner.weights.items()}


def drawn(learner: Learner, windows: int, seed: int) -> Tensor:
    """Some windows of the training text, [n] int64: `windows` of them, or all that there are."""
    generator = torch.Generator().manual_seed(seed)
    return learner.rows[torch.randperm(len(learner.rows), generator=generator)[:windows].sort().values]


def ranked(scores: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Masks of the highest of all scores; raises NumericalError if one is NaN, or a matrix would lose all weights."""
    if bad := [name for name, score in scores.items() if not bool(score.isfinite().all())]:
        raise NumericalError(f"{bad[0]}: a score is NaN or infinite; look at the text, or use `train: random`")
    shapes = {name: (score.shape[0], score.shape[1]) for name, score in scores.items()}
    masks = best_of_all(scores, kept_in_all(shapes, density))
    if empty := [name for name, mask in masks.items() if not bool(mask.any())]:
        raise NumericalError(
            f"{empty[0]}: none of its {prod(shapes[empty[0]]):,} scores is among the best {density:.2%} of all, so the "
            "model would fall apart; raise `density`, or use `train: random`, which gives every matrix its share"
        )
    return masks
