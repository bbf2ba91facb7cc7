"""SNIP: before training, keep the weights whose removal would change the loss most. Lee et al. 2019, arXiv:1810.02340.

    S_ij = |W_ij dL/dW_ij|          the gradient over some windows, at the weights that training begins with

One ranking over all matrices, so densities differ between them; the mask never moves. At random weights the gradient of
queries and keys is almost nothing, and the ranking would leave these matrices empty, a known weakness of the method; so
every matrix keeps some of its own, the best, whatever their rank; with `least: 0` an empty one is refused.
"""

from typing import ClassVar

from pydantic import Field

from llmcompress.errors import NumericalError
from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.sparsity import RANKING, Sparse, Static, best_with_least
from llmcompress.training.technique import Learner, Technique


class Ranked(Sparse):
    """What techniques have that rank the weights of all matrices together."""

    windows: int = Field(32, ge=1, description="windows of text that the score is taken on")
    least: float = Field(0.1, ge=0, le=1, description="share of `density` that every matrix has at least")

    @property
    def scoring_bytes(self) -> int:
        """Scores, and their places; gradients take less."""
        return RANKING


class Snip(Ranked):
    """Options of `train: snip`."""

    shelf: ClassVar[Shelf] = Shelf(
        "before training", "single weights", WEIGHTS, "the count over all matrices is exact; the mask never moves"
    )

    def technique(self) -> Technique:
        """A mask by this score."""
        return SnipMask(self)


class SnipMask(Static):
    """A mask by this score."""

    def choose(self, learner: Learner) -> dict[str, Tensor]:
        """The highest of all scores; raises NumericalError if a matrix would lose all its weights."""
        return ranked(snip_scores(learner, self.options), self.options)


def snip_scores(learner: Learner, options: Ranked) -> dict[str, Tensor]:
    """|W dL/dW| of every weight, float32."""
    gradients = learner.gradients(drawn(learner, options))
    return {name: (weight.detach() * gradients[name]).abs() for name, weight in learner.weights.items()}


def drawn(learner: Learner, options: Ranked) -> Tensor:
    """Some windows of the training text, [n] int64: `windows` of them, or all that there are."""
    generator = torch.Generator().manual_seed(options.seed)
    return learner.rows[torch.randperm(len(learner.rows), generator=generator)[: options.windows].sort().values]


def ranked(scores: dict[str, Tensor], options: Ranked) -> dict[str, Tensor]:
    """Masks of the highest of all scores, each matrix having its `least`.

    Raises NumericalError if a score is NaN, or a matrix would lose all its weights.
    """
    if bad := [name for name, score in scores.items() if not bool(score.isfinite().all())]:
        raise NumericalError(f"{bad[0]}: a score is NaN or infinite; look at the text, or use `train: random`")
    return best_with_least(scores, options.density, options.least)
