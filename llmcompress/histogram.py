"""How large the inputs of a linear are: a histogram over all sizes that bfloat16 has.

The bits of a positive float, read as an integer, rise with its value. So the upper 16 bits of |x| as float32, which are
|x| as bfloat16 cut off, number bins that are at most 1/128 of their value wide, from the smallest number to the largest
without a range to choose first. Counts are integers and add up exactly over batches.
"""

from typing import Self

import torch
from torch import Tensor

from llmcompress.errors import CalibrationError
from llmcompress.stats import NO_TOKENS

INFINITY = 0x7F80  # upper bits of the float32 infinity; above it are NaNs


class InputHistogram:
    """Counts of |x| over all tokens and features of one linear's inputs."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(INFINITY, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        """Add activations x of any shape. Raises CalibrationError if one is NaN or infinite."""
        bins = (x.detach().float().abs().flatten().contiguous().view(torch.int32) >> 16).clamp_(max=INFINITY)
        counts = torch.bincount(bins, minlength=INFINITY + 1)
        if int(counts[INFINITY]):
            raise CalibrationError("an activation is NaN or infinite; try `dtype: bfloat16` or `float32`")
        self.counts += counts[:INFINITY]

    def merge(self, other: Self) -> None:
        """Add what another process or shard saw."""
        self.counts += other.counts

    def threshold(self, sparsity: float) -> float:
        """The t for which the share of |x| <= t is closest to `sparsity`; a number that bfloat16 has."""
        below = self._below()
        place = int(torch.searchsorted(below, sparsity))
        if place > 0 and abs(float(below[place - 1]) - sparsity) < abs(float(below[place]) - sparsity):
            place -= 1
        return float(value_of(place))

    def share(self, threshold: float) -> float:
        """The share of |x| <= threshold; exact for inputs in bfloat16."""
        place = int(torch.tensor(threshold, dtype=torch.float32).view(torch.int32) >> 16)
        return float(self._below()[place])

    def _below(self) -> Tensor:
        """Share of inputs in a bin or below it, float64 [bins]."""
        total = int(self.counts.sum())
        if total == 0:
            raise CalibrationError(NO_TOKENS)
        return self.counts.cumsum(0).double() / total


def value_of(place: int) -> Tensor:
    """The smallest number of a bin."""
    return torch.tensor(place << 16, dtype=torch.int32).view(torch.float32)
