"""Taylor: how the loss would change if a unit's weights were zero, estimated from gradients of the dense model.

Ma et al. 2023, "LLM-Pruner", arXiv:2305.11627, section 3.2. With g the mean gradient of the loss over calibration
windows and F the mean square of the windows' gradients (the diagonal of the empirical Fisher matrix):

    first    sum |w g|              second   sum w² F / 2              mixed    sum |w g - w² F / 2|

summed over all weights that are coupled in the unit. Absolute values are taken weight by weight, before the sum.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmcompress.lazy import Tensor
from llmcompress.stats import GradientMoments
from llmcompress.structure.scores.base import Seen, UnitScore, Walk, summed

if TYPE_CHECKING:
    from llmcompress.structure.groups import Group


class Taylor(UnitScore):
    """Options of `score: taylor`."""

    walk: ClassVar[Walk] = "gradients"
    across_blocks: ClassVar[bool] = True

    order: Literal["first", "second", "mixed"] = Field("first", description="terms of the expansion")
    samples: int = Field(32, ge=1, description="calibration windows whose gradients are taken")

    def windows(self, samples: int) -> int:
        """As many as the option says."""
        return min(self.samples, samples)

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """The estimate for each unit, [units] float32."""
        return summed(group, {name: self.change(w, seen.gradients[name]) for name, w in seen.weights.items()})

    def change(self, weight: Tensor, gradient: GradientMoments) -> Tensor:
        """The estimate for each weight [out, in]."""
        if self.order == "first":
            return (weight * gradient.mean).abs_()
        curved = weight.square() * gradient.square / 2
        return curved if self.order == "second" else (weight * gradient.mean - curved).abs_()
