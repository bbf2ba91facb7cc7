"""Tiny random models of many architectures, and a tiny tokenizer; everything offline."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# The same examples at every run, so that a commit does not fail for another's luck. To look for new ones:
# python -m pytest --hypothesis-profile=explore
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("fixed")

if not any(map(shutil.which, ("g++", "clang++", "c++"))):
    os.environ["LLMCOMPRESS_CPU_EXTENSION"] = "0"  # a missing compiler is a warning, and warnings are errors here

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GQA = {"num_key_value_heads": 2, "intermediate_size": 160, "head_dim": 16}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SIZES | GQA | {"tie_word_embeddings": True},
    "mistral": SIZES | GQA | {"sliding_window": 16},
    "qwen2": SIZES | GQA,
    "qwen3": SIZES | GQA | {"head_dim": 32},
    "phi3": SIZES | GQA,
    "gemma2": SIZES | GQA | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": SIZES | GQA | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gpt2": SIZES,
    "gpt_neox": SIZES | {"intermediate_size": 160},
    "opt": SIZES | {"ffn_dim": 160, "word_embed_proj_dim": 96},
}

# From recipe to folder these are as another one: llama with a window, and two whose norms gemma3 has too.
ALIKE = {"mistral", "qwen3", "gemma2"}


def some_slow(kinds: Iterable[str]) -> list[Any]:
    """The kinds as parameters of a test that takes long for each; those that are alike are marked slow."""
    return [pytest.param(kind, marks=pytest.mark.slow) if kind in ALIKE else kind for kind in kinds]


def tiny_config(kind: str, **changes: Any) -> Any:
    """Config of a tiny model: 96 wide, 6 query heads, 2 KV heads (3 query heads per group) where the kind has them."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **(ARCHITECTURES[kind] | changes))


def tiny_model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model, with weights large enough that logits differ between tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer cut down to the 128 ASCII characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {chr(c): c for c in range(3, 128)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_tiny(folder: Path, kind: str, **changes: Any) -> Path:
    """Save a tiny model and its tokenizer as a stock folder."""
    tiny_model(kind, **changes).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Nobody waits for the disk: without syncing, files are lost by a power cut, but not by a kill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a tiny model by architecture, written once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_tiny(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def packed_folders(tiny_folders: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pack-quantized` folder of a tiny model, by architecture and options of `rtn`; each is made once."""
    from tiny_runs import proof_inside, recipe

    from llmcompress.run import run

    made: dict[tuple[Any, ...], Path] = {}

    def get(kind: str, **options: Any) -> Path:
        step = {"method": "rtn", "group_size": 32, "symmetric": True} | options
        key = (kind, *sorted(step.items()))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
                made[key] = tmp_path_factory.mktemp("packed") / kind
                run(recipe(tiny_folders(kind), text, step), made[key])
        return made[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for the tiny tokenizer."""
    from tiny_runs import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def run_here(tiny_folders: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Folder and results of a run of some steps on a tiny model (or that in a folder), proved in this process."""
    from tiny_runs import proof_inside, recipe

    from llmcompress.run import run

    def go(kind: str, *steps: dict[str, Any], **more: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        with proof_inside(monkeypatch):
            model = tiny_folders(kind) if kind in ARCHITECTURES else Path(kind)
            return folder, run(recipe(model, text, *steps, **more), folder)

    return go
