"""A model that does not exist yet: a config of the catalog, a tokenizer trained on a listed text, random weights.

Names and shapes follow from the config, so it can be planned before it is made. It is made once, into the cache, by
`ModelSource.fetch`; the tokenizer is a byte-level BPE, which has a token for every byte and so knows any text.
"""

import hashlib
import importlib.metadata
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.cached import cached_folder
from llmcompress.catalog import ListedModel, NewModel
from llmcompress.errors import SourceError
from llmcompress.safetensors_file import TensorInfo
from llmcompress.source import ModelSource, packaged_file
from llmcompress.text import DataSource, load_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"  # between documents; the first token
DECIDING = ("torch", "transformers", "tokenizers")  # packages whose version can change what is made


def open_new(name: str, listed: ListedModel) -> ModelSource:
    """A model that may still have to be made. Raises SourceError if the text for its tokenizer is not installed."""
    assert listed.new is not None
    packaged_file(listed.file, SourceError)
    parts = [listed.new.config, listed.new.data, listed.new.seed, listed.file.requirement]
    parts += [importlib.metadata.version(package) for package in DECIDING]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    tensors = {
        tensor: TensorInfo(tensor, shape, "F32", "model.safetensors", 4 * prod(shape))
        for tensor, shape in llama_shapes(listed.new.config).items()
    }
    folder = cached_folder("new", fingerprint)
    return ModelSource(
        name=name, hub_id=listed.hub_id, revision=None, fingerprint=fingerprint, config=dict(listed.new.config),
        license=listed.license, tensors=tensors, local=True, folder=folder if folder.is_dir() else None, new=listed.new,
    )  # fmt: skip


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor of a Llama with tied embeddings."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, shared = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "mlp.down_proj": (width, inner),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "post_attention_layernorm": (width,),
        "self_attn.k_proj": (shared, width),
        "self_attn.o_proj": (width, query),
        "self_attn.q_proj": (query, width),
        "self_attn.v_proj": (shared, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (width,)}


def write_new(new: NewModel, folder: Path) -> None:
    """Make the model into `folder`: config, tokenizer, and random weights by its seed in float32."""
    from transformers import AutoConfig

    from llmcompress.arch import random_model
    from llmcompress.checkpoint import write_tensors

    train_tokenizer(new).save_pretrained(folder)
    model = random_model(AutoConfig.for_model(**new.config), new.seed)
    write_tensors(folder / "model.safetensors", dict(model.named_parameters()))
    (folder / "config.json").write_text(json.dumps(new.config, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(new: NewModel) -> "PreTrainedTokenizerBase":
    """A byte-level BPE of the vocabulary that the config names, trained on the rows of the text.

    Raises SourceError if the text has too few different pairs for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    wanted = new.config["vocab_size"]
    core: Any = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(load_text(DataSource.parse({"data": new.data}, "data")).rows, trainer)
    if core.get_vocab_size() != wanted:
        raise SourceError(
            f"{new.data}: this text gives a tokenizer of {core.get_vocab_size()} tokens, {wanted} were asked for; use "
            "a smaller `vocab_size`"
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END)
