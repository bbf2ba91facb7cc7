"""Random pruning: the baseline that every score has to beat. Which weights go depends on the seed and the weight."""

import zlib

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.methods.base import ScoreMethod


class Random(ScoreMethod):
    """Options of `method: random`."""

    seed: int = Field(0, ge=0, lt=2**32)

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """Uniform numbers; different for every weight [out, in], the same for the same one on any device."""
        content = zlib.crc32(weight.cpu().contiguous().numpy().data, self.seed)
        generator = torch.Generator().manual_seed(content)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
