"""What every score of whole blocks has in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmcompress.lazy import Tensor
from llmcompress.options import Options

if TYPE_CHECKING:
    from llmcompress.stream import StreamedModel

Told = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True, slots=True)
class Dropped:
    """Which blocks go, and why."""

    blocks: list[int]  # in order
    scores: dict[int, float]  # of every block that could have gone, as seen when it was last judged


class BlockScore(Options):
    """Base of scores for whole decoder blocks."""

    looks_at_data: ClassVar[bool] = True
    looks_at_losses: ClassVar[bool] = False  # and so needs logits

    def effort(self, count: int, drop: int, samples: int) -> tuple[float, float]:
        """Windows whose hidden states are held at once, and walks of a window through all blocks: for predictions."""
        return float(samples), float(samples)

    def choose(self, model: "StreamedModel", tokens: Tensor, count: int, allowed: set[int], tell: Told) -> Dropped:
        """The `count` blocks of `allowed` that matter least to the model; tokens: [samples, length] int64."""
        raise NotImplementedError(f"{type(self).__name__}.choose")


def lowest(scores: dict[int, float], count: int) -> Dropped:
    """Those with the `count` lowest scores, of equal ones the later."""
    return Dropped(sorted(sorted(scores, key=lambda block: (scores[block], -block))[:count]), scores)
