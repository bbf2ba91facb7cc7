"""Discovery of blocks, shared inputs and links, on tiny models of ten architectures; and that links are true."""

import copy
import functools
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_config, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmcompress.arch import (
    Architecture,
    Heads,
    Link,
    discover,
    find_blocks,
    is_transposed,
    match_names,
    rows_of,
    scale_consumers,
    scale_producer,
    skeleton,
)
from llmcompress.arch.links import interleaved_value_heads
from llmcompress.errors import FormatError, PlanError
from llmcompress.fused import fuse

TOKENS = torch.arange(24).reshape(2, 12)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_SHARED = (QKV, ("self_attn.o_proj",), GATED, ("mlp.down_proj",))
GQA = tuple(range(16)) * 3 + tuple(range(16, 32)) * 3  # value head 0 feeds query heads 0 to 2, head 1 feeds 3 to 5


def same(n: int, start: int = 0) -> tuple[int, ...]:
    """Row start + i makes column i."""
    return tuple(range(start, start + n))


def llama_links(attention: tuple[int, ...] = GQA, norm: str = "post_attention_layernorm", offset: bool = False) -> Any:
    """Producer -> (consumers, rows, offset) of everything that is built as Llama is."""
    return {
        "input_layernorm": (QKV, same(96), offset),
        "self_attn.v_proj": (("self_attn.o_proj",), attention, False),
        norm: (GATED, same(96), offset),
        "mlp.up_proj": (("mlp.down_proj",), same(160), False),
    }


GEMMA = ("model.layers", LLAMA_SHARED, llama_links(norm="pre_feedforward_layernorm", offset=True))
LLAMA = ("model.layers", LLAMA_SHARED, llama_links())
WIDE_GQA = tuple(range(32)) * 3 + tuple(range(32, 64)) * 3

EXPECTED = {  # blocks, linears that share an input, links
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": ("model.layers", LLAMA_SHARED, llama_links(WIDE_GQA)),
    "phi3": (
        "model.layers",
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        {
            "input_layernorm": (("self_attn.qkv_proj",), same(96), False),
            # rows: 96 of the queries, 32 of the keys, then the values
            "self_attn.qkv_proj": (("self_attn.o_proj",), tuple(128 + row for row in GQA), False),
            "post_attention_layernorm": (("mlp.gate_up_proj",), same(96), False),
            "mlp.gate_up_proj": (("mlp.down_proj",), same(160, 160), False),
        },
    ),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": (  # GELU: nothing moves from c_fc to c_proj
        "transformer.h",
        (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        {
            "ln_1": (("attn.c_attn",), same(96), False),
            "attn.c_attn": (("attn.c_proj",), same(96, 192), False),
            "ln_2": (("mlp.c_fc",), same(96), False),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
        {
            "input_layernorm": (("attention.query_key_value",), same(96), False),
            "attention.query_key_value": (
                ("attention.dense",),
                sum((same(16, 48 * head + 32) for head in range(6)), ()),
                False,
            ),
            "post_attention_layernorm": (("mlp.dense_h_to_4h",), same(96), False),
        },
    ),
    "opt": (  # ReLU lets positive factors through: fc1 -> fc2 is a link
        "model.decoder.layers",
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        {
            "self_attn_layer_norm": (QKV, same(96), False),
            "self_attn.v_proj": (("self_attn.out_proj",), same(96), False),
            "final_layer_norm": (("fc1",), same(96), False),
            "fc1": (("fc2",), same(160), False),
        },
    ),
}


@functools.cache
def architecture(kind: str) -> Architecture:
    return discover(skeleton(tiny_config(kind)))


def grouped(groups: Any) -> set[frozenset[str]]:
    return {frozenset(group) for group in groups}


def links_of(found: Architecture) -> dict[str, Any]:
    """Links with consumers in a set: the order in which a module lists its linears does not matter."""
    return {link.producer: (set(link.consumers), tuple(link.rows.tolist()), link.offset) for link in found.at(0).links}


every = pytest.mark.parametrize("kind", ARCHITECTURES)


# what is discovered


@every
def test_blocks_and_shared_inputs(kind):
    blocks, shared, _ = EXPECTED[kind]
    found = architecture(kind)
    assert (found.blocks, found.count, found.block(1)) == (blocks, 2, f"{blocks}.1")
    assert grouped(found.at(0).shared) == grouped(shared)
    assert sorted(name for group in found.at(0).shared for name in group) == sorted(found.at(0).linears)


@every
def test_links(kind):
    expected = {name: (set(to), rows, offset) for name, (to, rows, offset) in EXPECTED[kind][2].items()}
    assert links_of(architecture(kind)) == expected


@every
def test_linears_have_their_shapes(kind):
    block = find_blocks(tiny_model(kind))[1][0]
    for name, linear in architecture(kind).at(0).linears.items():
        module = block.get_submodule(name)
        shape = tuple(reversed(module.weight.shape)) if linear.transposed else tuple(module.weight.shape)
        assert (linear.out_features, linear.in_features) == shape
        assert linear.transposed == (kind == "gpt2") == is_transposed(module)
        assert rows_of(module) == linear.out_features


HEADS = {
    "multi-query": ("llama", {"num_key_value_heads": 1}, "self_attn.v_proj", tuple(range(16)) * 6),
    "every head its own": ("llama", {"num_key_value_heads": 6}, "self_attn.v_proj", same(96)),
    "two query heads each": (
        "llama",
        {"num_key_value_heads": 3},
        "self_attn.v_proj",
        sum((same(16, 16 * head) * 2 for head in range(3)), ()),
    ),
    "odd head size": ("llama", {"head_dim": 20}, "self_attn.v_proj", (*same(20) * 3, *same(20, 20) * 3)),
    "fused, multi-query": ("phi3", {"num_key_value_heads": 1}, "self_attn.qkv_proj", same(16, 112) * 6),
    "fused, every head its own": ("phi3", {"num_key_value_heads": 6}, "self_attn.qkv_proj", same(96, 192)),
    "fused, as many rows as a fused MLP": (
        "phi3",
        {"num_key_value_heads": 3},
        "self_attn.qkv_proj",
        sum((same(16, 144 + 16 * head) * 2 for head in range(3)), ()),
    ),
}


@pytest.mark.parametrize(("kind", "changes", "producer", "rows"), HEADS.values(), ids=HEADS)
def test_head_layouts(kind, changes, producer, rows):
    found = discover(skeleton(tiny_config(kind, **changes)))
    assert links_of(found)[producer][1] == rows


def test_interleaved_value_rows_of_two_heads():
    rows = interleaved_value_heads(12, 4, Heads(query=2, kv=2, size=2))
    assert rows is not None
    assert rows.tolist() == [4, 5, 10, 11]


def test_discovery_reads_no_weights_and_leaves_the_random_state_alone():
    model = skeleton(tiny_config("llama"))
    state = torch.random.get_rng_state()
    discover(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


# that links are true, on the whole model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def rescale(model: nn.Module, found: Architecture, link: Link, *, producer: bool = True) -> None:
    """Move random factors along one link in every block."""
    for index in range(found.count):
        block = model.get_submodule(found.block(index))
        scale = 0.5 + 1.5 * torch.rand(int(link.rows.max()) + 1, generator=torch.Generator().manual_seed(index))
        scale_consumers(block, link, scale)
        if producer:
            scale_producer(block, link, scale)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@every
def test_rescaling_every_link_leaves_logits_unchanged(kind):
    """Biases are random, as all one-dimensional parameters of the tiny models are."""
    model, found = tiny_model(kind), architecture(kind)
    before = logits(model)
    for link in found.at(0).links:
        rescale(model, found, link)
    assert relative(logits(model), before) < 1e-5


@every
def test_each_link_needs_its_producer(kind):
    """The test above can fail: with the consumers alone rescaled, logits change."""
    found = architecture(kind)
    for link in found.at(0).links:
        model = tiny_model(kind)
        before = logits(model)
        rescale(model, found, link, producer=False)
        assert relative(logits(model), before) > 1e-3, link.producer


def test_biases_are_there_to_be_scaled():
    biased = {"qwen2": "self_attn.v_proj", "opt": "fc1", "gpt2": "attn.c_attn", "gpt_neox": "input_layernorm"}
    for kind, producer in biased.items():
        module = find_blocks(tiny_model(kind))[1][0].get_submodule(producer)
        assert bool(module.bias.ne(0).all())


def test_value_row_map_against_perturbation():
    """A value row of the full model changes exactly the output-projection inputs that the map gives to it."""
    model, found = tiny_model("llama"), architecture("llama")
    link = next(link for link in found.at(0).links if link.producer == "self_attn.v_proj")
    attention = find_blocks(model)[1][0].self_attn
    seen: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    for row in range(0, 32, 5):
        saved = attention.v_proj.weight.data.clone()
        attention.v_proj.weight.data[row] += 1
        logits(model)
        attention.v_proj.weight.data.copy_(saved)
        changed = (seen[-1] - seen[0]).abs().amax((0, 1)).nonzero().flatten()
        assert changed.tolist() == (link.rows == row).nonzero().flatten().tolist()


def test_norm_that_multiplies_by_one_plus_weight():
    """Gemma: 1 + w is divided, not w."""
    model, found = tiny_model("gemma2"), architecture("gemma2")
    block, link = find_blocks(model)[1][0], found.at(0).links[0]
    scale, before = torch.full((96,), 2.0), block.input_layernorm.weight.detach().clone()
    scale_producer(block, link, scale)
    torch.testing.assert_close(block.input_layernorm.weight, (1 + before) / 2 - 1)


def test_scaling_is_computed_in_the_dtype_of_the_factors():
    """A bfloat16 weight is scaled in float32 and rounded once."""
    model, found = tiny_model("llama").to(torch.bfloat16), architecture("llama")
    block, link = find_blocks(model)[1][0], found.at(0).links[0]
    scale, before = torch.linspace(0.5, 1.7, 96), copy.deepcopy(block.self_attn.q_proj.weight.data)
    scale_consumers(block, link, scale)
    assert torch.equal(block.self_attn.q_proj.weight, (before.float() * scale).to(torch.bfloat16))


# names in checkpoints


def test_names_match_as_they_are():
    model = tiny_model("llama")
    stored = [name for name, _ in model.named_parameters()]
    assert match_names(model, [*stored, "model.rotary_emb.inv_freq"]) == {name: [name] for name in stored}
    assert "lm_head.weight" not in stored  # tied


def test_names_without_the_prefix_of_the_base_model():
    """As the first GPT-2 checkpoints have them."""
    model = tiny_model("gpt2")
    names = [name for name, _ in model.named_parameters()]
    found = match_names(model, [name.removeprefix("transformer.") for name in names])
    assert found["transformer.h.0.attn.c_attn.weight"] == ["h.0.attn.c_attn.weight"]
    assert set(found) == set(names)


def test_names_of_a_base_model_in_a_checkpoint_with_prefix():
    body = tiny_model("gpt2").transformer
    found = match_names(body, [f"transformer.{name}" for name, _ in body.named_parameters()])
    assert found["h.0.ln_1.bias"] == ["transformer.h.0.ln_1.bias"]


def test_missing_tensors_are_named():
    model = tiny_model("llama")
    stored = [name for name, _ in model.named_parameters() if "layers.1.mlp" not in name]
    with pytest.raises(FormatError, match=r"lacks 3 of the model's \d+ tensors, such as model\.layers\.1\.mlp\."):
        match_names(model, stored)


def test_experts_are_matched_to_the_tensors_that_make_them(tmp_path):
    """Twelve experts, each a tensor of its own in the checkpoint, fused in the order of their numbers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=12,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = match_names(model, stored)
    fused = "model.layers.1.mlp.experts.down_proj"
    assert found[fused] == [f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight" for i in range(12)]
    assert sorted(tensor for tensors in found.values() for tensor in tensors) == sorted(stored)
    for name in (fused, "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"):
        made = fuse(model, name, {tensor: stored[tensor] for tensor in found[name]})
        assert torch.equal(made, model.get_parameter(name))


# what is refused


def test_blocks_with_unlike_linears():
    model = skeleton(tiny_config("llama"))
    model.model.layers[1].mlp.up_proj = nn.Linear(96, 32, device="meta")
    with pytest.raises(PlanError, match=r"model\.layers\.1 has other linears than model\.layers\.0"):
        discover(model)


def test_no_list_of_blocks():
    model = skeleton(tiny_config("llama"))
    model.config.num_hidden_layers = 5
    with pytest.raises(PlanError, match="no list of 5 decoder blocks"):
        find_blocks(model)


def test_outermost_list_is_the_blocks():
    """A list inside the blocks may be as long, such as two experts in two layers."""
    model = skeleton(tiny_config("llama"))
    for block in model.model.layers:
        block.experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert find_blocks(model)[0] == "model.layers"
