"""KV caches with a budget: it holds, positions stay, and within it nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers import DynamicCache

from llmcompress.errors import PlanError
from llmcompress.eviction import EVICTIONS, EvictingCache, Knorm, SnapKV, Streaming
from llmcompress.eviction.base import EvictingLayer, highest
from llmcompress.eviction.snapkv import ATTENTION, ROOM, SnapKVLayer

BUDGET = 28
MAKERS: dict[str, Callable[[Any, int], EvictingCache]] = {
    "knorm": lambda model, budget: Knorm(model, budget, recent=4),
    "snapkv": lambda model, budget: SnapKV(model, budget, window=8),
    "streaming": lambda model, budget: Streaming(model, budget, sinks=3),
}
KINDS = {"llama": (), "gpt2": (), "gemma2": ()} | dict.fromkeys(
    ["qwen2", "qwen3", "phi3", "gpt_neox", "opt"], pytest.mark.slow
)
PAIRS = [
    pytest.param(kind, policy, marks=marks)
    for kind, marks in KINDS.items()
    for policy in MAKERS
    if (kind, policy) != ("gemma2", "snapkv")  # which computes its attention by eager
]
policies = pytest.mark.parametrize("policy", MAKERS)


def tokens(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, prompt: Tensor, cache: Any, new: int = 12) -> Tensor:
    """Greedy, and with the scores of every step."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, 1)


def test_every_policy_is_tested():
    assert MAKERS.keys() == EVICTIONS.keys()


@pytest.mark.parametrize(("kind", "policy"), PAIRS)
def test_the_budget_holds_while_text_is_generated(kind, policy):
    model = tiny_model(kind)
    cache = MAKERS[policy](model, BUDGET)
    generated(model, tokens(40), cache)
    assert all(BUDGET - ROOM <= kept <= BUDGET for kept in cache.kept)
    assert cache.kept
    assert cache.get_seq_length() == 51  # the last token is not in it
    full = DynamicCache(config=model.config)
    generated(model, tokens(40), full)
    layers = [layer for layer in cache.layers if isinstance(layer, EvictingLayer)]
    assert all(layer.keys.shape == layer.values.shape for layer in layers)
    assert cache.nbytes < sum(t.nbytes for layer in full.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize(("kind", "policy"), PAIRS)
def test_within_the_budget_nothing_changes(kind, policy):
    model = tiny_model(kind)
    expected = generated(model, tokens(20), DynamicCache(config=model.config), new=9)
    assert torch.equal(generated(model, tokens(20), MAKERS[policy](model, 28), new=9), expected)


@policies
def test_at_any_step_there_are_no_more_entries(policy):
    model = tiny_model("llama")
    cache = MAKERS[policy](model, BUDGET)
    with torch.no_grad():
        model(tokens(40), past_key_values=cache)
        for step in range(40):
            assert max(cache.kept) <= BUDGET
            model(tokens(1, seed=step), past_key_values=cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.kept) == (0, [0, 0])
    with torch.no_grad():
        assert model(tokens(5), past_key_values=cache).logits.isfinite().all()


def remembered(model: Any, cache: EvictingCache, prompt: Tensor, policy: str) -> list[Tensor]:
    """Positions of the entries that each layer has kept, [batch, KV heads, n]: keys are compared with all keys."""
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=full)
        model(prompt, past_key_values=cache)
    found = []
    for whole, part in zip(full.layers, cache.layers, strict=True):
        distance = (part.keys[..., :, None, :] - whole.keys[..., None, :, :]).abs().amax(-1)
        assert float(distance.amin(-1).max()) == 0.0  # each entry is one of the prompt's, rotated as it was
        found.append(distance.argmin(-1))
    return found


def test_streaming_keeps_both_ends():
    model = tiny_model("llama")
    for kept in remembered(model, Streaming(model, 10, sinks=3), tokens(30), "streaming"):
        assert torch.equal(kept, torch.tensor([0, 1, 2, *range(23, 30)]).expand_as(kept))


def test_knorm_keeps_the_smallest_keys_of_each_head():
    model = tiny_model("llama")
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(30), past_key_values=full)
    for layer, kept in enumerate(remembered(model, Knorm(model, 10, recent=2), tokens(30), "knorm")):
        norms = full.layers[layer].keys.norm(dim=-1)[0]
        for head in range(2):  # of two KV heads, each decides for itself
            smallest = set(norms[head, :28].argsort()[:8].tolist())
            assert set(kept[0, head].tolist()) == smallest | {28, 29}
    assert not torch.equal(kept[0, 0], kept[0, 1])


def test_snapkv_keeps_what_the_last_queries_attend_to():
    """Against attention weights of the eager implementation, averaged over the query heads of a group."""
    model = tiny_model("llama")
    budget, window = 12 + ROOM, 8
    kept = remembered(model, SnapKV(model, budget, window, kernel=3), tokens(40), "snapkv")
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(tokens(40), output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        scores = weights[0, :, -window:].sum(1).view(2, 3, 40).mean(1)  # three query heads share a KV head
        smooth = torch.nn.functional.avg_pool1d(scores[None, :, :-window], 3, stride=1, padding=1)[0]
        for head in range(2):
            best = set(smooth[head].topk(12 - window).indices.tolist())
            assert set(kept[layer][0, head].tolist()) == best | set(range(40 - window, 40))


def by_positions(model: Any, prompt: Tensor, kept: list[int], last: Tensor) -> Tensor:
    """Logits of one more token that sees only some of the prompt: a mask on an ordinary model."""
    length = prompt.shape[1]
    mask = torch.full((length + 1, length + 1), torch.finfo(torch.float32).min).triu(1)
    gone = torch.ones(length + 1, dtype=torch.bool)
    gone[[*kept, length]] = False
    mask[length, gone] = torch.finfo(torch.float32).min
    with torch.no_grad():
        return model(torch.cat([prompt, last], 1), attention_mask=mask[None, None]).logits[:, -1]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_the_next_token_has_its_true_position(kind):
    """What comes after eviction is what the whole model computes with those tokens masked."""
    model = tiny_model(kind)
    cache, prompt, last = Streaming(model, 10, sinks=3), tokens(30), tokens(1, seed=5)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        found = model(last, past_key_values=cache).logits[:, -1]
    expected = by_positions(model, prompt, [0, 1, 2, *range(23, 30)], last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@policies
def test_a_second_prompt_sees_what_was_kept_and_is_causal(policy):
    """Several tokens after an eviction: each as when they come one by one, as far as nothing is evicted between."""
    model = tiny_model("llama")
    first, second = tokens(40), tokens(3, seed=7)
    one, many = MAKERS[policy](model, BUDGET), MAKERS[policy](model, BUDGET)
    with torch.no_grad():
        model(first, past_key_values=one)
        model(first, past_key_values=many)
        for cache in (one, many):
            for layer in cache.layers:
                layer.budget = 100
        together = model(second, past_key_values=many).logits
        single = [model(second[:, i : i + 1], past_key_values=one).logits for i in range(3)]
    torch.testing.assert_close(together, torch.cat(single, 1), rtol=1e-4, atol=1e-4)


@policies
def test_beams_and_batches(policy):
    model = tiny_model("llama")
    cache = MAKERS[policy](model, BUDGET)
    prompt = tokens(40, batch=2)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, num_beams=2, **options)
    assert out.shape == (2, 46)
    assert max(cache.kept) <= BUDGET
    alone = generated(model, prompt[:1], MAKERS[policy](model, BUDGET), new=6)
    both = generated(model, prompt, MAKERS[policy](model, BUDGET), new=6)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)


def test_layers_with_a_window_are_left_alone():
    model = tiny_model("gemma2")
    cache = Streaming(model, BUDGET)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "StreamingLayer"]
    with pytest.raises(PlanError, match="no layer with full attention"):
        Streaming(tiny_model("mistral"), BUDGET)


def test_what_cannot_be_is_refused():
    model = tiny_model("llama")
    for make in (lambda: Streaming(model, 4, sinks=4), lambda: Knorm(model, 3, recent=4), lambda: SnapKV(model, 64)):
        with pytest.raises(PlanError, match="entries that always stay"):
            make()
    with pytest.raises(PlanError, match="no middle"):
        SnapKV(model, 200, kernel=4)
    with pytest.raises(PlanError, match="cannot go back"):
        Streaming(model, 10).crop(-1)
    with pytest.raises(PlanError, match="by 'eager'"):
        SnapKV(tiny_model("gemma2"), 200)


def test_an_attention_that_shows_no_queries_is_an_error():
    model = tiny_model("llama")
    cache = SnapKV(model, BUDGET, window=8)
    assert model.config._attn_implementation == ATTENTION
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(tokens(5), past_key_values=cache)
        with pytest.raises(PlanError, match="does not show its queries"):
            model(tokens(1), past_key_values=cache)


def test_the_newest_are_among_the_highest():
    found = highest(torch.tensor([[5.0, 4, 3, 2, 1, 0]]), 3, recent=2)
    assert found.tolist() == [[0, 4, 5]]
    layer = SnapKVLayer(20, 4, 1)
    queries, keys = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 10, 8)
    scores = layer.scores(queries, keys, 0.3)
    assert scores.shape == (1, 2, 10)
    assert not scores[..., 6:].any()
    assert 0 < float(scores.sum()) < 2 * 4  # each of four queries gives out one in every head, some of it in the window


def test_the_window_is_no_neighbour():
    """All attention stays in it: what is before gets none, next to it no more than far away."""
    layer = SnapKVLayer(budget=30, window=4, kernel=5)
    keys = torch.zeros(1, 1, 12, 2)
    keys[:, :, 8:] = torch.tensor([100.0, 0.0])
    scores = layer.scores(torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2), keys, 1.0)
    assert float(scores.max()) < 1e-12


@policies
def test_padding_is_refused(policy):
    model = tiny_model("llama")
    prompt, mask = tokens(40, batch=2), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :3] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    with pytest.raises(PlanError, match=r"the attention mask hides 3 tokens, .* sequences of one length"):
        model.generate(prompt, attention_mask=mask, past_key_values=MAKERS[policy](model, BUDGET), **options)
    whole = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(PlanError, match=r"the attention mask is \[2, 1, 40, 40\]"):
        model(prompt, attention_mask=whole, past_key_values=MAKERS[policy](model, BUDGET))
    model.generate(prompt, attention_mask=mask, **options)  # an ordinary cache has nothing against it
    assert len(model.base_model._forward_pre_hooks) == 1  # however many caches there were
