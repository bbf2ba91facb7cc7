"""`generate` and `bench`: text and numbers of packed models, on the command line and compiled."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompress_kernels import from_sparse24, from_sparse24_int4
from rich.text import Text
from sparse24_cases import stored_sparse24, stored_sparse24_int4
from test_native import native  # noqa: F401  # a fixture
from test_runtime import RECIPES
from test_runtime_lora import made as with_adapter  # noqa: F401  # a fixture
from torch import Tensor

from llmcompress import bench, speed
from llmcompress.cli import main
from llmcompress.errors import FormatError, RecipeError, SourceError
from llmcompress.generation import Clock, generate, load_to_generate
from llmcompress.runtime import GatedMLP, LoraLinear, PackedLinear, compressed_linears, load
from llmcompress.runtime.table import OPERATORS
from llmcompress.speed import Case
from llmcompress.tables import bench_table

Result = tuple[int, str, str]
PROMPT = torch.tensor([[3, 40, 50, 60]])


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Exit code, stdout and stderr of a command, in this process."""

    def get(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return int(stop.value.code or 0), *capfd.readouterr()

    return get


def case(folder: Path, **changes: Any) -> Case:
    return Case(**{"folder": str(folder), "packed": True, "prompt": 8, "new": 4, "device": "cpu"} | changes)


# generate


def test_generate_prints_the_text_and_nothing_else(packed_folders, call):
    folder = packed_folders("llama")
    code, out, err = call("generate", folder, "abc", "--new", 6, "--device", "cpu")
    assert code == 0
    assert "14 linears packed (int4_linear)" in err
    again = call("generate", folder, "abc", "--new", 6, "--device", "cpu")[1]
    assert out == again
    assert 0 < len(out.rstrip("\n")) <= 6  # a token is a character, and some are not shown


def test_generate_makes_what_the_model_does(packed_folders, call):
    from transformers import AutoTokenizer

    folder = packed_folders("qwen2", symmetric=False)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    tokens = tokenizer("xyz", return_tensors="pt")["input_ids"]
    made = model.generate(tokens, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(tokens))
    text = tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
    assert call("generate", folder, "xyz", "--new", 5, "--device", "cpu")[1].rstrip("\n") == text.rstrip("\n")


def test_generate_samples_with_a_seed(packed_folders, call):
    def sampled(seed: int) -> str:
        options = ("--new", 12, "--temperature", 5, "--seed", seed, "--device", "cpu")
        return call("generate", packed_folders("qwen2", symmetric=False), "xyz", *options)[1]

    first = sampled(1)
    assert first == sampled(1)
    assert first != sampled(2)


def test_generate_unpacked(packed_folders, call):
    code, _, err = call("generate", packed_folders("llama"), "abc", "--new", 2, "--dense", "--device", "cpu")
    assert code == 0
    assert "packed" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["abc", "--new", "200"], "the model has 128 positions"),
        (["", "--new", "2"], "PROMPT: is empty"),
        (["abc", "--chat"], "no chat template"),
    ],
)
def test_generate_says_what_is_wrong(arguments, words, packed_folders, call):
    code, out, err = call("generate", packed_folders("llama"), *arguments, "--device", "cpu")
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_folders_that_cannot_be_loaded(packed_folders, tmp_path, call):
    code, _, err = call("generate", tmp_path / "nowhere", "abc")
    assert code == 2
    assert "nowhere" in err
    folder = shutil.copytree(packed_folders("llama"), tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    code, _, err = call("generate", folder, "abc")
    assert code == 2
    assert "cannot load its tokenizer" in err
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=path.name):
        load_to_generate(folder, packed=True, dtype="auto", device="cpu", trust_remote_code=False)
    (folder / "config.json").write_text('{"model_type": "none"}')
    with pytest.raises(SourceError, match="transformers cannot load this folder"):
        load_to_generate(folder, packed=True, dtype="auto", device="cpu", trust_remote_code=False)


def test_a_clock_has_a_time_for_each_token(packed_folders):
    clock = Clock()
    made = generate(load(packed_folders("qwen2", symmetric=False)), PROMPT, 5, streamer=clock, min_new_tokens=5)
    assert made.shape == (1, 9)
    assert len(clock.steps) == 5
    assert all(step > 0 for step in clock.steps)


def test_longer_than_the_model(packed_folders):
    with pytest.raises(RecipeError, match="prompt of 4 tokens and 125 new ones"):
        generate(load(packed_folders("qwen2", symmetric=False)), PROMPT, 125)


# bench


def test_one_side(packed_folders):
    found = speed.measure(case(packed_folders("llama")))
    model = load(packed_folders("llama"))
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    assert found.weight_bytes == found.read_bytes == weights  # its embedding is the head
    assert found.linears.startswith("14 linears packed (int4_linear)")
    assert min(found.prefill_seconds, found.decode_seconds, found.load_seconds, found.libraries_bytes) > 0
    assert found.threads == torch.get_num_threads()


def test_an_embedding_is_read_by_the_row(packed_folders):
    folder = packed_folders("qwen2", symmetric=False)
    found = speed.measure(case(folder, packed=False))
    assert found.weight_bytes - found.read_bytes == 127 * 96 * 2
    assert found.linears == "0 linears packed"


@pytest.mark.slow
def test_peak_is_not_that_of_the_parent():
    """Which the resource module would give to a process that has just been started."""
    ballast = torch.ones(100 * 2**20, dtype=torch.uint8)
    code = "from llmcompress.speed import peak, resident; print(resident(), peak())"
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    resident, peak = map(int, done.stdout.split())
    assert resident <= peak < resident + ballast.nbytes // 2


def test_bench_prints_both_sides(packed_folders, call, monkeypatch):
    """Measured in this process, which has the libraries."""
    sides: list[Case] = []

    def here(side: Case) -> dict[str, Any]:
        sides.append(side)
        return asdict(speed.measure(side)) | {"resident_bytes": 10, "peak_bytes": 20}  # of this process it says nothing

    monkeypatch.setattr(bench, "measured", here)
    folder = packed_folders("llama")
    code, out, err = call("bench", folder, "--prompt", 8, "--new", 4, "--rounds", 2, "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [side.packed for side in sides] == [True, False] * 2
    assert found["measured"].keys() == {"packed", "dense"}
    assert found["ratios"].keys() == {"prefill", "decode", "resident", "peak", "read"}
    assert found["ratios"]["read"] < 0.75  # most of so small a model is its embedding
    packed, dense = found["measured"]["packed"], found["measured"]["dense"]
    assert found["ratios"]["decode"] == pytest.approx(dense["decode_seconds"] / packed["decode_seconds"])
    assert found["machine"]["torch"] == torch.__version__
    table = bench_table(found)
    assert list(table.columns[0].cells)[:2] == [Text("prefill, 8 tokens"), Text("decode, 4 tokens")]
    assert "14 linears packed" in packed["linears"]


def test_bench_beside_a_dense_folder_compiled(packed_folders, tiny_folders, call, monkeypatch):
    """Measured in this process, with steps that are not compiled; that they were to be is noted."""
    asked: list[tuple[int, bool]] = []

    def eager(model: Any, tokens: Tensor, new: int, *, compiled: bool, **options: Any) -> Tensor:
        asked.append((new, compiled))
        return generate(model, tokens, new, **options)

    def here(side: Case) -> dict[str, Any]:
        return asdict(speed.measure(side)) | {"resident_bytes": 10, "peak_bytes": 20}

    monkeypatch.setattr(speed, "generate", eager)
    monkeypatch.setattr(bench, "measured", here)
    folder, base = packed_folders("llama"), tiny_folders("llama")
    options = ("--prompt", 8, "--new", 4, "--rounds", 1, "--device", "cpu", "--compile", "--json")
    code, out, err = call("bench", folder, "--base", base, *options)
    assert (code, err) == (0, "")
    assert asked == [(4, True)] * 4  # each side generates twice, first to compile what is measured
    found = json.loads(out)
    sides = {name: (side["folder"], side["packed"], side["compiled"]) for name, side in found["sides"].items()}
    assert sides == {"packed": (str(folder), True, True), "dense": (str(base), False, True)}
    assert found["measured"]["packed"]["linears"].startswith("14 linears packed")
    assert found["measured"]["dense"]["linears"] == "0 linears packed"


def test_ratios_and_medians(tmp_path):
    rows = [
        {"prefill_seconds": s, "decode_seconds": s / 10, "resident_bytes": 5, "peak_bytes": 8, "read_bytes": 4}
        for s in (3.0, 1.0, 2.0)
    ]
    packed = bench.summary(rows, case(tmp_path, prompt=100))
    assert packed["prefill_tokens_per_second"] == 50
    assert packed["decode_tokens_per_second"] == 5
    dense = packed | {"prefill_tokens_per_second": 100, "resident_bytes": 10, "decode_tokens_per_second": 2.5}
    assert bench.ratios(packed, dense) == {"prefill": 0.5, "decode": 2, "resident": 0.5, "peak": 1, "read": 1}


@pytest.mark.slow
def test_bench_in_processes_of_its_own(packed_folders, tmp_path, call):
    folder = packed_folders("llama")
    code, out, err = call("bench", folder, "--prompt", 8, "--new", 4, "--rounds", 1, "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["measured"]["packed"]["linears"].startswith("14 linears packed")
    assert found["measured"]["dense"]["linears"] == "0 linears packed"
    spoilt = shutil.copytree(folder, tmp_path / "copy")
    path = sorted(spoilt.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = call("bench", spoilt, "--prompt", 8, "--new", 4, "--rounds", 1, "--device", "cpu")
    assert (code, out) == (2, "")
    assert path.name in err
    assert "Traceback" not in err


# compiled


@pytest.mark.slow
def test_a_packed_model_is_one_graph(packed_folders):
    model = load(packed_folders("llama"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


def test_packed_modules_are_one_graph(packed_folders):
    """A fused MLP whose last linear has an update, and the linears on 2:4 weights."""
    mlp = load(packed_folders("llama")).model.layers[0].mlp
    assert isinstance(mlp, GatedMLP)
    generator, shape = torch.Generator().manual_seed(0), (96, 96)
    a, b = (torch.randn(*size, generator=generator).bfloat16() for size in ((4, 160), (96, 4)))
    mlp.down_proj = LoraLinear(mlp.down_proj, a, b, 0.5)
    sparse = {
        "sparse24": from_sparse24(*stored_sparse24(*shape, torch.bfloat16, generator)[:2]),
        "sparse24-int4": from_sparse24_int4(*stored_sparse24_int4(*shape, 32, torch.bfloat16, generator)[:3]),
    }
    linears = [PackedLinear(OPERATORS[name], weight, shape, None) for name, weight in sparse.items()]
    modules = torch.nn.Sequential(mlp, *linears)
    x = torch.randn(3, 96, generator=generator).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(modules, backend="aot_eager", fullgraph=True)(x), modules(x))


def assert_likeliest(model: Any, made: Tensor) -> None:
    """Every new token is the one that the model takes, or as likely: inductor rounds elsewhere, and near ties turn."""
    length = PROMPT.shape[1]
    with torch.no_grad():
        logits = model(made).logits[0, length - 1 : -1].float()
    chosen = logits.gather(1, made[0, length:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= 4 * torch.finfo(torch.bfloat16).eps * logits.abs().max()
    assert logits.std() > 0.1  # or else any token is as likely


STORED = [
    ("pack-quantized", "llama"),
    ("pack-quantized", "gemma2"),
    ("sparse24", "llama"),
    ("sparse24-int4", "llama"),
    ("bitmask", "llama"),
    ("gptq", "llama"),
    ("lora", "llama"),
]


@pytest.fixture
def stored(request: pytest.FixtureRequest) -> Callable[[str, str], Path]:
    """Folder of a tiny model, by how its linears are stored and by its architecture."""

    def get(how: str, kind: str) -> Path:
        if how == "gptq":
            return request.getfixturevalue("native")(how, kind)[1]
        if how == "lora":
            return request.getfixturevalue("with_adapter")(kind)
        if how in RECIPES:
            return request.getfixturevalue("run_here")(kind, *RECIPES[how], output={"format": how})[0]
        return request.getfixturevalue("packed_folders")(kind)

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kind"), STORED)
def test_a_compiled_step_makes_the_same_tokens(how, kind, stored):
    model = load(stored(how, kind))
    assert len(list(compressed_linears(model))) == 14
    assert any(isinstance(module, LoraLinear) for module in model.modules()) == (how == "lora")
    options = {"min_new_tokens": 8}
    eager = generate(model, PROMPT, 8, **options)
    static = generate(model, PROMPT, 8, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, eager)
    compiled = generate(model, PROMPT, 8, compiled=True, **options)
    assert hasattr(model, "_compiled_call")
    assert compiled.shape == eager.shape
    assert_likeliest(model, eager)
    assert_likeliest(model, compiled)


@pytest.mark.slow
def test_generate_compiled(packed_folders, call):
    code, out, err = call("generate", packed_folders("llama"), "abc", "--new", 6, "--compile", "--device", "cpu")
    assert code == 0, err
    assert out
