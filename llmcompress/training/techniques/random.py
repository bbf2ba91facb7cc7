"""Random pruning before training: no weight is looked at, only how many each matrix keeps. Liu et al. 2022, ICLR,
"The Unreasonable Effectiveness of Random Pruning", arXiv:2202.02643.

    erk      density of a matrix [out, in] proportional to (in + out) / (in out), at most 1; Evci et al. 2020
    uniform  the same density everywhere
    snip     as many as SNIP's ranking of all weights would keep of it, at random places

The mask is drawn once with `seed` and never moves.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.lazy import Tensor
from llmcompress.shelf import WEIGHTS, Shelf
from llmcompress.training.sparsity import Shapes, Static, check_spread, random_masks, spread_counts
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.techniques.snip import Ranked, ranked, snip_scores


class Random(Ranked):
    """Options of `train: random`; `windows` and `least` are for the spread `snip`."""

    shelf: ClassVar[Shelf] = Shelf(
        "before training",
        "single weights",
        WEIGHTS,
        "counts are exact, for Erdős-Rényi-Kernel to one weight; the mask never moves",
    )

    spread: Literal["erk", "uniform", "snip"] = Field(
        "erk", description="densities: erk, more where a matrix is small; uniform, the same; snip, by its ranking"
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        unused = sorted({"windows", "least"} & self.model_fields_set)
        if self.spread != "snip" and unused:
            raise ValueError(
                f"{unused[0]}: is for the ranking of `spread: snip`, and {self.spread} takes none; leave it out"
            )
        return self

    @property
    def scoring_bytes(self) -> int:
        """None without scores."""
        return super().scoring_bytes if self.spread == "snip" else 0

    def check_shapes(self, shapes: Shapes) -> None:
        """What is known before the scores are."""
        super().check_shapes(shapes)
        if self.spread != "snip":
            check_spread(shapes, self.density, self.spread)

    def technique(self) -> Technique:
        """A mask at random places."""
        return RandomMask(self)


class RandomMask(Static):
    """A mask at random places."""

    def choose(self, learner: Learner) -> dict[str, Tensor]:
        """Every matrix keeps what its density says."""
        options = self.options
        if options.spread == "snip":
            masks = ranked(snip_scores(learner, options), options)
            counts = {name: int(mask.sum()) for name, mask in masks.items()}
        else:
            counts = spread_counts(learner.shapes, options.density, options.spread)
        return random_masks(learner, counts, options.seed)
