"""Adapters beside packed weights: as good as peft beside unpacked ones, a whole adapter or none of it, never lost."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import logits, reloaded
from torch import Tensor

from llmcompress.adapter import CONFIG, FOLDER, WEIGHTS, parameter_name
from llmcompress.errors import FormatError
from llmcompress.runtime import LoraLinear, accelerated, compressed_linears, load

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
Make = Callable[..., Path]


def error(found: Tensor, truth: Tensor) -> float:
    """Relative RMS."""
    return float((found.float() - truth.float()).norm() / truth.float().norm())


@pytest.fixture
def made(packed_folders: Any, tmp_path: Path) -> Make:
    """A packed folder with an adapter of peft's form, of random matrices."""
    from peft import LoraConfig

    def make(kind: str = "llama", targets: list[str] = ATTENTION + MLP, rank: int = 4, **settings: Any) -> Path:
        options = {name: settings.pop(name) for name in ("bits", "symmetric") if name in settings}
        folder = shutil.copytree(packed_folders(kind, **options), tmp_path / kind)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **settings)
        config.save_pretrained(folder / FOLDER)
        generator = torch.Generator().manual_seed(0)
        matrices = {}
        for name, module in reloaded(folder).named_modules():
            if name.rpartition(".")[2] in targets:
                a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
                b = torch.randn(module.out_features, rank, generator=generator) * 0.1 / rank**0.5
                matrices |= {parameter_name(name, "lora_A"): a.bfloat16(), parameter_name(name, "lora_B"): b.bfloat16()}
        save_file(matrices, folder / FOLDER / WEIGHTS, {"format": "pt"})
        return folder

    return make


def with_peft(folder: Path) -> Any:
    """The unpacked model, whose updates peft computes."""
    model = load(folder, packed=False)
    assert not list(compressed_linears(model))
    return model


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("qwen2", {"symmetric": False, "use_rslora": True})])
def test_as_good_as_peft_beside_unpacked_weights(kind, options, made, packed_folders):
    folder = made(kind, **options)
    model, dense = load(folder), with_peft(folder)
    done = accelerated(model)
    assert set(done.packed.values()) == {"int4_lora_linear"}
    assert (len(done.packed), len(done.kept)) == (14, 0)
    assert all(type(linear) is LoraLinear for _, linear in compressed_linears(model))
    packed, unpacked, truth = logits(model), logits(dense), logits(dense.float())
    assert error(packed, truth) <= 2 * error(unpacked, truth)
    without = load(packed_folders(kind, **{k: v for k, v in options.items() if k == "symmetric"}))
    assert error(logits(without), truth) > 0.1  # so what is computed is the adapter too


def test_some_linears_have_updates_and_their_mlps_are_two_calls(made):
    folder = made(targets=["q_proj", "up_proj"])
    model = load(folder)
    done = accelerated(model)
    assert sorted(name for name, found in done.packed.items() if found == "int4_lora_linear") == [
        f"model.layers.{layer}.{module}" for layer in (0, 1) for module in ("mlp.up_proj", "self_attn.q_proj")
    ]
    assert done.fused == []
    assert set(done.apart.values()) == {"an adapter has updates for it"}
    assert "14 linears packed (int4_linear, int4_lora_linear)" in done.in_words()
    dense = with_peft(folder)
    unpacked, truth = logits(dense), logits(dense.float())
    assert error(logits(model), truth) <= 2 * error(unpacked, truth)


def test_mlps_without_updates_stay_fused(made):
    done = accelerated(load(made(targets=ATTENTION)))
    assert len(done.fused) == 2
    assert not done.apart


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits": 8}, "q_proj: 8 bits"),
        ({"rank": 65}, "its rank is 65, the operator takes up to 64"),
        ({"use_dora": True}, "adapter_config.json says use_dora: True"),
        ({"alpha_pattern": {"q_proj": 3}}, "adapter_config.json says alpha_pattern: {'q_proj': 3}"),
        ({"bias": "lora_only"}, "adapter_config.json says bias: 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "adapter_config.json says init_lora_weights: 'pissa'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_left_to_peft(options, why, made, caplog, monkeypatch):
    monkeypatch.setattr("llmcompress.runtime.lora.attach", lambda model, adapter: model)
    folder = made(targets=["q_proj"], **options)
    with caplog.at_level(logging.WARNING, "llmcompress.runtime.lora"):
        model = load(folder)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "llmcompress.runtime.lora"]
    assert message.startswith(f"{folder / FOLDER} is left to peft, for which all weights are unpacked: ")
    assert why in message
    assert not list(compressed_linears(model))


def test_what_is_left_to_peft_is_computed_by_it(made):
    folder = made(rank=65)
    assert torch.equal(logits(load(folder)), logits(with_peft(folder)))


def change(folder: Path, make: Callable[[dict[str, Tensor], str, str], dict[str, Tensor]]) -> None:
    """Change the matrices of an adapter; make: of these and the names of two that belong together."""
    path = folder / FOLDER / WEIGHTS
    names = (parameter_name("model.layers.1.self_attn.q_proj", matrix) for matrix in ("lora_A", "lora_B"))
    save_file(make(load_file(path), *names), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t, a, b: t | {a: t[a][:, :-1].contiguous()}, r"lora_A is \[4, 95\] .*expected \[4, 96\] and \[96, 4\]"),
        (lambda t, a, b: t | {a: t[a][:-1], b: t[b][:, :-1].contiguous()}, r"lora_A is \[3, 96\] and lora_B \[96, 3\]"),
        (lambda t, a, b: t | {b: t[b][0].clone()}, r"lora_B \[4\], expected"),
        (lambda t, a, b: t | {b: t[b] * math.nan}, "other things than finite numbers"),
        (lambda t, a, b: {name: tensor for name, tensor in t.items() if name != b}, "has lora_A alone"),
        (lambda t, a, b: {name.replace("s.1.", "s.7."): tensor for name, tensor in t.items()}, r"layers.7.*of another"),
    ],
    ids=["columns", "rank", "vector", "nan", "alone", "no such module"],
)
def test_damaged_adapters_are_refused(make, message, made):
    folder = made(targets=["q_proj"])
    change(folder, make)
    with pytest.raises(FormatError, match=message) as caught:
        load(folder)
    assert str(folder / FOLDER) in str(caught.value)


def test_damaged_settings_are_refused(made):
    folder = made(targets=["q_proj"])
    for text in ("{", json.dumps({"peft_type": "LORA", "r": 0, "lora_alpha": 8}), '{"r": "4"}'):
        (folder / FOLDER / CONFIG).write_text(text)
        with pytest.raises(FormatError, match=r"adapter_config\.json: r is"):
            load(folder)


def test_other_tensors_are_left_to_peft(made, caplog, monkeypatch):
    monkeypatch.setattr("llmcompress.runtime.lora.attach", lambda model, adapter: model)
    folder = made(targets=["q_proj"])
    change(folder, lambda t, a, b: t | {"base_model.model.model.norm.weight": torch.ones(96)})
    with caplog.at_level(logging.WARNING, "llmcompress.runtime.lora"):
        load(folder)
    assert "model.norm.weight, which is no update of a linear" in caplog.text


def test_it_is_not_saved_without_its_adapter(made, tmp_path, caplog):
    model = load(made())
    expected = logits(model)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    assert "would leave the updates of its adapter out" in caplog.text
    merged = model.dequantize()
    assert not list(compressed_linears(merged))
    assert error(logits(merged), expected) < 0.03  # weights and updates are rounded together now
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded(tmp_path / "merged")), logits(merged))


def test_another_dtype_is_computed_with_the_merged_weight(made):
    linear = load(made(targets=["q_proj"])).model.layers[0].self_attn.q_proj
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.dense().float()))
    assert error(linear(x.bfloat16()), linear(x)) < 0.02
    assert "rank=4" in repr(linear)


@pytest.mark.slow
def test_what_was_learned_beside_a_quantized_model_runs_packed(run_here):
    learn = {"train": "recover", "parameters": "lora", "rank": 4, "steps": 4, "batch": 4, "learning_rate": 1e-2}
    learn |= {"warmup": 1, "precision": "float32"}
    folder, _ = run_here("llama", {"method": "rtn", "group_size": 32}, learn)
    model, dense = load(folder), with_peft(folder)
    assert set(accelerated(model).packed.values()) == {"int4_lora_linear"}
    unpacked, truth = logits(dense), logits(dense.float())
    assert error(logits(model), truth) <= 2 * error(unpacked, truth)
