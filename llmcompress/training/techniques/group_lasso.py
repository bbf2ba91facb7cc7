"""Group lasso: units that the loss does not need shrink to nothing while the model learns. Structured sparsity
learning (SSL), Wen et al. 2016, arXiv:1608.03665.

    minimize  L(W) + λ Σ_G sqrt(|G|) ||W_G||

G: everything that goes with a unit; |G| its numbers, so that large units are judged by the size of their weights. The
paper follows a subgradient, under which a group comes near zero and never gets there. Here every optimizer step is
followed by the proximal step of the penalty, with the step's learning rate η,

    W_G <- max(0, 1 - η λ sqrt(|G|) / ||W_G||) W_G

which gives exact zeros: η λ is taken from the root mean square of a group. AdamW moves every weight by up to η
whatever the size of its gradient, so λ compares with 1: below it a unit stays if its gradients agree from step to step.
Units within a sub-layer are shrunk before the sub-layer, as the proximal step of nested groups demands (Jenatton et al.
2011). A unit that is zero gets no gradient from its partners, which are zero too, and stays so.
"""

from math import sqrt
from typing import Any, ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import UNITS, Shelf
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import UnitLearn, Units, UnitTechnique


class GroupLasso(UnitLearn):
    """Options of `train: group_lasso`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training",
        "MLP channels, KV groups, heads, whole attentions or MLPs",
        UNITS,
        "zeros are exact, more of them with more strength; the smaller model computes the same",
    )

    kinds: ClassVar[tuple[str, ...]] = ("mlp_channel", "kv_group", "query_head", "attention", "mlp")

    strength: float = Field(0.02, gt=0, description="λ: how hard units are pulled to zero; more of them go with more")

    def technique(self) -> Technique:
        """Units shrink, and those at zero stay there."""
        return Shrinking(self)


class Shrinking(UnitTechnique):
    """Units shrink, and those at zero stay there."""

    options: Any

    def after_step(self, step: int, learner: Learner) -> None:
        """The proximal step."""
        if self.options.active(step):
            for units in self.units:
                self.shrink(units, learner.rate * self.options.strength)

    def shrink(self, units: Units, reach: float) -> None:
        """Take `reach` off the root mean square of every unit; nothing goes below zero."""
        norms = units.norms()
        factors = shrinkage(norms, reach * sqrt(units.size))
        units.scale(factors)
        if bool(((factors == 0) & (norms > 0)).any()):
            units.mask(self.masks, factors > 0)


def shrinkage(norms: Tensor, reach: float) -> Tensor:
    """max(0, 1 - reach / norm) of norms [units], 0 where they are; the proximal step of reach ||.||."""
    tiny = torch.finfo(norms.dtype).tiny
    return (1 - reach / norms.clamp(min=tiny)).clamp(min=0)
