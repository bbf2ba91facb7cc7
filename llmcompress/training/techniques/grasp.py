"""GraSP: before training, keep the weights whose removal would weaken the gradient most. Wang et al. 2020,
arXiv:2002.07376.

    S = - W ⊙ (H g)          g: gradient of the loss, H: its Hessian, at the weights that training begins with

Removing a weight changes |g|² by 2 S to first order, so the highest scores go: with them the gradient grows, or shrinks
least. H g is taken as a central difference of gradients along g,

    H g ≈ (g(W + e g) - g(W - e g)) / 2 e          |e g| = STEP |W|

which needs no second derivative of attention kernels, that have none. One ranking over all matrices, as the paper's;
but every matrix keeps some of its own, the best, whatever their rank (`least`, by default a tenth of an even share), as
in `snip.py`: at random weights the gradient hardly reaches queries and keys. With `least: 0` the ranking alone
decides, and a matrix that it leaves empty is refused.

SynFlow (Tanaka et al. 2020), which needs no data, is not here. That is a choice by its equation and not by a
measurement: its flow passes softmax and norms of a transformer only if something else stands for them.
"""

from typing import ClassVar

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.sparsity import Static
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.techniques.snip import Ranked, drawn, ranked

STEP = 1e-2  # of the difference, relative to the weights; in float32 a smaller one is mostly rounding


class Grasp(Ranked):
    """Options of `train: grasp`."""

    shelf: ClassVar[Shelf] = Shelf(
        "before training", "single weights", WEIGHTS, "the count over all matrices is exact; the mask never moves"
    )

    def technique(self) -> Technique:
        """A mask by this score."""
        return GraspMask(self)


class GraspMask(Static):
    """A mask by this score."""

    def choose(self, learner: Learner) -> dict[str, Tensor]:
        """The lowest of all scores stay."""
        scores = grasp_scores(learner, drawn(learner, self.options))
        return ranked({name: -score for name, score in scores.items()}, self.options)


def grasp_scores(learner: Learner, rows: Tensor) -> dict[str, Tensor]:
    """- W ⊙ (H g) of every weight, on some windows [n] int64; the weights are the same afterwards, to the bit."""
    before = {name: weight.detach().clone() for name, weight in learner.weights.items()}
    along = learner.gradients(rows)
    lengths = [torch.stack([t.norm() for t in tensors.values()]).norm() for tensors in (before, along)]
    size = STEP * float(lengths[0] / lengths[1].clamp(min=torch.finfo(torch.float32).tiny))
    ends = []
    for sign in (1, -1):
        place(learner, {name: before[name] + sign * size * along[name] for name in before})
        ends.append(learner.gradients(rows))
    place(learner, before)
    return {name: -before[name] * (ends[0][name] - ends[1][name]) / (2 * size) for name in before}


def place(learner: Learner, values: dict[str, Tensor]) -> None:
    """Give the weights these values."""
    with torch.no_grad():
        for name, weight in learner.weights.items():
            weight.copy_(values[name])
