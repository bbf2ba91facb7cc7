"""Random: the baseline that a score must beat. Drawn anew for every block from a seed; also for whole blocks.

    score(u) = π(u) + ε          π: a random permutation of 0 .. n - 1          ε ~ U(0, 1)

n is the number of units. ε is the same for all of them, so that where a block has one unit, blocks differ too.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.structure.scores.base import Seen, UnitScore
from llmcompress.structure.scores.channels import ChannelScore, Stream
from llmcompress.structure.scores.depth import BlockScore, Dropped, Told, lowest

if TYPE_CHECKING:
    from llmcompress.stream import StreamedModel
    from llmcompress.structure.groups import Group


class Random(UnitScore):
    """Options of `score: random`."""

    across_blocks: ClassVar[bool] = True
    per_parameter: ClassVar[bool] = False  # else large units would go before small ones, which is no chance

    seed: int = Field(0, ge=0, description="of the draw")

    def score(self, group: "Group", seen: Seen) -> Tensor:
        """A permutation of the units as scores, [units]."""
        return draw(group.units, self.seed, seen.block)


class RandomBlocks(BlockScore):
    """Options of `score: random` for blocks."""

    looks_at_data: ClassVar[bool] = False

    seed: int = Field(0, ge=0, description="of the draw")

    def effort(self, count: int, drop: int, samples: int) -> tuple[float, float]:
        """None: nothing is looked at."""
        return 0.0, 0.0

    def choose(self, model: "StreamedModel", tokens: Tensor, count: int, allowed: set[int], tell: Told) -> Dropped:
        """The first of a random order."""
        blocks = sorted(allowed)
        order = draw(len(blocks), self.seed, 0)
        scores = {block: float(place) for block, place in zip(blocks, order, strict=True)}
        return lowest(scores, count)


class RandomChannels(ChannelScore):
    """Options of `score: random` for the hidden dimension."""

    seed: int = Field(0, ge=0, description="of the draw")

    def score(self, stream: Stream) -> Tensor:
        """A permutation of the channels as scores, [width]."""
        return draw(stream.width, self.seed, 0)


def draw(count: int, seed: int, block: int) -> Tensor:
    """0 .. count - 1 in random order, all plus a fraction by which single units differ too, [count] float32."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + block)
    return torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)
