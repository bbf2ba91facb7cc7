"""Models of a real shape with random weights, written shard by shard, and a tokenizer trained on random words."""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tinyllama-1.1b": {
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
SEED = 0
CHUNK = 1 << 24  # weights drawn at once: 64 MiB in float32


def block_shapes(shape: dict[str, Any], prefix: str) -> dict[str, list[int]]:
    """Names and shapes of one decoder block."""
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        f"{prefix}.input_layernorm.weight": [hidden],
        f"{prefix}.self_attn.q_proj.weight": [hidden, hidden],
        f"{prefix}.self_attn.k_proj.weight": [keys, hidden],
        f"{prefix}.self_attn.v_proj.weight": [keys, hidden],
        f"{prefix}.self_attn.o_proj.weight": [hidden, hidden],
        f"{prefix}.post_attention_layernorm.weight": [hidden],
        f"{prefix}.mlp.gate_proj.weight": [middle, hidden],
        f"{prefix}.mlp.up_proj.weight": [middle, hidden],
        f"{prefix}.mlp.down_proj.weight": [hidden, middle],
    }


def shards(shape: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Tensors of each file: embedding, one file per block, and the end."""
    table = [shape["vocab_size"], shape["hidden_size"]]
    head = {} if shape["tie_word_embeddings"] else {"lm_head.weight": table}
    blocks = [block_shapes(shape, f"model.layers.{index}") for index in range(shape["num_hidden_layers"])]
    return [{"model.embed_tokens.weight": table}, *blocks, {"model.norm.weight": [shape["hidden_size"]], **head}]


def model_bytes(shape: dict[str, Any]) -> int:
    return sum(2 * product(size) for shard in shards(shape) for size in shard.values())


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """config.json, shards and their index, with one chunk of weights in memory at a time."""
    import torch

    folder.mkdir()
    generator = torch.Generator().manual_seed(SEED)
    files = shards(shape)
    where = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_shard(folder / name, tensors, generator)
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": model_bytes(shape)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1))


def config_of(shape: dict[str, Any]) -> dict[str, Any]:
    return shape | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_int4_model(folder: Path, shape: dict[str, Any], group: int) -> None:
    """A `pack-quantized` folder with random codes in groups of `group` columns; a block at a time is in memory."""
    import torch
    from safetensors.torch import save_file

    from llmcompress.formats import PackQuantized
    from llmcompress.weight import Kind

    folder.mkdir()
    generator = torch.Generator().manual_seed(SEED)
    files = shards(shape)
    where, kinds = {}, {}
    for number, sizes in enumerate(files, 1):
        name, tensors = f"model-{number:05d}-of-{len(files):05d}.safetensors", {}
        for tensor, size in sizes.items():
            if "_proj.weight" in tensor:
                module = tensor.removesuffix(".weight")
                kinds[module] = Kind(4, group, True)
                tensors |= {f"{module}.{leaf}": t for leaf, t in int4_tensors(size, group, generator).items()}
            else:
                values = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.02
                tensors[tensor] = values.bfloat16()
        save_file(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    quantization = PackQuantized().config(kinds, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config_of(shape) | {"quantization_config": quantization}, indent=1))


def int4_tensors(size: list[int], group: int, generator: Any) -> dict[str, Any]:
    """Random codes, with scales that make weights of about normal(0, 0.02)."""
    import torch

    out, columns = size
    words = torch.randint(-(2**31), 2**31, (out, columns // 8), generator=generator, dtype=torch.int64)
    return {
        "weight_packed": words.int(),
        "weight_scale": torch.full((out, columns // group), 0.02 / 4.6).bfloat16(),
        "weight_shape": torch.tensor(size),
    }


def write_shard(path: Path, tensors: dict[str, list[int]], generator: Any) -> None:
    """One safetensors file: 8 bytes with the length of the header, the header as JSON, then the raw tensors."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 2 * product(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned to 8 bytes
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            for chunk in weights(shape, generator):
                out.write(chunk)


def weights(shape: list[int], generator: Any) -> Iterator[bytes]:
    """Little-endian bfloat16 bytes of one tensor, in order: ones for a norm, else normal(0, 0.02)."""
    import torch

    left = product(shape)
    while left:
        count = min(left, CHUNK)
        values = torch.ones(count)
        if len(shape) > 1:
            values.normal_(0, 0.02, generator=generator)
        yield values.bfloat16().view(torch.int16).numpy().tobytes()
        left -= count


def product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def write_text(path: Path, tokens: int) -> None:
    """Random words, one token each at least, with some to spare: enough text for `tokens` tokens of any tokenizer."""
    draw = random.Random(SEED)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(2000)]
    sentences = (" ".join(draw.choices(words, k=20)) + "." for _ in range(tokens // 10 + 100))
    path.write_text("\n".join(sentences) + "\n")


def write_tokenizer(folder: Path, text: Path) -> None:
    """A byte-level BPE of 1024 entries: all that matters is that its ids are within the model's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|end|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end).save_pretrained(
        folder
    )
