"""The stream: block by block it computes what the stock model computes, and never holds more than one block."""

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_config, tiny_model
from torch import Tensor, nn

from llmcompress import stream
from llmcompress.arch import discover, skeleton
from llmcompress.errors import CalibrationError, FormatError
from llmcompress.stats import InputGram
from llmcompress.stream import StreamedModel, batches, collect, stream_blocks

SAMPLES, LENGTH = 5, 24  # longer than the sliding window of 16
BATCH = 2  # so that the last batch is a remainder of one
CPU = torch.device("cpu")
every = pytest.mark.parametrize("kind", ARCHITECTURES)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_TOKENS", BATCH * LENGTH)


def tokens(samples: int = SAMPLES, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(0))


@functools.cache
def parts(kind: str) -> tuple[Any, Any]:
    """The stock model, and its architecture."""
    return tiny_model(kind), discover(skeleton(tiny_config(kind)))


class Reader:
    """What a checkpoint does for the stream; keeps the names it was asked for, and may hold damaged tensors."""

    def __init__(self, model: nn.Module, **damaged: Tensor) -> None:
        self.tensors = {name: parameter.data for name, parameter in model.named_parameters()} | damaged
        self.asked: list[str] = []

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        self.asked += names
        return {name: self.tensors[name].clone() for name in names}


def streamed(
    kind: str, *, dtype: torch.dtype = torch.float32, damaged: dict[str, Tensor] | None = None
) -> StreamedModel:
    """A model that streams its weights from the stock one."""
    model, architecture = parts(kind)
    shell = skeleton(tiny_config(kind), dtype)
    return StreamedModel(shell, architecture, Reader(model, **damaged or {}), dtype=dtype, device=CPU)


def run_through(model: StreamedModel, inputs: Tensor) -> Tensor:
    """Hidden states after the last block."""
    hidden = model.embed(inputs)
    for _ in stream_blocks(model, hidden):
        pass
    return hidden


def loaded(model: StreamedModel) -> set[str]:
    """Parameters that take memory."""
    return {name for name, parameter in model.model.named_parameters() if not parameter.is_meta}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# the same numbers


@every
def test_logits_are_those_of_the_stock_model(kind):
    """Several batches and a remainder; for Mistral and Gemma the window ends inside every sample."""
    stock, model = parts(kind)[0], streamed(kind)
    found = model.logits(run_through(model, tokens()))
    with torch.no_grad():
        expected = stock(tokens(), use_cache=False).logits
    assert found.shape == (SAMPLES, LENGTH, 128)
    assert relative(found, expected) < 1e-5
    assert not loaded(model)


def test_embedding_narrower_than_the_model():
    """OPT-350m projects its embeddings in and out."""
    changes = {"word_embed_proj_dim": 48, "do_layer_norm_before": False}
    stock = tiny_model("opt", **changes)
    model = skeleton(tiny_config("opt", **changes))
    stored = stock.state_dict()
    streamed_model = StreamedModel(
        model, discover(model), lambda names: {n: stored[n].clone() for n in names},
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    with torch.no_grad():
        expected = stock(tokens()).logits
        assert relative(streamed_model.logits(run_through(streamed_model, tokens())), expected) < 1e-5


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_sliding_window_matters_here(kind):
    """The test above can fail: with a window as long as the sample, logits differ."""
    stock, wide = parts(kind)[0], tiny_model(kind, sliding_window=LENGTH)
    with torch.no_grad():
        assert relative(wide(tokens(), use_cache=False).logits, stock(tokens(), use_cache=False).logits) > 1e-3


@every
def test_every_block_gets_the_inputs_of_the_stock_model(kind):
    stock, model = parts(kind)[0], streamed(kind)
    with torch.no_grad():
        expected = stock(tokens(), use_cache=False, output_hidden_states=True).hidden_states
    for block in stream_blocks(model, model.embed(tokens())):
        assert relative(block.hidden, expected[block.index]) < 1e-5


def test_changed_weights_feed_the_next_block():
    """The stream replays a block with the weights that its caller left in it."""
    model = streamed("llama")
    hidden = model.embed(tokens())
    start = hidden.clone()
    for block in stream_blocks(model, hidden):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            block.module.get_submodule(name).weight.data.zero_()
    assert torch.equal(hidden, start)


def test_continuing_in_the_middle():
    """A run that was stopped before block 1 goes on with stored hidden states."""
    whole = run_through(streamed("gemma2"), tokens())
    first = streamed("gemma2")
    hidden = first.embed(tokens())
    blocks = stream_blocks(first, hidden)
    next(blocks)
    next(blocks)  # block 0 is done now
    stored = hidden.clone()
    again = streamed("gemma2")
    again.prepare(tokens())
    for _ in stream_blocks(again, stored, start=1):
        pass
    assert torch.equal(stored, whole)


def test_bfloat16_stream_is_the_bfloat16_model():
    stock, model = tiny_model("llama").to(torch.bfloat16), streamed("llama", dtype=torch.bfloat16)
    hidden = run_through(model, tokens())
    with torch.no_grad():
        expected = stock(tokens(), use_cache=False).logits
    assert hidden.dtype == torch.bfloat16
    # Two blocks add four times to the residual stream, each rounded with an error of eps at most.
    assert relative(model.logits(hidden).float(), expected.float()) < torch.finfo(torch.bfloat16).eps * 2


@pytest.mark.parametrize(
    ("samples", "length", "expected"),
    [(5, 24, [2, 2, 1]), (4, 24, [2, 2]), (1, 24, [1]), (3, 1000, [1, 1, 1]), (5, 10, [4, 1])],
)
def test_batches(samples, length, expected):
    found = list(batches(samples, length))
    assert [part.stop - part.start for part in found] == expected
    assert [part.start for part in found[1:]] == [part.stop for part in found[:-1]]


# statistics


@every
def test_grams_are_those_of_the_inputs(kind):
    """Gathered once for linears that share an input, over every token exactly once."""
    model = streamed(kind)
    shared = model.architecture.at(0).shared
    block = next(stream_blocks(model, model.embed(tokens())))
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        block.module.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2).double())
        )
        for name in model.architecture.at(0).linears
    ]
    grams = collect(block, dict.fromkeys(shared, InputGram))
    assert set(grams) == set(model.architecture.at(0).linears)
    for hook in hooks:
        hook.remove()
    for names in shared:
        assert len({id(grams[name]) for name in names}) == 1
        assert grams[names[0]].tokens == SAMPLES * LENGTH
    assert len({id(gram) for gram in grams.values()}) == len(shared)
    for name, gram in grams.items():
        x = torch.cat(seen[name])
        assert relative(gram.mean.double(), x.T @ x / len(x)) < 1e-5


def test_collect_only_what_is_asked_and_leave_no_hooks():
    model = streamed("llama")
    block = next(stream_blocks(model, model.embed(tokens())))
    before = block.hidden.clone()
    grams = collect(block, {("mlp.gate_proj", "mlp.up_proj"): InputGram})
    assert set(grams) == {"mlp.gate_proj", "mlp.up_proj"}
    assert not any(module._forward_pre_hooks for module in block.module.modules())
    assert torch.equal(block.hidden, before)


# memory


@every
def test_at_most_one_block_is_in_memory(kind):
    model = streamed(kind)
    assert not loaded(model)
    hidden = model.embed(tokens())
    assert not loaded(model)
    for block in stream_blocks(model, hidden):
        assert loaded(model) == {f"{block.name}.{name}" for name, _ in block.module.named_parameters()}
    assert not loaded(model)


@every
def test_every_block_parameter_is_read_once(kind):
    model = streamed(kind)
    run_through(model, tokens())
    inside = [name for name in model.read.asked if name.startswith(model.architecture.blocks + ".")]
    expected = [n for n, _ in model.model.named_parameters() if n.startswith(model.architecture.blocks + ".")]
    assert sorted(inside) == sorted(expected)


@pytest.mark.parametrize(
    ("kind", "head"), [("qwen2", "lm_head.weight"), ("llama", "model.embed_tokens.weight")], ids=["untied", "tied"]
)
def test_logits_read_the_head_and_not_the_embedding_table(kind, head):
    model = streamed(kind)
    hidden = run_through(model, tokens())
    model.read.asked.clear()
    model.logits(hidden)
    assert set(model.read.asked) == {head, "model.norm.weight"}


def test_buffers_survive_the_loading_of_parameters():
    model = streamed("gemma3_text")
    before = {name: buffer.clone() for name, buffer in model.model.named_buffers()}
    run_through(model, tokens())
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.model.named_buffers())


# damage


def damage(kind: str, name: str, value: float) -> dict[str, Tensor]:
    tensor = parts(kind)[0].get_parameter(name).detach().clone()
    tensor.view(-1)[7] = value
    return {name: tensor}


DAMAGED = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", DAMAGED)
def test_weights_that_are_not_finite(name, value):
    model = streamed("qwen2", damaged=damage("qwen2", name, value))
    with pytest.raises(FormatError, match=rf"^{name}: the weights hold NaN or infinity"):
        run_through(model, tokens())


def test_head_that_is_not_finite():
    model = streamed("qwen2", damaged=damage("qwen2", "lm_head.weight", float("nan")))
    hidden = run_through(model, tokens())
    with pytest.raises(FormatError, match=r"^lm_head\.weight: the weights hold NaN"):
        model.logits(hidden)


def test_weight_that_the_asked_dtype_cannot_hold():
    """1e5 is finite in the checkpoint and infinite in float16: it must not become a layer of infinities."""
    name = "model.layers.0.mlp.up_proj.weight"
    model = streamed("llama", dtype=torch.float16, damaged=damage("llama", name, 1e5))
    with pytest.raises(FormatError, match=name):
        next(stream_blocks(model, model.embed(tokens())))


def test_activations_that_overflow():
    """Finite weights, infinite products: named is the block, and what to try."""
    name = "model.layers.0.mlp.down_proj.weight"
    huge = {name: torch.full((96, 160), 3e38)}
    with pytest.raises(CalibrationError, match=r"^model\.layers\.0: .*NaN or infinity.*float32"):
        run_through(streamed("llama", damaged=huge), tokens())


def test_weight_of_another_shape():
    name = "model.layers.1.mlp.down_proj.weight"
    model = streamed("llama", damaged={name: torch.zeros(96, 80)})
    with pytest.raises(FormatError, match=rf"^{name}: shape \(96, 80\) in the checkpoint, \(96, 160\) in the model"):
        run_through(model, tokens())
