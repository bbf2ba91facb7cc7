"""Reads GGUF files: the config and the tensor list at once, the weights only when they are converted.

A GGUF file is a header (metadata, then one entry per tensor) followed by aligned data. The metadata holds the whole
vocabulary, which is why general readers take seconds and hundreds of megabytes. This reader walks over the big arrays
without keeping them, and checks every count, length and offset against the size of the file before it believes it.

Three things differ from a Hugging Face checkpoint and are undone here:
- names: `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`;
- dimensions are listed fastest first;
- in `llama` files, the rows of the query and key projections of each head are interleaved for rotary embedding.

Only architectures that the table below describes completely are accepted: a tensor or setting that is not understood
is an error, because a model that is read almost right compresses into one that is wrong.
"""

import json
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmcompress.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]  # bytes done, bytes in all

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
KEPT_ARRAY = 64                        # longer arrays (vocabulary, merges, scores) are counted, not kept
CHUNK = 4_000_000                      # elements dequantized at a time: bounds memory at about 100 MB

BLOCKS = {                             # ggml type: name, elements per block, bytes per block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a GGUF architecture is called in transformers, and which tensors its blocks have beyond the common ones."""

    class_name: str
    interleaved: bool = False                              # rows of q and k are interleaved for rotary embedding
    extra: tuple[str, ...] = ()                            # tensors of a block that must be there
    optional: tuple[str, ...] = ()                         # all of them or none


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


@dataclass(frozen=True, slots=True)
class LongArray:
    """Stands for a metadata array that was walked over."""

    length: int


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of the file; `shape` slowest dimension first, as torch counts."""

    name: str
    shape: tuple[int, ...]
    kind: int                          # ggml type, a key of BLOCKS
    start: int                         # absolute position in the file
    size: int                          # bytes in the file


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file, translated: what a Hugging Face checkpoint of the same model would say."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    config: dict[str, Any]             # config.json
    tensors: dict[str, GGUFTensor] = field(repr=False)  # by Hugging Face name, in the order of the file
    data_start: int                    # bytes of header

    @property
    def license(self) -> str | None:
        """Licence as the file states it, usually an SPDX name."""
        value = self.metadata.get("general.license")
        return value if isinstance(value, str) else None


class _Cursor:
    """A position in the header; every step is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def error(self, what: str) -> SourceError:
        return SourceError(f"{self.path}: not a usable GGUF file: {what}; download it again or convert the model anew")

    def skip(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise self.error(f"the header runs past the end of the file ({len(self.data)} bytes)")
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))[0]

    def count(self, what: str, at_least: int) -> int:
        """A 64-bit count of things that take `at_least` bytes each, so that a lie cannot make us loop or allocate."""
        value = self.number("<Q")
        if value * at_least > len(self.data) - self.at:
            raise self.error(f"{value} {what} do not fit into {len(self.data)} bytes")
        return int(value)

    def text(self) -> str:
        size = self.count("bytes of text", 1)
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise self.error(f"text at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise self.error(f"unknown type {kind} of a metadata value at byte {self.at}")
        return self.number(SCALARS[kind])

    def array(self) -> Any:
        kind = self.number("<I")
        if kind != STRING and kind not in SCALARS:
            raise self.error(f"unknown type {kind} of array elements at byte {self.at}")
        size = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        length = self.count("array elements", size)
        if length <= KEPT_ARRAY:
            return [self.value(kind) for _ in range(length)]
        if kind == STRING:
            for _ in range(length):
                self.skip(self.count("bytes of text", 1))
        else:
            self.skip(length * size)
        return LongArray(length)


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file (version 2 or 3, little endian); no weights are read.

    Raises SourceError for a damaged file, an unknown architecture, or a tensor or setting that is not understood.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, path)
            metadata, table = _read_header(cursor)
            tensors, start = _locate(cursor, table, metadata.get("general.alignment", 32))
    except (OSError, ValueError) as exc:  # mmap refuses an empty file with ValueError
        raise SourceError(f"{path}: cannot read this file: {exc}") from None
    config, names = _translate(path, metadata, tensors)
    return GGUFFile(path, metadata, config, {names[t.name]: t for t in tensors.values()}, start)


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], list[tuple[str, list[int], int, int]]]:
    """Metadata, and per tensor its name, dimensions (slowest first), ggml type and offset within the data."""
    if cursor.data[: cursor.skip(4) + 4] != b"GGUF":
        raise cursor.error("it does not begin with 'GGUF'")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise cursor.error(f"version {version}, known are 2 and 3, little endian")
    tensor_count, pair_count = cursor.count("tensors", 24), cursor.count("metadata entries", 13)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    table = []
    for _ in range(tensor_count):
        name, rank = cursor.text(), cursor.number("<I")
        if not 1 <= rank <= 4:
            raise cursor.error(f"tensor {name!r} has {rank} dimensions")
        dims = [cursor.number("<Q") for _ in range(rank)]
        table.append((name, dims[::-1], cursor.number("<I"), cursor.number("<Q")))
    return metadata, table


def _locate(
    cursor: _Cursor, table: list[tuple[str, list[int], int, int]], alignment: Any
) -> tuple[dict[str, GGUFTensor], int]:
    """Absolute positions and sizes of the tensors, checked against the file and each other; and where data begins."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"alignment {alignment!r} is not a power of two")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    end, previous = base, ""
    for name, dims, kind, offset in sorted(table, key=lambda entry: entry[3]):
        if kind not in BLOCKS:
            known = ", ".join(label for label, _, _ in BLOCKS.values())
            raise cursor.error(f"tensor {name!r} is stored as ggml type {kind}; known are {known}")
        _, elements, size = BLOCKS[kind]
        if 0 in dims or dims[-1] % elements:
            raise cursor.error(f"tensor {name!r} of shape {dims} does not divide into blocks of {elements}")
        tensor = GGUFTensor(name, tuple(dims), kind, base + offset, prod(dims) // elements * size)
        if name in tensors or tensor.start < end:
            raise cursor.error(f"tensor {name!r} appears twice or overlaps {previous!r}")
        end, previous = tensor.start + tensor.size, name
        if end > len(cursor.data):
            raise cursor.error(f"tensor {name!r} ends at byte {end}, the file at {len(cursor.data)} (truncated?)")
        tensors[name] = tensor
    return tensors, base


def _translate(
    path: Path, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]
) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json and the Hugging Face name of every tensor, after checking that nothing is missing or left over."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise SourceError(
            f"{path}: GGUF architecture {name!r} is not read directly (known: {', '.join(ARCHITECTURES)}); load it with "
            "transformers (from_pretrained(folder, gguf_file=...)), save_pretrained it and give that folder"
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


def _config(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]) -> dict[str, Any]:
    """config.json of the model; float32 numbers are rounded to the decimals that were meant (1e-05, not 9.99e-06)."""

    def read(key: str, default: Any = None, kind: type = int) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if type(value) is not kind or value <= 0:
            raise SourceError(f"{path}: metadata {arch}.{key} is {value!r}, expected a positive {kind.__name__}")
        return float(f"{value:.7g}") if kind is float else value

    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = tokens.length if isinstance(tokens, LongArray) else len(tokens or ())
    heads, hidden = read("attention.head_count"), read("embedding_length")
    head_dim = read("attention.key_length", hidden // heads)
    if read("rope.dimension_count", head_dim) != head_dim:
        raise SourceError(f"{path}: rotary embedding of a part of each head is not read from GGUF; give safetensors")
    blocks = read("block_count")
    if blocks > len(tensors):
        raise SourceError(f"{path}: {len(tensors)} tensors cannot make up {blocks} blocks; the file is damaged")
    theta = read("rope.freq_base", 10000.0, float)
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
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": theta,           # read by older libraries; rope_parameters by newer ones
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
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in source.tensors.items():
        start, end = end, end + 4 * prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}  # type: ignore[dict-item]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done = 0
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
        rows, columns = columns, 1     # a bias: its elements are what the rows are in a weight
    unit = head if shuffled else 1
    step = max(1, CHUNK // (columns * unit)) * unit
    data.seek(tensor.start)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = _dequantize(data.read(tensor.size * count // rows), tensor.kind, count)  # [count, columns]
        if shuffled:                   # rows of a head are stored as (pair, half); restore (half, pair)
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
        raise SourceError(f"{source.path}: transformers cannot build the tokenizer: {exc}; give a safetensors folder") from exc
    tokenizer.model_max_length = source.config["max_position_embeddings"]
    backend = tokenizer.backend_tokenizer
    if source.metadata.get("tokenizer.ggml.pre") == "smollm":
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    bos = tokenizer.bos_token
    if source.metadata.get("tokenizer.ggml.add_bos_token") and bos and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        backend.post_processor = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer
