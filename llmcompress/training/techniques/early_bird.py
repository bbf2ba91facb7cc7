"""Early-Bird tickets: which units are small is settled early in training, and then the others go. You et al. 2020,
arXiv:1909.11957; for language models Chen et al. 2021, arXiv:2101.00063.

    d_t = share of units on which the masks of draws t and t - 1 differ          drawn every `every` steps

A draw keeps the units of each block with the largest norms. Once d is below `distance` for as many draws in a row as
`window` has, the last draw is the ticket: its units learn on alone, and the others are zero. The paper ranks batch
norms' scales, which language models lack; here a unit counts with the norm of all its weights. If masks never settle,
the last draw at `until` is taken, and the record says that no ticket was found. `distance` is 0.1 in the paper, for
images, and 0.01 in a study on text, arXiv:2405.02353.
"""

from typing import Any, ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import UNITS, Shelf
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import Fewer, UnitTechnique, lowest


class EarlyBird(Fewer):
    """Options of `train: early_bird`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "MLP channels, KV groups, heads",
        UNITS,
        "draws come nearer to each other; the ticket is drawn after the same step for the same seed; the smaller model "
        "computes the same",
    )

    every: int = Field(10, ge=1, description="steps between draws")
    window: int = Field(5, ge=1, description="draws in a row that must agree")
    distance: float = Field(0.01, gt=0, le=1, description="share of units on which draws that agree may differ")

    def technique(self) -> Technique:
        """Draw until draws agree."""
        return Draws(self)


class Draws(UnitTechnique):
    """Draw until draws agree."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """No draw yet."""
        super().prepare(learner)
        self.last: dict[str, Tensor] = {}
        self.distances: list[float] = []
        self.ticket = -1  # step after which the units went, -1 before
        self.settled = False

    def after_step(self, step: int, learner: Learner) -> None:
        """Draw if it is time; when the draws agree, or time is up, let the others go."""
        if self.ticket >= 0 or not self.options.turn(step, self.options.every):
            return
        draw = {u.name: lowest(u.norms(), round(self.options.ratio * u.count)) for u in self.units}
        if self.last:
            self.distances.append(difference(draw, self.last))
        self.last = draw
        latest = self.distances[-self.options.window :]
        self.settled = len(latest) == self.options.window and max(latest) < self.options.distance
        if self.settled or step == self.options.end:
            self.ticket = step
            for units in self.units:
                units.mask(self.masks, draw[units.name])

    def state(self) -> dict[str, Tensor]:
        """Masks, the last draw, and how far draws were apart."""
        found = {f"draw.{name}": draw for name, draw in self.last.items()}
        found |= {"distances": torch.tensor(self.distances, dtype=torch.float64)}
        return super().state() | found | {"ticket": torch.tensor([self.ticket, int(self.settled)])}

    def load(self, state: Any, learner: Learner) -> None:
        """Masks, the last draw, and how far draws were apart."""
        super().load(state, learner)
        place = next(learner.model.parameters()).device
        self.last = {name[5:]: draw.to(place) for name, draw in state.items() if name.startswith("draw.")}
        self.distances = state["distances"].tolist()
        self.ticket, self.settled = int(state["ticket"][0]), bool(state["ticket"][1])

    def record(self) -> dict[str, Any]:
        """When the ticket was drawn, and how far draws were apart before."""
        found = {"ticket": self.ticket, "settled": self.settled, "distances": self.distances}
        return super().record() | {"early_bird": found}


def difference(draw: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Share of units that are in one draw and not in the other; Hamming distance over all blocks."""
    differ = sum(int((draw[name] != other[name]).sum()) for name in draw)
    return differ / sum(mask.numel() for mask in draw.values())
