"""Folders in our own formats: loaded packed, saved again, unpacked, refused if damaged, never loaded by accident."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from llmcompress_kernels import native
from safetensors.torch import load_file, save_file
from tiny_runs import logits, proof_inside, recipe, write_text

import llmcompress
from llmcompress.errors import FormatError
from llmcompress.inspection import inspect
from llmcompress.run import run
from llmcompress.runtime import PackedLinear, StoredLinear, accelerated, compressed_linears, load, sparse
from llmcompress.runtime.table import OPERATORS

TWO_OF_FOUR = {"method": "magnitude", "pattern": "2:4"}
RTN = {"method": "rtn", "group_size": 32}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "sparse24": [{"method": "sparsegpt", "pattern": "2:4"}],  # whose update leaves zeros of both signs
    "sparse24-int4": [TWO_OF_FOUR, RTN],
    "bitmask": [{"method": "magnitude", "sparsity": 0.6}],
}
CODE = {"sparse24": sparse.native_sparse24, "sparse24-int4": sparse.native_sparse24_int4}  # None without a compiler
PLAIN = [kind for kind in ARCHITECTURES if kind != "gpt2"]
formats = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def made(tiny_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and results of a run, by architecture and format; each is made once."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    done: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def get(kind: str, name: str) -> tuple[Path, dict[str, Any]]:
        if (kind, name) not in done:
            folder = tmp_path_factory.mktemp("runs") / name
            with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
                values = recipe(tiny_folders(kind), text, *RECIPES[name], output={"format": name})
                done[kind, name] = folder, run(values, folder)
        return done[kind, name]

    return get


@pytest.fixture
def folder(made: Any, name: str, tmp_path: Path) -> Path:
    """A folder of the test's own, to be spoilt."""
    return shutil.copytree(made("llama", name)[0], tmp_path / "copy")


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative RMS."""
    return float((found.float() - truth.float()).norm() / truth.float().norm())


def runs_packed(name: str) -> bool:
    """Whether an operator computes with the format here."""
    return name in CODE and CODE[name]() is not None


@formats
@pytest.mark.parametrize("kind", PLAIN)
def test_every_architecture_computes_what_the_dense_model_does(kind, name, made):
    folder, results = made(kind, name)
    model = load(folder)
    assert {row["name"] for row in results["layers"]} <= {n for n, _ in compressed_linears(model)} | {
        n.removeprefix(model.base_model_prefix + ".") for n, _ in compressed_linears(model)
    }
    kinds = {type(linear) for _, linear in compressed_linears(model)}
    assert kinds == {PackedLinear if runs_packed(name) else StoredLinear}
    packed = logits(model)
    dense = model.dequantize()
    assert not list(compressed_linears(dense))
    unpacked = logits(dense)
    if runs_packed(name):
        truth = logits(dense.float())
        assert 0 < error(packed, truth) <= 2 * error(unpacked, truth)
    else:
        assert torch.equal(unpacked, packed)


@formats
def test_sizes_are_as_planned(name, made):
    _, results = made("llama", name)
    predicted, measured = (results["plan"][key]["output_bytes"] for key in ("predicted", "measured"))
    linears = sum(row["after_bytes"] for row in results["layers"])
    assert results["format"] == name
    assert linears < 0.7 * sum(row["before_bytes"] for row in results["layers"])
    assert abs(predicted - measured) < 0.2 * measured  # of a tiny file, headers are a large share


@formats
def test_saved_again_it_has_the_same_tensors(name, made, tmp_path):
    folder, _ = made("llama", name)
    load(folder).save_pretrained(tmp_path / "again")
    again = {k: v for path in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(path).items()}
    first = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) and again[key].dtype == first[key].dtype for key in first)
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(folder)))


@formats
def test_in_another_dtype(name, made):
    model = load(made("llama", name)[0], dtype=torch.float32)
    reasons = {"the model computes in float32, it is stored in bfloat16"}  # operators would have to unpack at each call
    assert set(accelerated(model).kept.values()) == reasons
    assert logits(model).dtype == torch.float32
    as_stored = dict(compressed_linears(load(made("llama", name)[0])))
    for linear, packed in compressed_linears(model):  # values are what the file says, however they are used
        assert packed.dense().dtype == torch.bfloat16
        assert torch.equal(packed.dense(), as_stored[linear].dense())
    packed_logits = logits(model)
    dense = model.dequantize(torch.float32)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
    assert torch.equal(logits(dense), packed_logits)


@formats
def test_inspect_unpacks_it(name, made):
    found = inspect(made("llama", name)[0])
    packed = [entry for entry in found["tensors"] if entry["format"] == name]
    assert packed
    assert all(entry["density"] <= 0.51 for entry in packed)
    assert {engine["engine"]: engine["loads"] for engine in found["engines"]} == {
        "llmcompress": True,
        "transformers": False,
        "vLLM": False,
        "GGUF converters": False,
    }


@formats
def test_stock_transformers_stops(name, made):
    """Without the import nothing may start from random weights; in a process that has never seen this package."""
    code = f"""
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained({str(made("llama", name)[0])!r}, local_files_only=True)
except Exception as exc:
    sys.exit(f"stopped: {{type(exc).__name__}}: {{exc}}")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stopped: " in done.stderr
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr.lower()


def test_load_is_a_name_of_the_package():
    assert llmcompress.load is load
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = llmcompress.lod


def shard_of(folder: Path, ending: str) -> tuple[Path, str]:
    """The file and name of the first tensor whose name ends so."""
    for path in sorted(folder.glob("*.safetensors")):
        for name in load_file(path):
            if name.endswith(ending):
                return path, name
    raise LookupError(ending)


def change(folder: Path, ending: str, make: Any) -> None:
    path, name = shard_of(folder, ending)
    tensors = load_file(path)
    tensors[name] = make(tensors[name]).contiguous()
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "ending", "make", "words"),
    [
        ("sparse24", "q_proj.weight_index", lambda t: t * 0, "must rise"),
        ("sparse24", "q_proj.weight", lambda t: t[:, :-4], "hold a weight of"),
        ("sparse24-int4", "down_proj.weight_index", lambda t: t * 0, "must rise"),
        ("sparse24-int4", "down_proj.weight_scale", lambda t: t * 0, "a scale is zero"),
        ("sparse24-int4", "down_proj.weight_scale", lambda t: t * float("nan"), "negative, infinite or no number"),
        ("bitmask", "up_proj.weight", lambda t: t[:-1], "expected floats"),
        ("bitmask", "up_proj.weight_shape", lambda t: t + torch.tensor([1, 0]), "weight_mask is uint8"),
    ],
)
def test_damaged_folders_are_refused(name, ending, make, words, folder):
    change(folder, ending, make)
    with pytest.raises(FormatError, match=words) as caught:
        load(folder)
    assert ending.rpartition(".")[0] in str(caught.value)


@pytest.mark.parametrize("ending", ["q_proj.weight", "q_proj.weight_index", "q_proj.weight_scale"])
@pytest.mark.parametrize("name", ["sparse24-int4"])
def test_a_tensor_that_is_missing(ending, name, folder):
    """transformers would warn and fill it with whatever is in memory."""
    path, tensor = shard_of(folder, ending)
    save_file({n: t for n, t in load_file(path).items() if n != tensor}, path, {"format": "pt"})
    with pytest.raises(FormatError, match=rf"{tensor.rpartition('.')[0]}: {tensor.rpartition('.')[2]} is not in the"):
        load(folder)


@pytest.mark.parametrize("name", ["sparse24"])
def test_a_linear_that_is_missing(name, folder):
    path, _ = shard_of(folder, "q_proj.weight")
    save_file({n: t for n, t in load_file(path).items() if "q_proj" not in n}, path, {"format": "pt"})
    with pytest.raises(FormatError, match="q_proj: none of its tensors is in the files"):
        load(folder)


@pytest.mark.parametrize("name", ["sparse24"])
@pytest.mark.parametrize("ending", ["input_layernorm.weight", "embed_tokens.weight", "q_proj.bias", "k_proj.bias"])
def test_dense_tensors_of_another_shape_or_none(ending, name, made, tmp_path):
    """transformers would let [1] broadcast, and fill what is missing."""
    for number, make in enumerate((lambda t: t[:1], None)):
        folder = shutil.copytree(made("qwen2", name)[0], tmp_path / f"{number}")
        path, tensor = shard_of(folder, ending)
        tensors = load_file(path)
        tensors |= {tensor: make(tensors[tensor]).contiguous()} if make else {}
        save_file({n: t for n, t in tensors.items() if make or n != tensor}, path, {"format": "pt"})
        with pytest.raises(FormatError, match=f"{tensor}: {'shape' if make else 'is not in the files'}"):
            load(folder)


@formats
def test_packed_tensors_keep_their_dtype_wherever_the_model_goes(name, made):
    model = load(made("llama", name)[0])
    before = {linear: packed.dense() for linear, packed in compressed_linears(model)}
    model.to(torch.float16)
    assert {parameter.dtype for parameter in model.model.norm.parameters()} == {torch.float16}
    assert all(torch.equal(packed.dense(), before[linear]) for linear, packed in compressed_linears(model))
    assert logits(model).dtype == torch.float16


@formats
def test_dequantized_and_saved_it_is_an_ordinary_folder(name, made, tmp_path):
    """Stock transformers loads it in a process that knows nothing of ours."""
    model = load(made("llama", name)[0]).dequantize()
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; from safetensors.torch import save_file\n"
        "model = A.from_pretrained(sys.argv[1], dtype='auto'); assert 'llmcompress' not in sys.modules\n"
        "save_file({n: p.contiguous() for n, p in model.model.layers.named_parameters()}, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dense"), str(tmp_path / "found.safetensors")]
    subprocess.run(command, check=True, capture_output=True)
    found = load_file(tmp_path / "found.safetensors")
    assert all(torch.equal(found[n], p) for n, p in model.model.layers.named_parameters())


@formats
@pytest.mark.parametrize("kept", [4, 100, -1], ids=["length", "header", "data"])
def test_truncated_files_are_refused(kept, name, folder):
    path, _ = shard_of(folder, "q_proj.weight")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match=path.name):
        load(folder)


@pytest.mark.parametrize("name", ["sparse24"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2 is not known"),
        ({"format": "sparse99"}, "format 'sparse99'"),
        ({"modules": "all"}, "expected a list `modules`"),
        ({"modules": [], "extra": 1}, "extra"),
        ({"modules": []}, r"proj.weight: shape \[96, 48\], the model expects \[96, 96\]"),
        ({"modules": ["model.norm"]}, "expected a linear"),
    ],
    ids=str,
)
def test_configs_that_are_not_ours_are_refused(name, changes, words, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=words):
        load(folder)


@pytest.mark.parametrize("name", CODE)
def test_an_operator_has_the_same_weights(name, made, monkeypatch, tmp_path):
    if not runs_packed(name):
        pytest.skip("no compiled kernels on this machine")
    folder = made("qwen2", name)[0]
    with monkeypatch.context() as patch:
        patch.delitem(OPERATORS, name)
        stored = load(folder)
    assert set(accelerated(stored).kept.values()) == {f"no operator takes {name}"}
    model = load(folder)
    assert set(accelerated(model).packed.values()) == {OPERATORS[name].name}
    assert set(accelerated(model).apart.values()) == {f"no operator takes two weights of {OPERATORS[name].name}"}
    before = dict(compressed_linears(stored))
    for linear, packed in compressed_linears(model):
        assert torch.equal(packed.dense(), before[linear].dense())
        assert packed.stored().keys() == before[linear].stored().keys()
        assert all(torch.equal(tensor, before[linear].stored()[leaf]) for leaf, tensor in packed.stored().items())
    found, expected = logits(model).float(), logits(stored).float()
    assert (found - expected).norm() < 0.02 * expected.norm()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize(
    ("switch", "why"),
    [("0", "LLMCOMPRESS_CPU_EXTENSION=0 switches the C++ code for CPUs off"), ("1", "could not be compiled here")],
)
def test_without_code_for_this_cpu_it_says_why_it_is_unpacked(name, switch, why, made, monkeypatch, caplog):
    for function in ("native_sparse24", "native_sparse24_int4"):
        monkeypatch.setattr(sparse, function, lambda: None)
    monkeypatch.setenv(native.SWITCH, switch)
    with caplog.at_level("WARNING", "llmcompress"):
        model = load(made("llama", name)[0])
    done = accelerated(model)
    assert (len(done.kept), done.packed) == (14, {})
    assert all(why in reason for reason in done.kept.values())
    assert [record.getMessage() for record in caplog.records if "llmcompress" in record.name] == [done.in_words()]
    assert torch.equal(logits(model), logits(model.dequantize()))


@pytest.mark.parametrize(
    ("dtype", "device", "why"),
    [
        (torch.float32, "cpu", "it is stored in float32, the kernels' dtypes are bfloat16 and float16"),
        (torch.bfloat16, "meta", "its tensors are offloaded"),
    ],
)
def test_what_the_operators_on_2_4_weights_refuse(dtype, device, why):
    tensors = {
        "weight": torch.ones(8, 8, dtype=torch.uint8, device=device),
        "weight_scale": torch.ones(8, 1, dtype=dtype),
    }
    assert OPERATORS["sparse24-int4"].refuses(tensors, (8, 32)) == why
    assert OPERATORS["sparse24"].refuses({"weight": torch.ones(8, 16, dtype=dtype, device=device)}, (8, 32)) == why


@pytest.mark.parametrize("name", CODE)
def test_turned_into_another_dtype_before_it_is_packed(name, made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delitem(OPERATORS, name)
        model = load(made("llama", name)[0])
    model.to(torch.float16)
    done = llmcompress.accelerate(model)
    assert set(done.kept.values()) == {"the model computes in float16, it is stored in bfloat16"}
    if runs_packed(name):
        assert len(llmcompress.accelerate(model.to(torch.bfloat16)).packed) == 14


def test_a_linear_shows_what_it_is(made):
    text = repr(next(linear for _, linear in compressed_linears(load(made("llama", "bitmask")[0]))))
    assert StoredLinear.__name__ in text
    assert "format=bitmask" in text
