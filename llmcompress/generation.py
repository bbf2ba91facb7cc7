"""A folder's model, and text from it token by token, as transformers' `generate` makes it; its clock is the streamer.

With `compiled`, the cache has its full size from the start and torch compiles the step that makes one token. What
Python costs for each of its many small operations is then paid once, which is most of the time of a small model.
"""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmcompress.errors import RecipeError, SourceError
from llmcompress.quiet import quiet
from llmcompress.runtime import load

LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)  # raised for unusable folders


class Clock:
    """A streamer that notes when each token came; the first is there when the prompt has been read."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self._prompt = True

    def put(self, tokens: Tensor) -> None:
        """transformers calls this with the prompt, and then with every token."""
        if self._prompt:
            self._prompt = False
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """After the last token."""

    @property
    def steps(self) -> list[float]:
        """Seconds: reading the prompt and making the first token, then each further token."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def load_to_generate(folder: Path, *, packed: bool, dtype: str, device: str, trust_remote_code: bool) -> Any:
    """The model of a local folder, ready to generate.

    dtype: "auto" for the checkpoint's, or a name.  device: "auto" takes the GPU if there is one.
    Raises SourceError if transformers cannot load the folder, FormatError if it is damaged.
    """
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code, "dtype": dtype}
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with quiet():
            model = load(folder, packed=packed, **options)
            return model.to(place)
    except LOADING as exc:
        raise SourceError(f"{folder}: transformers cannot load this folder: {exc}") from exc


def generate(
    model: Any, tokens: Tensor, new: int, *, compiled: bool = False, streamer: Any = None, **options: Any
) -> Tensor:
    """tokens [1, length] int64 -> [1, length + at most new]; greedy unless options of transformers say otherwise.

    Raises RecipeError if prompt and new tokens together are more than the model has positions.
    """
    from transformers import CompileConfig

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and tokens.shape[1] + new > longest:
        raise RecipeError(
            f"prompt of {tokens.shape[1]} tokens and {new} new ones: the model has {longest} positions; ask for fewer"
        )
    if compiled:
        compiling = CompileConfig(mode="reduce-overhead" if model.device.type == "cuda" else "default")
        compiling._compile_all_devices = True  # type: ignore[assignment]  # a CPU too
        options |= {"cache_implementation": "static", "compile_config": compiling}
    made: Tensor = model.generate(
        tokens.to(model.device),
        attention_mask=torch.ones_like(tokens, device=model.device),
        max_new_tokens=new,
        streamer=streamer,
        **{"do_sample": False} | options,
    )
    return made


def prompt_tokens(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """[1, length] int64. Raises RecipeError if there is nothing to start from or no chat template."""
    if chat and not tokenizer.chat_template:
        raise RecipeError("--chat: this model's tokenizer has no chat template; leave --chat out")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"].long()
    if tokens.shape[1] == 0:
        raise RecipeError("PROMPT: is empty, and this model's tokenizer begins a text with no token; give it a word")
    return tokens


def tokenizer_of(folder: Path, *, trust_remote_code: bool) -> Any:
    """Raises SourceError if the folder has none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except LOADING as exc:
        raise SourceError(f"{folder}: transformers cannot load its tokenizer: {exc}") from exc
