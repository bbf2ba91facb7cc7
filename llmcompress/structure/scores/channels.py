"""What every score of the residual stream's channels has in common: one decision for the whole model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from llmcompress.lazy import Tensor
from llmcompress.options import Options


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream of the dense model, to be walked along once."""

    width: int
    slices: Callable[[], Iterator[Tensor]]  # all parameters that have its channels, in pieces [width, n] float32
    inputs: Callable[[], Iterator[Tensor]]  # mean |x| over tokens of what linears read of it, [width] each


class ChannelScore(Options):
    """Base of scores for channels of the residual stream."""

    looks_at_data: ClassVar[bool] = False

    def score(self, stream: Stream) -> Tensor:
        """How much each channel matters, [width] float32 >= 0; higher is better."""
        raise NotImplementedError(f"{type(self).__name__}.score")
