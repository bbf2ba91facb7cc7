"""Folders in the layouts of GPTQ and AWQ tools, read without their libraries; made here of `pack-quantized` ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress_kernels.int4_linear.layout import from_words, to_words
from safetensors.torch import load_file, save_file
from tiny_runs import logits, reloaded
from torch import Tensor

from llmcompress.errors import FormatError
from llmcompress.runtime import accelerated, load
from llmcompress.runtime.native import one_more

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this one of eight outputs
GROUP = 32
Linear = tuple[Tensor, Tensor, Tensor]  # codes [out, in], scales [out, groups], zeros [out, groups]


def test_one_more_than_fifteen_is_zero_and_leaves_the_next_zero_point_alone():
    codes = torch.cartesian_prod(*[torch.arange(16, dtype=torch.uint8)] * 2).repeat(1, 4)  # [256, 8], all neighbours
    assert torch.equal(from_words(one_more(to_words(codes)), 8), (codes + 1) % 16)


def linear_of(tensors: dict[str, Tensor], module: str) -> Linear:
    """A stored linear, unpacked to its codes."""
    scale = tensors[f"{module}.weight_scale"]
    out, columns = tensors[f"{module}.weight_shape"].tolist()
    codes = from_words(tensors[f"{module}.weight_packed"], columns)
    point = tensors.get(f"{module}.weight_zero_point")
    zeros = torch.full(scale.shape, 8, dtype=torch.uint8) if point is None else from_words(point.T.contiguous(), out).T
    return codes, scale, zeros


def gptq(linear: Linear, *, less: int = 1) -> dict[str, Tensor]:
    """Words along the columns; zeros one less in the first version of the format."""
    codes, scale, zeros = linear
    return {
        "qweight": to_words(codes).T.contiguous(),
        "qzeros": to_words(zeros.T.contiguous()) - less * 0x11111111,
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP,
    }


def act_order(linear: Linear) -> dict[str, Tensor]:
    """The same with groups of columns that lie anywhere: columns are permuted, and so must be the values."""
    tensors = gptq(linear)
    order = torch.randperm(linear[0].shape[1], generator=torch.Generator().manual_seed(0))
    tensors["g_idx"] = tensors["g_idx"][order].contiguous()
    return tensors


def awq(linear: Linear) -> dict[str, Tensor]:
    """Words along the outputs, in an order of their own."""
    codes, scale, zeros = linear
    return {"qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T), "scales": scale.T.contiguous()}


def awq_words(codes: Tensor) -> Tensor:
    """uint8 [n, m] -> int32 [n, m / 8]."""
    return to_words(codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER].flatten(1).contiguous())


LAYOUTS: dict[str, tuple[Callable[[Linear], dict[str, Tensor]], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "gptq_v2": (
        lambda linear: gptq(linear, less=0),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "act-order": (act_order, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
}


@pytest.fixture
def native(packed_folders: Any, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A `pack-quantized` folder and the same weights in another layout."""

    def make(layout: str, kind: str = "llama", *, symmetric: bool = True) -> tuple[Path, Path]:
        source = packed_folders(kind, symmetric=symmetric)
        folder = tmp_path / layout
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        convert, config = LAYOUTS[layout]
        stored = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()}
        modules = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
        tensors = {name: t for name, t in stored.items() if ".weight_" not in name}
        for module in modules:
            new = convert(linear_of(stored, module))
            tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in new.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        values = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
        (folder / "config.json").write_text(json.dumps(values))
        return source, folder

    return make


@pytest.mark.parametrize(
    ("layout", "kind", "symmetric"),
    [
        ("gptq", "qwen2", False),  # which has biases
        ("awq", "qwen2", False),
        ("gptq_v2", "llama", True),
        pytest.param("gptq", "llama", True, marks=pytest.mark.slow),
        pytest.param("gptq_v2", "qwen2", False, marks=pytest.mark.slow),
        pytest.param("awq", "llama", True, marks=pytest.mark.slow),
    ],
)
def test_same_weights_same_logits(layout, kind, symmetric, native):
    source, folder = native(layout, kind, symmetric=symmetric)
    model, expected = load(folder), load(source)
    assert len(accelerated(model).packed) == 14
    assert not accelerated(model).kept
    assert not any(tensor.requires_grad for tensor in model.buffers())  # or else a graph holds the file's scales
    assert torch.equal(logits(model), logits(expected))
    for name in accelerated(model).packed:
        linear, other = model.get_submodule(name), expected.get_submodule(name)
        assert torch.equal(linear.dense(), other.dense())
        assert (linear.zero is None) is symmetric


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_unpacked(layout, native):
    source, folder = native(layout, "qwen2", symmetric=False)
    assert torch.equal(logits(load(folder, packed=False)), logits(reloaded(source)))
    in_float32 = load(folder, dtype=torch.float32)
    assert not accelerated(in_float32).packed
    assert torch.equal(logits(in_float32), logits(load(source, packed=False, dtype=torch.float32)))


def test_act_order_is_unpacked_with_the_group_of_each_column(native):
    source, folder = native("act-order", "qwen2", symmetric=False)
    model = load(folder)
    assert set(accelerated(model).kept.values()) == {"its columns are in an order of their own (act-order)"}
    stored = load_file(folder / "model.safetensors")
    before = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()}
    name = "model.layers.1.mlp.down_proj"
    codes, scale, zeros = linear_of(before, name)
    group = stored[f"{name}.g_idx"].long()
    expected = (codes.to(scale.dtype) - zeros[:, group].to(scale.dtype)) * scale[:, group]
    assert torch.equal(model.get_submodule(name).weight, expected)


def test_it_cannot_be_saved_packed(native, tmp_path):
    _, folder = native("gptq")
    model = load(folder)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    expected = logits(model.dequantize())
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(reloaded(tmp_path / "dense")), expected)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [("gptq", {"bits": 8}), ("gptq", {"checkpoint_format": "marlin"}), ("awq", {"version": "gemv"})],
    ids=str,
)
def test_other_layouts_stay_with_their_libraries(layout, changes, native):
    _, folder = native(layout)
    change_config(folder, **changes)
    with pytest.raises(ImportError, match=r"optimum|gptqmodel"):
        load(folder)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("ending", "make", "words"),
    [
        ("q_proj.qweight", lambda t: t[:-1], r"q_proj.qweight: shape \[11, 96\], the model expects \[12, 96\]"),
        ("q_proj.qzeros", lambda t: t[:-1], r"q_proj.qzeros: shape \[2, 12\], the model expects \[3, 12\]"),
        ("q_proj.scales", lambda t: t[:0], "0 groups of scales for a linear"),
        ("q_proj.qzeros", None, "q_proj.qzeros: is not in the files"),
        ("q_proj.qweight", None, "q_proj.scales: scales of something that is no linear"),
    ],
)
def test_files_of_other_sizes_are_refused(ending, make, words, native):
    _, folder = native("gptq")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(ending))
    changed = {name: make(tensors[name]).contiguous()} if make else {}
    del tensors[name]
    save_file(tensors | changed, path, {"format": "pt"})
    with pytest.raises(FormatError, match=words):
        load(folder)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@pytest.mark.parametrize(("size", "groups"), [(64, 3), (-1, 1)])
def test_groups_of_another_size_than_config_json_says_are_refused(layout, size, groups, native):
    _, folder = native(layout)
    change_config(folder, group_size=size)
    with pytest.raises(FormatError, match=rf"5 groups of scales for 160 columns, expected {groups} by config.json"):
        load(folder)


def test_a_packed_name_that_is_no_linear(native):
    _, folder = native("awq")
    path = folder / "model.safetensors"
    tensors = {name.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"): t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"layers.7.mlp.up_proj: is packed in the files, and no linear"):
        load(folder)
