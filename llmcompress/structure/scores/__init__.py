"""Scores: one file and one row each.

UNIT_SCORES judge units within a block; BLOCK_SCORES judge whole blocks; CHANNEL_SCORES judge channels of the residual
stream, which all blocks share.
"""

from llmcompress.structure.scores.activation import Activation, ChannelActivation
from llmcompress.structure.scores.base import Seen, UnitScore
from llmcompress.structure.scores.block_influence import BlockInfluence
from llmcompress.structure.scores.chance import Random, RandomBlocks, RandomChannels
from llmcompress.structure.scores.channels import ChannelScore, Stream
from llmcompress.structure.scores.depth import BlockScore, Dropped
from llmcompress.structure.scores.fluctuation import Fluctuation
from llmcompress.structure.scores.geometric_median import GeometricMedian
from llmcompress.structure.scores.greedy import Greedy
from llmcompress.structure.scores.magnitude import ChannelMagnitude, Magnitude
from llmcompress.structure.scores.taylor import Taylor
from llmcompress.structure.scores.wanda import Wanda

UNIT_SCORES: dict[str, type[UnitScore]] = {
    "taylor": Taylor,
    "magnitude": Magnitude,
    "random": Random,
    "wanda": Wanda,
    "activation": Activation,
    "fluctuation": Fluctuation,
    "geometric_median": GeometricMedian,
}

BLOCK_SCORES: dict[str, type[BlockScore]] = {
    "greedy": Greedy,
    "block_influence": BlockInfluence,
    "random": RandomBlocks,
}

CHANNEL_SCORES: dict[str, type[ChannelScore]] = {
    "activation": ChannelActivation,
    "magnitude": ChannelMagnitude,
    "random": RandomChannels,
}

__all__ = [
    "BLOCK_SCORES",
    "CHANNEL_SCORES",
    "UNIT_SCORES",
    "BlockScore",
    "ChannelScore",
    "Dropped",
    "Seen",
    "Stream",
    "UnitScore",
]
