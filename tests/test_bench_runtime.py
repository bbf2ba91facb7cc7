"""evals/bench_runtime.py runs through: what it writes can be measured, in one form each, and missed bounds are told."""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy
import pytest

from llmcompress import bench, speed
from llmcompress.gguf_header import BLOCKS, read_gguf_header
from llmcompress.speed import Case

EVALS = Path(__file__).parents[1] / "evals"
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
UNTIED = SHAPE | {"hidden_size": 256, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVALS))
        yield importlib.import_module("bench_runtime")


@pytest.fixture
def random_gguf(script: ModuleType) -> ModuleType:
    return sys.modules["random_gguf"]


@pytest.mark.parametrize(
    ("shape", "heads"),
    [(SHAPE, {"token_embd.weight": "Q8_0"}), (UNTIED, {"token_embd.weight": "Q4_0", "output.weight": "Q6_K"})],
    ids=["tied", "untied"],
)
def test_the_gguf_file_is_such_a_model(shape, heads, random_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    random_gguf.write_q4_0_model(path, shape)
    header = read_gguf_header(path)
    kinds = {name: BLOCKS[tensor.kind][0] for name, tensor in header.tensors.items()}
    width, keys = shape["hidden_size"], shape["hidden_size"] // 2
    assert heads.items() <= kinds.items()
    assert len(kinds) == 2 * 9 + 1 + len(heads)
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if name.startswith("blk.") and "norm" not in name} == {"Q4_0"}
    assert header.tensors["blk.1.attn_k.weight"].shape == (keys, width)
    assert header.tensors["blk.1.ffn_down.weight"].shape == (width, 192)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.vocab_size"] == 1024
    assert header.metadata["llama.attention.head_count_kv"] == 2
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert numpy.isfinite(values).all()
        assert "norm" in tensor.name or 0.5 * random_gguf.DEVIATION < values.std() < 2 * random_gguf.DEVIATION


FAKE = """
import ctypes, json, sys
from types import SimpleNamespace

llama_token = ctypes.c_int32
decoded = []
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
llama_log_set = lambda callback, data: callback(4, b"told", data)  # which nobody is to see
llama_backend_init = lambda: None
llama_model_default_params = llama_context_default_params = SimpleNamespace
llama_model_load_from_file = lambda path, params: None if b"missing" in path else (path, params.n_gpu_layers)
llama_init_from_model = lambda model, params: vars(params)
llama_batch_get_one = lambda tokens, length: list(tokens)[:length]
llama_decode = lambda context, batch: decoded.append((dict(context), len(batch))) or 0
llama_get_logits_ith = lambda context, place: [0.0]
llama_free = lambda context: None
llama_model_free = lambda model: print(json.dumps(decoded), file=sys.stderr)
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something in place of llama-cpp-python, which does nothing, and says with what it was called."""
    (tmp_path / "peer/llama_cpp_python-1.2.dist-info").mkdir(parents=True)
    (tmp_path / "peer/llama_cpp_python-1.2.dist-info/METADATA").write_text("Name: llama_cpp_python\nVersion: 1.2\n")
    (tmp_path / "peer/llama_cpp.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "peer"))


def drive(**asked: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EVALS / "llama_cpp_driver.py")]
    return subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)


def test_the_driver_generates_twice(peer):
    done = drive(model="a.gguf", prompt=5, new=4, threads=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"version", "prefill_seconds", "decode_seconds"}
    assert found["version"] == "1.2"
    calls = json.loads(done.stderr)
    assert [length for _, length in calls] == [5, 1, 5, 1, 1, 1]
    assert all(context == {"n_ctx": 9, "n_batch": 5, "n_threads": 2, "n_threads_batch": 2} for context, _ in calls)


def test_the_driver_says_what_is_wrong(peer):
    done = drive(model="missing.gguf", prompt=5, new=4, threads=2)
    assert done.returncode == 1
    assert "missing.gguf: llama.cpp cannot load it" in done.stderr


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases of the script on a small shape, measured in this process, compiled ones as if they were not."""
    cases: list[Case] = []

    def here(case: Case) -> dict[str, Any]:
        cases.append(case)
        assert len(list(Path(case.folder).glob("*.safetensors"))) == 4
        found = asdict(speed.measure(Case(**asdict(case) | {"compiled": False})))
        return found | {"resident_bytes": 10 + case.packed, "peak_bytes": 20}

    monkeypatch.setattr(bench, "measured", here)
    for name in script.AT_LEAST:
        monkeypatch.setitem(script.SHAPES, name, SHAPE)
    return cases


def test_it_runs_through(script, run, peer, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "AT_LEAST", {"smollm2-135m": {"decode": 1e9}})
    options = ["--prompt", "8", "--new", "3", "--rounds", "1", "--python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["bench_runtime.py", *options, "--json", str(tmp_path / "found.json")])
    assert script.main() == 1  # one bound is missed
    assert [(case.packed, case.compiled) for case in run] == [(p, c) for c in (False, True) for p in (True, False)]
    assert len({case.folder for case in run}) == 2  # the dense side was never packed
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| smollm2")]
    assert [row[1] for row in rows] == [
        "decode, tokens/s", "prefill, tokens/s", "resident, MiB", "peak, MiB", "read, MiB",
        "decode, compiled, tokens/s", "prefill, compiled, tokens/s",
    ]  # fmt: skip
    assert rows[0][5] == ">= 1000000000.00"
    (found,) = json.loads((tmp_path / "found.json").read_text())["runs"]
    other = found["measured"][script.LLAMA]
    assert float(rows[0][6]) == pytest.approx(other["decode_tokens_per_second"], abs=0.1)
    assert found["measured"]["packed"]["linears"].startswith("14 linears packed")
    assert found["measured"]["dense"]["linears"] == "0 linears packed"


@pytest.mark.parametrize(("compiled", "sides"), [(False, 2), (True, 4)])
def test_large_shapes_are_compiled_if_asked(compiled, sides, script, run):
    args = argparse.Namespace(prompt=4, new=3, rounds=1, compile=compiled, python=None)
    found = script.measure("tinyllama-1.1b", args)
    assert len(run) == len(found["measured"]) == sides
    assert script.show("tinyllama-1.1b", found)  # 11 of 10 bytes resident: the bound is missed


def test_the_other_script_runs_through(script, peer, monkeypatch, tmp_path, capsys):
    """bench_cpu_peers.py, whose driver finds no engine here."""
    peers = importlib.import_module("bench_cpu_peers")
    monkeypatch.setattr(peers, "DRIVER", tmp_path / "driver.py")
    answer = {"versions": {"other": "1.0"}, "seconds": {"other, Q4_0": {"64x64": 0.001}}}
    (tmp_path / "driver.py").write_text(f"import json; print(json.dumps({answer!r}))")
    options = ["--python", sys.executable, "--shapes", "64x64", "--rounds", "1", "--turns", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_cpu_peers.py", *options])
    assert peers.main() == 0
    printed = capsys.readouterr().out
    assert "| other, Q4_0 | 1000 |" in printed
    assert "| int4_linear, bfloat16 | " in printed
