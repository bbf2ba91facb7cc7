"""A transformers cache whose layers hold at most `budget` entries, and forget the rest.

Keys are cached after the rotary embedding, so an entry keeps its position wherever it stands in the cache. Two numbers
that are one in an ordinary cache are two here: tokens *seen*, which give the next token its position, and entries
*kept*, which give the attention mask its width. A token that comes may look at every kept entry, and at those that come
with it and before it; the mask gets that from the offset between the two numbers.

The pass that brings tokens still attends to all of them; eviction comes after. So the budget bounds what stays between
passes, and a prompt within the budget is treated as by an ordinary cache, bit for bit.

Layers with a sliding window keep that window, which is a bound of its own, and are left to transformers. The sequences
of a batch must be equally long: a cache does not see which tokens are padding, and would keep these for their place or
their norm. The model does see it, so a mask that hides tokens is refused there, before its forward pass.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llmcompress.errors import PlanError


class EvictingLayer(DynamicLayer):
    """Keys and values of one layer, [batch, KV heads, entries, head size] each; heads may keep different tokens."""

    is_croppable = False  # what was evicted does not come back

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget, self.seen = budget, 0

    def chosen(self, keys: Tensor) -> Tensor:
        """Entries that stay, [batch, KV heads, n] int64 in rising order, n <= budget; keys [.., entries, head size]."""
        raise NotImplementedError(f"{type(self).__name__}.chosen")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; returns what they attend to, and then evicts."""
        keys, values = self.extended(key_states, value_states)
        if keys.shape[-2] > self.budget:
            self.keep(self.chosen(keys))
        return keys, values

    def extended(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """All entries with those that come, which stay for now."""
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def keep(self, entries: Tensor) -> None:
        """Forget all but these entries [batch, KV heads, n]."""
        assert self.keys is not None
        assert self.values is not None
        at = entries[..., None]
        self.keys = self.keys.gather(2, at.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, at.expand(-1, -1, -1, self.values.shape[-1]))

    @property
    def kept(self) -> int:
        """Entries that are held."""
        return 0 if self.keys is None or self.keys.numel() == 0 else int(self.keys.shape[-2])

    def get_seq_length(self) -> int:
        """Tokens seen, from which transformers takes the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width of the mask, and the position that its first column stands for."""
        return self.kept + query_length, self.seen - self.kept

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Only to nothing less: raises PlanError."""
        if tokens_to_remove:
            raise PlanError("an evicting cache cannot go back; assisted generation needs an ordinary cache")


class EvictingCache(Cache):
    """The cache of a model, with a budget in every layer of full attention."""

    def __init__(self, model: Any, budget: int, fewest: int, make: Callable[[], EvictingLayer]) -> None:
        name = type(self).__name__
        if budget < fewest:
            raise PlanError(
                f"{name}: budget {budget} is below the {fewest} entries that always stay; give at least that"
            )
        layers = DynamicCache(config=model.config).layers
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise PlanError(
                f"{name}: {type(model).__name__} has no layer with full attention, so its cache is bounded "
                "already; leave it out"
            )
        for index in full:
            layers[index] = make()
        super().__init__(layers=layers)
        watch_masks(model)

    @property
    def kept(self) -> list[int]:
        """Entries held by each layer that evicts."""
        return [layer.kept for layer in self.layers if isinstance(layer, EvictingLayer)]

    @property
    def nbytes(self) -> int:
        """Of all keys and values that are held."""
        held = [getattr(layer, name, None) for layer in self.layers for name in ("keys", "values")]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def watch_masks(model: Any) -> None:
    """Let the decoder of a model refuse masks that an evicting cache cannot be used with."""
    decoder = getattr(model, "base_model", model)
    if refuse_padding not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(refuse_padding, with_kwargs=True)


def refuse_padding(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: raise PlanError if it has an evicting cache, and a mask that hides tokens."""
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if not isinstance(cache, EvictingCache) or mask is None:
        return
    name = type(cache).__name__
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PlanError(
            f"{name}: the attention mask is {shape}, and which tokens it hides is not known once some are forgotten; "
            "give one of [batch, tokens], or an ordinary cache"
        )
    if not bool(mask.all()):
        raise PlanError(
            f"{name}: the attention mask hides {int((mask == 0).sum())} tokens, which the cache would take for text; "
            "give sequences of one length, without padding, or one after another"
        )


def highest(scores: Tensor, count: int, recent: int) -> Tensor:
    """The `count` entries of the highest scores, the last `recent` among them: [.., entries] -> [.., count], rising."""
    newest = torch.arange(scores.shape[-1], device=scores.device) >= scores.shape[-1] - recent
    return scores.masked_fill(newest, torch.inf).topk(count, dim=-1).indices.sort(dim=-1).values
