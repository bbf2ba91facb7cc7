"""Random pruning: the baseline that every score has to beat. Which weights go depends on the seed and the weight.

    S_ij ~ U(0, 1)

Drawn anew for every matrix, from the seed and a checksum of its values: the same ones again, on any device.
"""

import zlib
from typing import ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.methods.base import ScoreMethod
from llmcompress.shelf import HALVES, Shelf


class Random(ScoreMethod):
    """Options of `method: random`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "single weights, or two of four",
        HALVES,
        "exact counts of each pattern; masks survive every later step",
    )

    seed: int = Field(0, ge=0, lt=2**32)

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """Uniform numbers; different for every weight [out, in], the same for the same one on any device."""
        content = zlib.crc32(weight.cpu().contiguous().numpy().data, self.seed)
        generator = torch.Generator().manual_seed(content)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
