"""Runs of tiny models: text, recipes, and a proof of loading that stays in this process.

Proving starts an interpreter that imports transformers, which takes seconds. `proof_inside` runs the very same script
(`llmcompress/reload.py`) here, so weights and logits are compared after a stock reload in every run; tests of whole
runs leave it out.
"""

import hashlib
import io
import json
import os
import runpy
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress import proof, reload
from llmcompress.arch import discover, skeleton
from llmcompress.recipe import Recipe, parse_recipe
from llmcompress.stream import StreamedModel


def write_text(path: Path, characters: int = 6000) -> Path:
    """ASCII text for the tiny tokenizer, one token per character, all of them in use."""
    path.write_text("".join(chr(3 + (i * i * 7 + i // 5) % 120) for i in range(characters)))
    return path


def write_hollow(folder: Path) -> Path:
    """A folder of Llama-3-8B's shape: 16 GB of tensors that are a hole in the file."""
    return write_shape(
        folder, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip


def write_shape(folder: Path, **sizes: Any) -> Path:
    """A folder of a Llama of any shape, whose tensors are a hole in the file."""
    from conftest import tiny_config

    config = tiny_config("llama", architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(folder)
    width, inner = config.hidden_size, config.intermediate_size
    rows = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    shapes = {"model.embed_tokens": [config.vocab_size, width], "model.norm": [width]}
    shapes |= {} if config.tie_word_embeddings else {"lm_head": [config.vocab_size, width]}
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{name}_proj": [heads * config.head_dim, width] for name, heads in rows.items()}
        shapes |= {f"{block}.self_attn.o_proj": [width, rows["q"] * config.head_dim]}
        shapes |= {f"{block}.mlp.{name}_proj": [inner, width] for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj": [width, inner]}
        shapes |= {f"{block}.input_layernorm": [width], f"{block}.post_attention_layernorm": [width]}
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 2 * torch.Size(shape).numel()
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + start)
    return folder


def values(model: Path, text: Path, *steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Plain values of a recipe; AWQ in groups of 32 if no steps are given. `more` replaces or adds top-level keys."""
    return {
        "model": str(model),
        "calibration": {"data": str(text), "samples": 4, "length": 32},
        "steps": list(steps) or [{"method": "awq", "group_size": 32}],
    } | more


def recipe(model: Path, text: Path, *steps: dict[str, Any], **more: Any) -> Recipe:
    """A recipe from `values`."""
    return parse_recipe(values(model, text, *steps, **more))


@contextmanager
def stock_loading() -> Iterator[None]:
    """transformers' own way with packed folders for a while, which `llmcompress.runtime` changes for the process."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)
        yield


@contextmanager
def proof_inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prove in this process for a while; all of `prove` but the new interpreter is real."""

    def here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        script = command.index(str(Path(reload.__file__)))
        stdout = io.StringIO()
        patching, no_gradients = monkeypatch.context(), torch.no_grad()  # it switches gradients off
        with patching as patch, redirect_stdout(stdout), no_gradients, stock_loading():
            patch.setattr(sys, "argv", command[script:])
            runpy.run_path(command[script], run_name="__main__")
        found = json.loads(stdout.getvalue()) | {"imported_llmcompress": False}
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    with monkeypatch.context() as patch:
        patch.setattr(proof, "subprocess", SimpleNamespace(run=here))
        yield


def reloaded(folder: Path, **options: Any) -> Any:
    """The folder as any user loads it; packed weights are unpacked by the first forward pass."""
    from transformers import AutoModelForCausalLM

    with stock_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, **options).eval()
    logits(model)
    return model


def logits(model: Any, length: int = 24) -> Tensor:
    """Logits [1, length, vocabulary] on fixed tokens."""
    tokens = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def digests(folder: Path) -> dict[str, str]:
    """sha256 of config.json, of every safetensors file, and of the adapter if there is one."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("adapter/*"))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def die_at(moments: list[dict[str, str]], whole: str, recipe_values: dict[str, Any]) -> None:
    """A run into `whole`, then for each moment {"folder", "side", "file"} one that dies by SIGKILL in a child process.

    Every file that a run finishes is renamed to its name; a child dies before or after the rename that makes `file`.
    The first run has imported everything, so that children need not. Called in an interpreter with one thread
    (`run_die_at`), since threads do not survive a fork.
    """
    from llmcompress.run import run

    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        run(parse_recipe(recipe_values), Path(whole))
        for moment in moments:
            child = os.fork()
            if child == 0:
                for function in ("rename", "replace"):
                    patch.setattr(Path, function, dying(getattr(Path, function), moment["side"], moment["file"]))
                run(parse_recipe(recipe_values), Path(moment["folder"]))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), f"{moment}: ended with {status} instead of being killed"


def dying(rename: Any, side: str, file: str) -> Any:
    """A `Path.rename` that kills this process before or after it made `file`."""

    def method(self: Path, target: Path) -> Path:
        if Path(target).name == file and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result: Path = rename(self, target)
        if Path(target).name == file:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return method


@cache
def interpreter_with_one_thread() -> ProcessPoolExecutor:
    """Another interpreter, the same one for all tests: it takes longer to import everything than to run and die."""
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        executor.submit(int).result()  # starts it
    return executor


def run_die_at(moments: list[dict[str, str]], whole: Path, recipe_values: dict[str, Any]) -> None:
    """`die_at` in the other interpreter."""
    interpreter_with_one_thread().submit(die_at, moments, str(whole), recipe_values).result()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every stored tensor of a folder."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def streamed(model: Any) -> StreamedModel:
    """A float32 stream of a model that is in memory."""
    shell = skeleton(model.config, torch.float32)
    parameters = dict(model.named_parameters())

    def read(names: Any) -> dict[str, torch.Tensor]:
        return {name: parameters[name].detach().clone() for name in names}

    return StreamedModel(shell, discover(shell), read, dtype=torch.float32, device=torch.device("cpu"))
