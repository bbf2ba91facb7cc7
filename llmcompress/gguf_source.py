"""A GGUF file as a Hugging Face checkpoint: config and tensor list at once, weights when they are converted.

Three things differ from a Hugging Face checkpoint and are undone here:
- names: `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`;
- dimensions are listed fastest first;
- in `llama` files, the rows of the query and key projections of each head are interleaved for rotary embedding.

Only architectures that the table below describes completely are accepted: a tensor or setting that is not understood
is an error, because a model that is read almost right compresses into one that is wrong.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmcompress.errors import SourceError
from llmcompress.gguf_header import GGUFTensor, LongArray, read_gguf_header

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]  # bytes done, bytes in all

CHUNK = 4_000_000  # elements dequantized at a time: bounds memory at about 100 MB


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a GGUF architecture is called in transformers, and which tensors its blocks have beyond the common ones."""

    class_name: str
    interleaved: bool = False  # rows of q and k are interleaved for rotary embedding
    extra: tuple[str, ...] = ()  # tensors of a block that must be there
    optional: tuple[str, ...] = ()  # all of them or none


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        interleaved=True,
        optional=("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", extra=("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    "qwen3": Architecture("Qwen3ForCausalLM", extra=("attn_q_norm.weight", "attn_k_norm.weight")),
}

MODULES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
COMMON = tuple(f"{name}.weight" for name in MODULES if name not in ("attn_q_norm", "attn_k_norm"))


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file, translated: what a Hugging Face checkpoint of the same model would say."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    config: dict[str, Any]  # config.json
    tensors: dict[str, GGUFTensor] = field(repr=False)  # by Hugging Face name, in the order of the file
    data_start: int  # bytes of header

    @property
    def license(self) -> str | None:
        """Licence as the file states it, usually an SPDX name."""
        value = self.metadata.get("general.license")
        return value if isinstance(value, str) else None


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file and say it in Hugging Face terms; no weights are read.

    Raises SourceError for a damaged file, an unknown architecture, or a tensor or setting that is not understood.
    """
    header = read_gguf_header(path)
    config, names = _translate(path, header.metadata, header.tensors)
    tensors = {names[tensor.name]: tensor for tensor in header.tensors.values()}
    return GGUFFile(path, header.metadata, config, tensors, header.data_start)


def _translate(
    path: Path, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]
) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json and the Hugging Face name of every tensor, after checking that nothing is missing or left over."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise SourceError(
            f"{path}: GGUF architecture {name!r} is not read directly (known: {', '.join(ARCHITECTURES)}); load it "
            "with transformers (from_pretrained(folder, gguf_file=...)), save_pretrained it and give that folder"
        )
    _refuse_unknown_settings(path, name, metadata)
    config = _config(path, name, metadata, tensors)
    shapes, names = _expected(ARCHITECTURES[name], config, biased=bool(config.get("attention_bias")))
    for tensor in tensors.values():
        if tensor.name not in shapes:
            hint = " (rescaled rotary positions)" if tensor.name.startswith("rope_") else ""
            raise SourceError(
                f"{path}: tensor {tensor.name!r}{hint} is not part of a plain {name} model; "
                "give the model's safetensors folder instead"
            )
        if tensor.shape != shapes[tensor.name]:
            raise SourceError(
                f"{path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the metadata says "
                f"{list(shapes[tensor.name])}; the file is damaged, or not a plain {name} model"
            )
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise SourceError(f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}; convert the model anew")
    return config, names


def _refuse_unknown_settings(path: Path, arch: str, metadata: dict[str, Any]) -> None:
    """Settings that would change what the model computes and that the config below does not carry."""
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    window, context = metadata.get(f"{arch}.attention.sliding_window", 0), metadata.get(f"{arch}.context_length")
    problem = None
    if scaling != "none" or f"{arch}.rope.scale_linear" in metadata:
        problem = f"rotary scaling {scaling!r}"
    elif metadata.get(f"{arch}.expert_count"):
        problem = f"{metadata[f'{arch}.expert_count']} experts"
    elif window not in (0, context):
        problem = f"attention in windows of {window} tokens"
    if problem:
        raise SourceError(f"{path}: {problem} is not read from GGUF; give the model's safetensors folder instead")


@dataclass(frozen=True, slots=True)
class _Settings:
    """The metadata below the architecture's name, where a model's sizes are."""

    path: Path
    arch: str
    metadata: dict[str, Any]

    def count(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if type(value) is not int or value <= 0:
            raise self.error(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float32, rounded to the decimals that were meant: 1e-05, not 9.99999975e-06."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if type(value) is not float or not 0 < value < inf:
            raise self.error(key, value, "a positive number")
        return float(f"{value:.7g}")

    def error(self, key: str, found: Any, expected: str) -> SourceError:
        return SourceError(
            f"{self.path}: metadata {self.arch}.{key} is {found!r}, expected {expected}; convert the model anew"
        )


def _config(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]) -> dict[str, Any]:
    """config.json of the model."""
    settings = _Settings(path, arch, metadata)
    read = settings.count
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = tokens.length if isinstance(tokens, LongArray) else len(tokens) if isinstance(tokens, list) else 0
    heads, hidden = read("attention.head_count"), read("embedding_length")
    head_dim = read("attention.key_length", hidden // heads)
    if read("rope.dimension_count", head_dim) != head_dim:
        raise SourceError(f"{path}: rotary embedding of a part of each head is not read from GGUF; give safetensors")
    blocks = read("block_count")
    if blocks > len(tensors):
        raise SourceError(f"{path}: {len(tensors)} tensors cannot make up {blocks} blocks; the file is damaged")
    theta = settings.number("rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch].class_name],
        "model_type": arch,
        "vocab_size": read("vocab_size", vocab),
        "hidden_size": hidden,
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": read("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": read("context_length"),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,  # read by older libraries; rope_parameters by newer ones
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
        **_special_tokens(metadata),
    }
    if ARCHITECTURES[arch].optional:
        config["attention_bias"] = f"blk.0.{ARCHITECTURES[arch].optional[0]}" in tensors
    return config


def _special_tokens(metadata: dict[str, Any]) -> dict[str, int]:
    """bos, eos and pad token ids, those that the file names."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()}
    return {key: value for key, value in ids.items() if type(value) is int}


def _expected(
    arch: Architecture, config: dict[str, Any], *, biased: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape, and Hugging Face name, of every tensor that a model with this config has, by GGUF name."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    vocab = (config["vocab_size"], hidden)
    weights: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q_norm": (head,), "attn_k_norm": (head,),
        "attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden), "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": vocab, "output_norm.weight": (hidden,)}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"], names["output.weight"] = vocab, "lm_head.weight"
    for block in range(config["num_hidden_layers"]):
        for tensor in (*COMMON, *arch.extra, *(arch.optional if biased else ())):
            module, part = tensor.split(".")
            shapes[f"blk.{block}.{tensor}"] = weights[module] if part == "weight" else weights[module][:1]
            names[f"blk.{block}.{tensor}"] = f"model.layers.{block}.{MODULES[module]}.{part}"
    return shapes, names


def write_checkpoint(source: GGUFFile, folder: Path, progress: Progress | None = None) -> None:
    """Write the model into `folder`: model.safetensors in float32, config, generation config and tokenizer.

    Holds about 100 MB at a time, whatever the size of the model, plus the tokenizer.
    Raises SourceError if the tokenizer cannot be built, OSError if the disk is full.
    """
    special = _special_tokens(source.metadata)
    (folder / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    _build_tokenizer(source).save_pretrained(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    done = end = 0
    for name, tensor in source.tensors.items():
        start, end = end, end + 4 * prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out, source.path.open("rb") as data:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in source.tensors.values():
            done += _copy(tensor, source, data, out)
            if progress:
                progress(done, end)


def _copy(tensor: GGUFTensor, source: GGUFFile, data: BinaryIO, out: BinaryIO) -> int:
    """Dequantize one tensor to float32, a few rows at a time; returns the bytes written."""
    rows, columns = prod(tensor.shape[:-1]), tensor.shape[-1]
    head = source.config["head_dim"]
    interleaved = ARCHITECTURES[source.config["model_type"]].interleaved
    shuffled = interleaved and tensor.name.split(".")[-2] in ("attn_q", "attn_k")
    if shuffled and len(tensor.shape) == 1:
        rows, columns = columns, 1  # a bias: its elements are what the rows are in a weight
    unit = head if shuffled else 1
    step = max(1, CHUNK // (columns * unit)) * unit
    data.seek(tensor.start)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = _dequantize(data.read(tensor.size * count // rows), tensor.kind, count)  # [count, columns]
        if shuffled:  # rows of a head are stored as (pair, half); restore (half, pair)
            values = values.reshape(-1, head // 2, 2, columns).swapaxes(1, 2)
        out.write(values.astype("<f4", order="C", copy=False).tobytes())
    return rows * columns * 4


def _dequantize(raw: bytes, kind: int, rows: int) -> "np.ndarray":
    """`rows` rows of quantized blocks -> float32 [rows, columns]."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(np.frombuffer(raw, dtype=np.uint8).reshape(rows, -1), GGMLQuantizationType(kind))


def _build_tokenizer(source: GGUFFile) -> "PreTrainedTokenizerBase":
    """The tokenizer that the file describes, chat template included.

    transformers builds it; two things that it leaves out are added, so that text becomes the same tokens as with the
    original tokenizer: SmolLM's split into single digits, and the begin token that the file asks for.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    except Exception as exc:  # tokenizers raises bare Exception for a vocabulary that it cannot use
        raise SourceError(
            f"{source.path}: transformers cannot build its tokenizer ({exc}); give the model's safetensors folder"
        ) from exc
    tokenizer.model_max_length = source.config["max_position_embeddings"]
    backend = tokenizer.backend_tokenizer
    if source.metadata.get("tokenizer.ggml.pre") == "smollm":
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    bos, asked = tokenizer.bos_token, source.metadata.get("tokenizer.ggml.add_bos_token")
    if asked and bos and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        backend.post_processor = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer
