"""A GGUF file of a real shape with random weights, as `llama-quantize` would make Q4_0 of such a model.

Linears are Q4_0. The table of tokens that is the head too, or else the head, is Q6_K, or Q8_0 where rows are no
multiple of 256; a table beside a head is Q4_0. There is no tokenizer: tokens are numbers. One tensor is in memory at a
time.
"""

from pathlib import Path
from typing import Any

from random_model import SEED, config_of, product, shards

DEVIATION = 0.02  # of the weights
BLOCKS = {  # bytes of a block, where in it its float16 scale is, and the deviation of what the scale is multiplied with
    "Q4_0": (32, 18, 0, 4.6),
    "Q8_0": (32, 34, 0, 74.0),
    "Q6_K": (256, 210, 208, 18.5 * 74.0),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_q4_0_model(path: Path, shape: dict[str, Any]) -> None:
    """shape: of random_model.py."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, shape)
    tensors = {name: size for shard in shards(shape) for name, size in shard.items()}
    kinds = {name: kind_of(name, size, tied=shape["tie_word_embeddings"]) for name, size in tensors.items()}
    for name, size in tensors.items():
        dtype, stored = (numpy.float32, size) if kinds[name] == "F32" else (numpy.uint8, byte_shape(kinds[name], size))
        bytes_each = numpy.dtype(dtype).itemsize
        kind = gguf.GGMLQuantizationType[kinds[name]]
        writer.add_tensor_info(gguf_name(name), stored, numpy.dtype(dtype), bytes_each * product(stored), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = numpy.random.default_rng(SEED)
    for name, size in tensors.items():
        ones = kinds[name] == "F32"
        writer.write_tensor_data(
            numpy.ones(size, numpy.float32) if ones else random_blocks(kinds[name], size, generator)
        )
    writer.close()


def add_metadata(writer: Any, shape: dict[str, Any]) -> None:
    config = config_of(shape)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        number, _, part = module.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{NAMES[part]}.weight"
    return f"{NAMES[module]}.weight"


def kind_of(name: str, size: list[int], *, tied: bool) -> str:
    """The type of a tensor."""
    if len(size) == 1:
        return "F32"
    is_head = name.startswith("model.embed_tokens" if tied else "lm_head")
    return "Q4_0" if not is_head else "Q6_K" if size[1] % BLOCKS["Q6_K"][0] == 0 else "Q8_0"


def byte_shape(kind: str, size: list[int]) -> list[int]:
    """[out, bytes of a row]."""
    weights, stored, *_ = BLOCKS[kind]
    return [size[0], size[1] // weights * stored]


def random_blocks(kind: str, size: list[int], generator: Any) -> Any:
    """uint8 [out, bytes of a row]: random codes, and scales that make weights of about DEVIATION."""
    import numpy

    weights, stored, place, deviation = BLOCKS[kind]
    rows, columns = byte_shape(kind, size)
    blocks = generator.integers(0, 256, (rows, size[1] // weights, stored), dtype=numpy.uint8)
    scale = numpy.array([DEVIATION / deviation], dtype=numpy.float16).view(numpy.uint8)
    blocks[:, :, place : place + 2] = scale
    return blocks.reshape(rows, columns)
