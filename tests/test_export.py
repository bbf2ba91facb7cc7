"""Export: the same values in another form, whatever the way there; and what has no such form is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import logits, proof_inside, recipe, write_text

from llmcompress.cli import main
from llmcompress.errors import FormatError, PlanError
from llmcompress.export import export
from llmcompress.inspection import inspect
from llmcompress.run import run
from llmcompress.runtime import load

TWO_OF_FOUR = {"method": "magnitude", "pattern": "2:4"}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "pruned": [TWO_OF_FOUR],
    "codes": [TWO_OF_FOUR, {"method": "rtn", "group_size": 32}],
    "asymmetric": [{"method": "rtn", "group_size": 32, "symmetric": False}],
    "rows": [{"method": "magnitude", "sparsity": 0.6}],
}


@pytest.fixture(scope="module")
def made(tiny_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run, by architecture and recipe; each is made once."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    done: dict[tuple[str, str], Path] = {}

    def get(kind: str, name: str) -> Path:
        if (kind, name) not in done:
            done[kind, name] = tmp_path_factory.mktemp("runs") / name
            with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
                run(recipe(tiny_folders(kind), text, *RECIPES[name]), done[kind, name])
        return done[kind, name]

    return get


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("pruned", ["sparse24", "dense", "bitmask", "sparse24"]),
        ("codes", ["sparse24-int4", "pack-quantized", "bitmask", "dense", "sparse24"]),
        ("asymmetric", ["dense"]),
        ("rows", ["bitmask", "dense"]),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_the_same_model_all_the_way(kind, name, way, made, tmp_path):
    folder = made(kind, name)
    expected = logits(load(folder, packed=False))  # operators round elsewhere
    for number, format_name in enumerate(way):
        made_now = export(folder, format_name, tmp_path / f"{number}")
        folder = tmp_path / f"{number}"
        assert made_now["format"] == inspect(folder)["format"] == format_name
        assert torch.equal(logits(load(folder, packed=False)), expected)
        results = json.loads((folder / "results.json").read_text())
        on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert results["size"]["after_bytes"] == on_disk
        assert sum(part["after_bytes"] for part in results["size"]["parts"]) == pytest.approx(on_disk, rel=0.2)
        assert (folder / "tokenizer.json").exists()
        assert format_name in (folder / "README.md").read_text() or format_name == "dense"


def test_back_again_the_files_are_the_same(made, tmp_path):
    folder = made("llama", "codes")
    export(folder, "sparse24-int4", tmp_path / "a")
    export(tmp_path / "a", "pack-quantized", tmp_path / "b")
    for path in folder.glob("*.safetensors"):
        first, again = load_file(path), load_file(tmp_path / "b" / path.name)
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)
    one, other = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "b"))
    assert one["quantization_config"] == other["quantization_config"]


@pytest.mark.parametrize(
    ("name", "format_name", "message"),
    [
        ("asymmetric", "sparse24-int4", "symmetric 4-bit codes"),
        ("pruned", "pack-quantized", "not on an integer grid"),
        ("rows", "sparse24", "pattern row"),
        ("asymmetric", "bitmask", "no step prunes it"),
    ],
)
def test_forms_that_a_weight_does_not_have(name, format_name, message, made, tmp_path):
    with pytest.raises(PlanError, match=message):
        export(made("llama", name), format_name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_codes_are_not_made_up(made, tmp_path):
    """A dense folder no longer says on which grid its values are."""
    export(made("llama", "codes"), "dense", tmp_path / "dense")
    with pytest.raises(PlanError, match="does not hold the codes"):
        export(tmp_path / "dense", "pack-quantized", tmp_path / "out")
    with pytest.raises(FormatError, match="codes on a symmetric 4-bit grid"):
        export(tmp_path / "dense", "sparse24-int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_that_is_no_run_or_lacks_a_weight(made, tmp_path):
    with pytest.raises(PlanError, match=r"holds no llmcompress\.json"):
        export(tmp_path, "dense", tmp_path / "out")
    folder = shutil.copytree(made("llama", "codes"), tmp_path / "copy")
    path = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if "up_proj" not in key}, path)
    with pytest.raises(FormatError, match=r"mlp\.up_proj is missing"):
        export(folder, "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(made, tmp_path, capsys):
    folder = shutil.copytree(made("llama", "codes"), tmp_path / "m")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(folder), "--format", "sparse24-int4"])
    assert not stop.value.code
    assert capsys.readouterr().out.strip() == str(tmp_path / "m-sparse24-int4")
    for arguments, words in (
        (["--format", "sparse24-int4"], "exists; give another --output"),
        (["--format", "gguf"], "no such format (known: dense"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", str(folder), *arguments])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_conv1d_has_no_packed_form(made, tmp_path):
    with pytest.raises(PlanError, match="Conv1D weights have no packed form"):
        export(made("gpt2", "rows"), "bitmask", tmp_path / "out")
    export(made("gpt2", "rows"), "dense", tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(load(made("gpt2", "rows"))))


def test_the_card_says_where_its_numbers_are_from(made, tmp_path):
    """Of the run, however often it was exported since."""
    folder = made("llama", "pruned")
    export(folder, "sparse24", tmp_path / "first")
    export(tmp_path / "first", "bitmask", tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"Exported from {folder.name} (dense)" in card
    assert f"{folder.name} and compared its logits" in card
    assert "measured on this folder" not in card
    assert "Exported from" not in (folder / "README.md").read_text()


def in_file(folder: Path, change: Any) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def in_results(folder: Path, change: Any) -> None:
    results = json.loads((folder / "results.json").read_text())
    change(results)
    (folder / "results.json").write_text(json.dumps(results))


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (truncate, "safetensors"),
    "index gone": (lambda f: in_file(f, lambda t: t.pop(f"{Q}_index")), "missing"),
    "positions": (lambda f: in_file(f, lambda t: t[f"{Q}_index"].zero_()), "q_proj: .*must rise"),
    "fewer rows": (
        lambda f: in_file(f, lambda t: t.update({Q: t[Q][:-1], f"{Q}_index": t[f"{Q}_index"][:-1]})),
        "q_proj: .*not the size that results.json says",
    ),
    "no layers": (lambda f: in_results(f, lambda r: r.update(layers=3)), "results.json: is damaged"),
    "nameless layer": (lambda f: in_results(f, lambda r: r["layers"][0].pop("name")), "results.json: is damaged"),
    "pattern": (lambda f: in_results(f, lambda r: r["layers"][0].update(pattern="x")), "results.json: is damaged"),
    "format": (lambda f: in_results(f, lambda r: r.update(format="x")), "results.json: is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_and_nothing_is_left(damage, made, tmp_path):
    export(made("llama", "pruned"), "sparse24", tmp_path / "packed")
    change, words = DAMAGES[damage]
    change(tmp_path / "packed")
    with pytest.raises(FormatError, match=words):
        export(tmp_path / "packed", "dense", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]
