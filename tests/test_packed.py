"""Packed linears: they compute what the unpacked model does, never make it, and name what they do not take."""

import gc
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmcompress_kernels
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_runs import logits, reloaded, stock_loading, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import llmcompress
from llmcompress.errors import FormatError
from llmcompress.runtime import (
    GatedMLP,
    PackedLinear,
    accelerate,
    accelerated,
    compressed_linears,
    load,
    mlp,
    operators,
)
from llmcompress.runtime.linears import plain_linear, say_unpacked
from llmcompress.runtime.mlp import activation_of, fuse_gated, unlike
from llmcompress.runtime.table import OPERATORS

SOME = [("llama", True), ("qwen2", False), ("phi3", True)]  # GQA of 3, tied heads; biases; fused qkv
MORE = [(kind, symmetric) for kind in ("qwen3", "gemma2", "gpt_neox", "opt") for symmetric in (True, False)]

MAPS = Path("/proc/self/maps")


def error(found: Tensor, truth: Tensor) -> float:
    """Relative RMS."""
    return float((found.float() - truth.float()).norm() / truth.float().norm())


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def change_config(folder: Path, **weights: Any) -> None:
    """Change how config.json says weights are stored."""
    config = config_of(folder)
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    (folder / "config.json").write_text(json.dumps(config))


def change_tensor(folder: Path, ending: str, make: Any) -> str:
    """Change, or with None leave out, the first tensor whose name ends so; its name."""
    for path in sorted(folder.glob("*.safetensors")):
        stored = load_file(path)
        for name in stored:
            if name.endswith(ending):
                changed = {name: make(stored.pop(name)).contiguous()} if make else {}
                stored.pop(name, None)
                save_file(stored | changed, path, {"format": "pt"})
                return name
    raise LookupError(ending)


@pytest.fixture
def copy(packed_folders: Any, tmp_path: Path) -> Path:
    """A folder of the test's own, to be spoilt."""
    return shutil.copytree(packed_folders("llama"), tmp_path / "copy")


# what is computed


@pytest.mark.parametrize(
    ("kind", "symmetric"), [*SOME, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)], ids=str
)
def test_as_good_as_the_unpacked_model(kind, symmetric, packed_folders):
    folder = packed_folders(kind, symmetric=symmetric)
    model = load(folder)
    done = accelerated(model)
    assert set(done.packed) == {name for name, _ in compressed_linears(model)} != set()
    assert set(done.packed.values()) == {"int4_linear"}
    assert not done.kept
    packed, dense = logits(model), model.dequantize()
    assert not list(compressed_linears(dense))
    unpacked = logits(dense)
    truth = logits(dense.float())
    assert 0 < error(packed, truth) <= 2 * error(unpacked, truth)


@pytest.mark.parametrize(("kind", "symmetric"), SOME[:2], ids=str)
def test_weights_are_those_of_stock_transformers(kind, symmetric, packed_folders):
    folder = packed_folders(kind, symmetric=symmetric)
    stock = reloaded(folder)
    for name, linear in compressed_linears(load(folder)):
        assert torch.equal(linear.dense(), stock.get_submodule(name).weight)
    dense = load(folder, packed=False)
    assert torch.equal(logits(dense), logits(stock))


def test_float16(packed_folders):
    model = load(packed_folders("llama"), dtype=torch.float16)
    assert accelerated(model).packed
    assert {linear.dense().dtype for _, linear in compressed_linears(model)} == {torch.float16}
    packed = logits(model)
    truth = logits(model.dequantize().float())
    assert error(packed, truth) < 0.01


def test_saved_again_it_has_the_same_tensors(packed_folders, tmp_path):
    folder = packed_folders("qwen2", symmetric=False)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    first, again = tensors(folder), tensors(tmp_path / "again")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) and again[key].dtype == first[key].dtype for key in first)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    assert torch.equal(logits(reloaded(tmp_path / "again")), logits(reloaded(folder)))


def test_dequantized_and_saved_it_is_an_ordinary_folder(packed_folders, tmp_path):
    model = load(packed_folders("llama"), packed=False)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert torch.equal(logits(reloaded(tmp_path / "dense")), logits(model))


def test_in_another_dtype_it_is_unpacked_and_says_so(packed_folders, caplog):
    model = load(packed_folders("llama"))
    before = {name: linear.dense() for name, linear in compressed_linears(model)}
    say_unpacked.cache_clear()
    with caplog.at_level(logging.WARNING):
        model.to(torch.float32)
        found = logits(model)
    assert all(torch.equal(linear.dense(), before[name]) for name, linear in compressed_linears(model))
    (message,) = caplog.messages  # once for a whole process
    assert "int4_linear computes in torch.bfloat16" in message
    assert "in torch.float32 they are unpacked at each call" in message
    assert found.dtype == torch.float32
    assert torch.equal(found, logits(model.dequantize(torch.float32)))


def test_an_input_of_another_dtype_is_told_of(packed_folders, caplog):
    """Which no conversion of the model has announced."""
    linear = load(packed_folders("llama")).model.layers[0].self_attn.q_proj
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    say_unpacked.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [linear(x) for _ in range(2)]
        assert torch.equal(found[0], F.linear(x, linear.dense().float()))
        assert len(caplog.messages) == 1
        linear(x.bfloat16())
        linear(x.half())
    assert ["in torch.float16 they" in message for message in caplog.messages] == [False, True]


# what is never made, or not kept


class Made(TorchDispatchMode):
    """Shapes of all tensors of floats that operations return, on any device but meta."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and not result.is_meta:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("packed", [True, False])
def test_loading_makes_no_dense_weight(packed, packed_folders, monkeypatch):
    """Neither whole nor transposed; rows of it are made when it is unpacked on purpose."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees its own thread
    monkeypatch.setattr(operators, "PANEL", 8 * 96)
    monkeypatch.setattr(mlp, "agree", lambda before, after: False)  # it tries two tokens, on unpacked weights too
    folder = packed_folders("llama")
    with Made() as made:
        model = load(folder, packed=packed)
    modules = [module for module in model.model.layers.modules() if isinstance(module, PackedLinear | nn.Linear)]
    linears = {(module.out_features, module.in_features) for module in modules}
    dense = {shape for out, columns in linears for shape in ((out, columns), (columns, out))}
    assert len(linears) == 4
    assert bool(dense & made.shapes) is not packed


def test_weights_are_repacked_one_after_the_other(packed_folders, monkeypatch):
    """No more than one weight is there twice: what was stored goes before the next one is packed."""
    with stock_loading():
        model = AutoModelForCausalLM.from_pretrained(packed_folders("llama"), dtype="auto")
    left = []
    pack = operators.INT4.pack

    def counted(stored: Any, shape: Any) -> Any:
        left.append(sum(hasattr(module, "weight_packed") for module in model.modules()))
        return pack(stored, shape)

    counting = operators.Operator(*(counted if f == "pack" else getattr(operators.INT4, f) for f in FIELDS))
    monkeypatch.setitem(OPERATORS, "pack-quantized", counting)
    accelerate(model)
    assert left == list(range(14, 0, -1))


FIELDS = ("name", "weight", "floats", "refuses", "pack", "stored", "dense", "compute")


def test_packed_bytes(packed_folders):
    model = load(packed_folders("llama"))
    for _, linear in compressed_linears(model):
        tiles = -(-linear.in_features // 128)
        groups = linear.in_features // 32
        expected = linear.out_features * (tiles * 64 + groups * 2)
        assert sum(buffer.nbytes for buffer in linear.buffers()) == expected


# what stock transformers has loaded


@pytest.mark.skipif(not MAPS.exists(), reason="Linux says which files are mapped")
def test_no_file_stays_mapped(packed_folders):
    """The pages of the stored weights would stay in memory beside the repacked ones."""
    folder = packed_folders("llama")
    model = load(folder)
    gc.collect()
    assert str(folder) not in MAPS.read_text()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings


def test_accelerate_a_stock_model(packed_folders):
    folder = packed_folders("llama")
    with stock_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert not list(compressed_linears(model))
    done = llmcompress.accelerate(model)
    assert len(done.packed) == 14
    assert torch.equal(logits(model), logits(load(folder)))
    assert len(list(compressed_linears(model))) == 14


def test_hooks_are_not_lost(packed_folders):
    """What has them stays as it is, and is named."""
    with stock_loading():
        model = AutoModelForCausalLM.from_pretrained(packed_folders("llama"), dtype="auto").eval()
    seen: list[nn.Module] = []
    linear, mlp = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp
    linear.register_forward_pre_hook(lambda module, args: seen.append(module))
    mlp.register_forward_hook(lambda module, args, output: seen.append(module))
    done = accelerate(model)
    assert done.kept == {"model.layers.0.self_attn.q_proj": "it has hooks, which would be lost; set them after packing"}
    assert done.apart == {"model.layers.1.mlp": "it has hooks, which would be lost"}
    logits(model)
    assert seen == [linear, mlp]


def test_linears_of_other_libraries_are_named():
    """GPTQ's and AWQ's own, which transformers makes if their library is there."""
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("qweight", "qzeros", "scales"):
        model[0].register_buffer(name, torch.zeros(1, dtype=torch.int32))
    assert accelerate(model).kept == {"0": "another library's kernel has it; load the folder with llmcompress.load"}


def test_a_model_that_has_been_unpacked_stays(packed_folders):
    model = reloaded(packed_folders("llama"))
    before = logits(model)
    done = accelerate(model)
    assert not done.packed
    assert set(done.kept.values()) == {"a forward pass has unpacked it; load the folder again"}
    assert torch.equal(logits(model), before)


def test_a_dense_model_is_left_alone(tiny_folders):
    model = load(tiny_folders("llama"))
    assert not accelerate(model)
    assert not accelerated(model)


# what no operator takes


@pytest.mark.parametrize(
    ("groups", "dtype", "device", "why"),
    [
        (6, torch.bfloat16, "cpu", "6 scales for rows of 96"),
        (5, torch.bfloat16, "cpu", "5 scales for rows of 96"),
        (1, torch.bfloat16, "cpu", "one scale for each row"),
        (3, torch.float32, "cpu", "it is computed in float32, the kernels' dtypes are bfloat16 and float16"),
        (3, torch.bfloat16, "meta", "its tensors are offloaded"),
        (3, torch.float16, "cpu", None),
    ],
)
def test_what_int4_linear_refuses(groups, dtype, device, why):
    scale = torch.ones(8, groups, dtype=dtype, device=device)
    assert operators.INT4.refuses({"weight_scale": scale}, (8, 96)) == why


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits": 8}, "8 bits"),
        ({"group_size": "row"}, "one scale for each row"),
    ],
    ids=["8 bits", "row"],
)
def test_what_is_not_taken_is_computed_as_ever(options, why, packed_folders, caplog):
    folder = packed_folders("llama", **options)
    with caplog.at_level(logging.WARNING, "llmcompress"):
        model = load(folder)
    done = accelerated(model)
    assert not done.packed
    assert len(done.kept) == 14
    assert why in done.kept.values()
    assert [record.getMessage() for record in caplog.records if "llmcompress" in record.name] == [done.in_words()]
    assert why in done.in_words()
    assert torch.equal(logits(model), logits(reloaded(folder)))


def test_some_are_taken_and_some_are_not(tiny_folders, run_here):
    steps = [
        {"method": "rtn", "group_size": 32, "targets": ["*.mlp.*"]},
        {"method": "rtn", "bits": 8, "group_size": 32, "targets": ["*.self_attn.*"]},
    ]
    folder, _ = run_here("llama", *steps)
    model = load(folder)
    done = accelerated(model)
    assert all(".mlp." in name for name in done.packed)
    assert len(done.packed) == 6
    assert set(done.kept.values()) == {"8 bits"}
    assert len(done.kept) == 8
    assert error(logits(model), logits(reloaded(folder))) < 0.02
    assert not list(compressed_linears(model.dequantize()))
    assert torch.equal(logits(model), logits(reloaded(folder)))


def test_float32_is_computed_as_ever(packed_folders):
    model = load(packed_folders("llama"), dtype=torch.float32)
    assert set(accelerated(model).kept.values()) == {
        "it is computed in float32, the kernels' dtypes are bfloat16 and float16"
    }
    assert torch.equal(logits(model), logits(load(packed_folders("llama"), packed=False, dtype=torch.float32)))


def test_columns_in_another_order_are_not_taken(packed_folders):
    """Which today's compressed-tensors refuses to load."""
    with stock_loading():
        model = AutoModelForCausalLM.from_pretrained(packed_folders("llama"), dtype="auto")
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_scheme = SimpleNamespace(
                weights=SimpleNamespace(num_bits=4, actorder="group"),
                input_activations=None,
                output_activations=None,
                format="pack-quantized",
            )
    assert set(accelerate(model).kept.values()) == {"its columns are in an order of their own (actorder)"}


def test_quantized_activations_are_not_taken(copy):
    config = config_of(copy)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs
    (copy / "config.json").write_text(json.dumps(config))
    model = load(copy)
    assert set(accelerated(model).kept.values()) == {"its activations are quantized too"}


# files that are not what config.json says


@pytest.mark.parametrize(
    ("ending", "make", "words"),
    [
        ("q_proj.weight_packed", lambda t: t[:, :-1], r"shape \[96, 11\], the model expects \[96, 12\]"),
        ("down_proj.weight_packed", lambda t: t[:-8], r"shape \[88, 20\], the model expects \[96, 20\]"),
        ("q_proj.weight_scale", lambda t: t[:, :-1], r"shape \[96, 2\], the model expects \[96, 3\]"),
        ("q_proj.weight_scale", None, "is not in the files"),
        ("q_proj.weight_packed", None, "is not in the files"),
        ("q_proj.weight_shape", lambda t: t + 8, r"weight_shape says \[104, 104\], the model expects \[96, 96\]"),
        ("norm.weight", lambda t: t[:1], r"shape \[1\], the model expects \[96\]"),
    ],
)
def test_files_of_other_sizes_are_refused(ending, make, words, copy):
    name = change_tensor(copy, ending, make)
    with pytest.raises(FormatError, match=words) as caught:
        load(copy)
    assert name.rpartition(".weight")[0] in str(caught.value)


@pytest.mark.parametrize("weights", [{"group_size": 16}, {"num_bits": 8}, {"symmetric": False}], ids=str)
def test_another_config_is_refused(weights, copy):
    change_config(copy, **weights)
    with pytest.raises(FormatError, match=r"_proj.weight_(packed|scale|zero_point): .*of this config.json"):
        load(copy)


def test_a_stock_model_with_wrong_tensors_is_refused(packed_folders):
    with stock_loading():
        model = AutoModelForCausalLM.from_pretrained(packed_folders("llama"), dtype="auto")
    linear = model.model.layers[1].mlp.up_proj
    linear.weight_packed = nn.Parameter(linear.weight_packed[:, :-1].clone(), requires_grad=False)
    with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj: its packed tensors contradict each other"):
        accelerate(model)


# gated MLPs


def gated_reference(x: Tensor, gate: Any, up: Any, activation: str, *biases: Tensor | None) -> Tensor:
    """What `int4_gated_mlp` computes, by two calls."""
    functions = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
    both = zip((gate, up), biases, strict=True)
    one, two = (llmcompress_kernels.int4_linear(x, *weight, bias).float() for weight, bias in both)
    return (functions[activation](one) * two).to(x.dtype)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An operator from its reference; what it was called for."""
    calls: list[str] = []

    def counted(x: Tensor, gate: Any, up: Any, activation: str, *biases: Tensor | None) -> Tensor:
        calls.append(activation)
        return gated_reference(x, gate, up, activation, *biases)

    monkeypatch.setattr(mlp, "int4_gated_mlp", counted)
    return calls


@pytest.mark.parametrize(
    ("kind", "activation"), [("llama", "silu"), pytest.param("gemma2", "gelu_tanh", marks=pytest.mark.slow)]
)
def test_gated_mlps_are_one_call(kind, activation, gated, packed_folders):
    folder = packed_folders(kind)
    model = load(folder)
    assert accelerated(model).fused == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert gated == [activation]  # one try for both
    packed = logits(model)
    assert gated == [activation] * 3
    dense = model.dequantize()
    unpacked, calls = logits(dense), len(gated)
    assert len(gated) == calls == 3  # what has been unpacked is computed as in any MLP
    truth = logits(dense.float())
    assert error(packed, truth) <= 2 * error(unpacked, truth)


def test_biases_go_with_it(gated, tiny_folders, tmp_path, text):
    from conftest import write_tiny
    from tiny_runs import proof_inside, recipe

    from llmcompress.run import run

    source = write_tiny(tmp_path / "dense", "llama", mlp_bias=True)
    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        run(recipe(source, text, {"method": "rtn", "group_size": 32}), tmp_path / "packed")
    model = load(tmp_path / "packed")
    assert len(accelerated(model).fused) == 2
    packed, dense = logits(model), model.dequantize()
    unpacked = logits(dense)
    truth = logits(dense.float())
    assert error(packed, truth) <= 2 * error(unpacked, truth)


def test_a_fused_model_is_saved_as_it_was(gated, packed_folders, tmp_path):
    folder = packed_folders("llama")
    load(folder).save_pretrained(tmp_path / "again")
    first, again = tensors(folder), tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", ["phi3", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_other_mlps_are_left_alone(kind, gated, packed_folders):
    done = accelerated(load(packed_folders(kind)))
    joined = {f"model.layers.{i}.mlp": "gate and up are one linear already" for i in range(2)}
    assert (done.fused, done.apart) == ([], joined if kind == "phi3" else {})  # neither has a gate by itself


def test_an_mlp_that_computes_something_else_is_left_alone(packed_folders, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "agree", lambda before, after: False)
        model = load(packed_folders("llama"))
    done = accelerated(model)
    why = "LlamaMLP computes something else than a gated MLP"
    assert (done.fused, done.apart) == ([], {"model.layers.0.mlp": why, "model.layers.1.mlp": why})
    assert f"gated but not fused: model.layers.0.mlp and 1 more ({why})" in done.in_words()
    first, second = (layer.mlp for layer in model.model.layers)
    first.down_proj.register_forward_hook(lambda module, args, output: output * 1.25)
    scaled = first.forward
    first.forward = lambda x: scaled(x) * 0.75
    assert fuse_gated(model) == done.apart  # both are of one class, and the first one tried does not agree
    assert not isinstance(second, GatedMLP)


def test_why_an_mlp_is_not_fused(packed_folders):
    model, other = load(packed_folders("llama")), load(packed_folders("llama", symmetric=False))
    gate, up, down = (getattr(model.model.layers[0].mlp, f"{part}_proj") for part in ("gate", "up", "down"))
    assert unlike(gate, up) is None
    assert unlike(gate, down) == "gate_proj is [160, 96] and up_proj [96, 160]"
    assert unlike(gate, other.model.layers[0].mlp.up_proj) == "one of gate_proj and up_proj has zero points"
    assert unlike(gate, nn.Linear(96, 160)) == "one of gate_proj and up_proj is not packed"
    halved = load(packed_folders("llama"), dtype=torch.float16).model.layers[0].mlp.up_proj
    assert unlike(gate, halved) == "gate_proj and up_proj differ in their groups or in the dtype of their scales"


def test_an_mlp_of_another_activation_has_a_reason(tiny_folders, tmp_path, text):
    from conftest import write_tiny
    from tiny_runs import proof_inside, recipe

    from llmcompress.run import run

    source = write_tiny(tmp_path / "dense", "llama", hidden_act="relu")
    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        run(recipe(source, text, {"method": "rtn", "group_size": 32}), tmp_path / "packed")
    done = accelerated(load(tmp_path / "packed"))
    assert set(done.apart.values()) == {"its activation is none of silu, gelu, gelu_tanh"}
    assert len(done.apart) == 2


@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
def test_a_part_that_is_replaced_is_computed_by_itself(part, gated, packed_folders):
    model = load(packed_folders("llama"))
    expected, calls = logits(model), len(gated)
    fused = model.model.layers[0].mlp
    packed = getattr(fused, part)
    setattr(fused, part, plain_linear(packed.dense(), packed.bias))
    assert error(logits(model), expected) < 0.02
    assert len(gated) == calls + 1  # that of the other block


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), None),
        (lambda a, b: a, None),
    ],
)
def test_activations_are_known_by_their_values(function, name):
    assert activation_of(function) == name


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_real_operator(kind, packed_folders):
    model = load(packed_folders(kind))
    assert len(accelerated(model).fused) == 2
    packed, dense = logits(model), model.dequantize()
    unpacked = logits(dense)
    truth = logits(dense.float())
    assert error(packed, truth) <= 2 * error(unpacked, truth)
