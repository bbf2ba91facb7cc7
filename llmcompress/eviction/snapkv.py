"""SnapKV: what the newest queries attend to stays.

Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469. The score of an entry
is the attention that it gets from the last `window` queries, summed over them and averaged over the query heads that
share a KV head, then smoothed over `kernel` neighbours, so that what surrounds an important token stays with it. With
q_t the queries of one of these heads, K the keys and c the model's scaling, 1 / sqrt(head size) in most:

    a_i = mean over heads of  sum over t in the window of  softmax(c K q_t)_i
    score(i) = 1 / kernel  sum over |j - i| <= (kernel - 1) / 2 of  a_j          a_j = 0 where there is no entry

The window itself always stays, and is no neighbour: the attention that it gives to itself says nothing of what is
before.

The paper evicts once, after the prompt. Here the budget also holds while text is generated: the last queries are kept
beside the cache and score it anew each time that it is full. An eviction frees ROOM entries more than it must, so that
this is rare.

A cache is given keys and values, never queries. So the model's attention goes through `shown_attention`, which is
transformers' own for sdpa, and shows the queries to the cache whose keys it was given.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmcompress.errors import PlanError
from llmcompress.eviction.base import EvictingCache, EvictingLayer, highest

ATTENTION = "llmcompress_snapkv"  # name of the attention function in transformers
ROOM = 16  # entries that an eviction frees beyond what it must


class SnapKVLayer(EvictingLayer):
    """Keeps what the last queries attend to."""

    def __init__(self, budget: int, window: int, kernel: int) -> None:
        super().__init__(budget)
        self.window, self.kernel = window, kernel
        self.queries: Tensor | None = None  # [batch, heads, up to window, head size], of the newest tokens
        self.waiting = False  # for the queries of the tokens that came last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; what stays is chosen once their queries are known."""
        if self.waiting:
            raise PlanError("SnapKV: this model's attention does not show its queries; use Knorm or Streaming")
        keys, values = self.extended(key_states, value_states)
        keys.shown_to, self.waiting = self, True  # type: ignore[attr-defined]
        return keys, values

    def see(self, queries: Tensor, keys: Tensor, scaling: float) -> None:
        """Look at the queries [batch, heads, n, head size] of the tokens that came last, and evict."""
        self.waiting = False
        known = queries if self.queries is None else torch.cat([self.queries, queries], dim=2)
        self.queries = known[:, :, -self.window :].clone()  # a view would hold the queries of a whole prompt
        if keys.shape[-2] > self.budget:
            self.keep(highest(self.scores(self.queries, keys, scaling), self.budget - ROOM, self.window))

    def scores(self, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """Attention that each entry gets, smoothed: [batch, KV heads, entries] float32; 0 in the window."""
        (batch, heads, count, size), (_, groups, entries, _) = queries.shape, keys.shape
        grouped = queries.view(batch, groups, heads // groups, count, size)
        logits = grouped.float() @ keys.float()[:, :, None].transpose(-1, -2) * scaling
        places = torch.arange(entries, device=keys.device)
        logits.masked_fill_(places > places[entries - count :, None], -torch.inf)  # the window is the newest entries
        attention = logits.softmax(-1).sum(-2).mean(2)[..., : entries - self.window]
        smooth = torch.nn.functional.avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.nn.functional.pad(smooth, (0, self.window))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.queries, self.waiting = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """For beam search."""
        super().reorder_cache(beam_idx)
        self.queries = None if self.queries is None else self.queries.index_select(0, beam_idx.to(self.queries.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.queries = None if self.queries is None else self.queries.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some sequences of the batch."""
        super().batch_select_indices(indices)
        self.queries = None if self.queries is None else self.queries[indices]


class SnapKV(EvictingCache):
    """A cache of `budget` tokens in each layer, by the attention of the newest `window` queries, which always stay.

    The model's attention is switched to one that computes the same and shows its queries; it must be sdpa.
    """

    def __init__(self, model: Any, budget: int, window: int = 64, kernel: int = 5) -> None:
        if kernel % 2 == 0:
            raise PlanError(f"SnapKV: kernel {kernel} has no middle; give an odd one")
        super().__init__(model, budget, window + ROOM, lambda: SnapKVLayer(budget, window, kernel))
        show_queries(model)


def show_queries(model: Any) -> None:
    """Let a model compute its attention by `shown_attention`. Raises PlanError if it does not use sdpa."""
    found = model.config._attn_implementation
    if found not in ("sdpa", ATTENTION):
        raise PlanError(
            f"SnapKV: {type(model).__name__} computes its attention by {found!r}, and queries are seen on their way to "
            "sdpa; load it with attn_implementation='sdpa', or use Knorm or Streaming"
        )
    AttentionInterface.register(ATTENTION, shown_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def shown_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """transformers' sdpa attention; the cache that has given these keys sees the queries."""
    result = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layer = getattr(key, "shown_to", None)
    if layer is not None:
        del key.shown_to  # type: ignore[attr-defined]  # the layer holds this tensor, which must not hold the layer
        scaling = options.get("scaling")
        layer.see(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return result
