"""A mask from elsewhere: where another model of the same shape has zeros, this one keeps them while it learns.

    M_ij = 1 where W'_ij is not 0, else 0        W <- M ⊙ W at the start and after every optimizer step

W' are the weights of the decoder linears of the model that `mask` names, of which nothing is taken but its zeros. With
`start: random` it tells what a mask is worth without the weights that it was found with (Frankle and Carbin 2019,
arXiv:1803.03635, section 2; Liu et al. 2019, arXiv:1810.05270).
"""

from typing import Any, ClassVar

from pydantic import Field

from llmcompress.errors import PlanError
from llmcompress.lazy import Tensor
from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.sparsity import Static
from llmcompress.training.step import Learn
from llmcompress.training.technique import Learner, Technique


class Masked(Learn):
    """Options of `train: masked`."""

    shelf: ClassVar[Shelf] = Shelf(
        "before training", "single weights", WEIGHTS, "zeros are those of the other model, and stay"
    )

    mask: str = Field(description="model whose zeros are the mask: a folder, a listed name or a Hub id")

    @property
    def leaves(self) -> tuple[str, float] | None:
        """How many zeros there are is not known before the weights are read."""
        return "layer", 0.0

    @property
    def mask_source(self) -> str | None:
        """As `mask` says."""
        return self.mask

    def technique(self) -> Technique:
        """The mask that was given."""
        return Given(self)


class Given(Static):
    """The mask that was given."""

    options: Any

    def choose(self, learner: Learner) -> dict[str, Tensor]:
        """Where the other model is not zero. Raises PlanError if it is zero nowhere, or in all of a matrix."""
        masks = {name: learner.given[name].to(weight.device) for name, weight in learner.weights.items()}
        if all(bool(mask.all()) for mask in masks.values()):
            raise PlanError(f"mask: {self.options.mask} has no zeros to keep; name a model that was pruned")
        if empty := [name for name, mask in masks.items() if not bool(mask.any())]:
            raise PlanError(f"mask: {empty[0]} is all zeros in {self.options.mask}, so that nothing could learn there")
        return masks
