"""Knorm: keys of small norm stay.

Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430. The
smaller a key's norm, the more attention its token gets, across models and layers; so with k_i the key of entry i

    score(i) = -||k_i||          the highest stay; the newest `recent` entries whatever their norm

with no query needed. Each KV head decides for itself.
"""

from typing import Any

from torch import Tensor

from llmcompress.eviction.base import EvictingCache, EvictingLayer, highest


class KnormLayer(EvictingLayer):
    """Keeps keys of small norm, and the newest."""

    def __init__(self, budget: int, recent: int) -> None:
        super().__init__(budget)
        self.recent = recent

    def chosen(self, keys: Tensor) -> Tensor:
        """The entries of the smallest keys."""
        return highest(-keys.float().norm(dim=-1), self.budget, self.recent)


class Knorm(EvictingCache):
    """A cache of `budget` tokens in each layer, by the norms of their keys; the newest `recent` always stay."""

    def __init__(self, model: Any, budget: int, recent: int = 16) -> None:
        super().__init__(model, budget, max(1, recent), lambda: KnormLayer(budget, recent))
