"""Streaming: the first tokens and the newest stay.

Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453. A softmax must put its
weight somewhere, and models learn to put what they do not need on the first tokens: without these sinks, generation
breaks down once they leave a sliding window. Of n entries, with a budget of B,

    {1 .. sinks}  and  {n - (B - sinks) + 1 .. n}          stay

Here positions stay those of the text; the paper numbers entries by their place in the cache, which lets a text go on
beyond the positions that a model knows. This does not.
"""

from typing import Any

import torch
from torch import Tensor

from llmcompress.eviction.base import EvictingCache, EvictingLayer


class StreamingLayer(EvictingLayer):
    """Keeps the first `sinks` tokens and the newest."""

    def __init__(self, budget: int, sinks: int) -> None:
        super().__init__(budget)
        self.sinks = sinks

    def chosen(self, keys: Tensor) -> Tensor:
        """Both ends."""
        batch, heads, entries, _ = keys.shape
        places = torch.arange(entries, device=keys.device)
        ends = torch.cat([places[: self.sinks], places[entries - (self.budget - self.sinks) :]])
        return ends.expand(batch, heads, -1)


class Streaming(EvictingCache):
    """A cache of the first `sinks` tokens and the newest `budget - sinks`, in each layer."""

    def __init__(self, model: Any, budget: int, sinks: int = 4) -> None:
        super().__init__(model, budget, sinks + 1, lambda: StreamingLayer(budget, sinks))
