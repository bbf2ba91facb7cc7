"""KV caches that stay within a budget: keys and values of the tokens that matter least are dropped.

    from llmcompress.eviction import EVICTIONS, Knorm
    model.generate(**inputs, past_key_values=Knorm(model, budget=1024))

A policy is a file. What they share is in `base.py`: positions, masks, and what a budget means.
"""

from llmcompress.eviction.base import EvictingCache
from llmcompress.eviction.knorm import Knorm
from llmcompress.eviction.snapkv import SnapKV
from llmcompress.eviction.streaming import Streaming

EVICTIONS: dict[str, type[EvictingCache]] = {"knorm": Knorm, "snapkv": SnapKV, "streaming": Streaming}

__all__ = ["EVICTIONS", "EvictingCache", "Knorm", "SnapKV", "Streaming"]
