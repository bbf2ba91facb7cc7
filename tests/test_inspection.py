"""`inspect` and the verdicts on engines, from folders that are good, foreign or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import proof_inside, recipe, write_text

from llmcompress.engines import verdicts
from llmcompress.errors import FormatError
from llmcompress.inspection import inspect
from llmcompress.run import run


@pytest.fixture(scope="module")
def folder(tiny_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny Llama: attention in 4 bits, asymmetric; the MLP in 8 bits by rows; one linear kept."""
    made = tmp_path_factory.mktemp("inspection")
    steps = (
        {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False, "targets": ["*.self_attn.*"]},
        {"method": "rtn", "bits": 8, "group_size": "row", "targets": ["*.mlp.*"]},
    )
    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        text = write_text(made / "text.txt")
        run(recipe(tiny_folders("llama"), text, *steps, keep=["lm_head", "model.layers.1.mlp.up_proj"]), made / "out")
    return made / "out"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_rows_agree_with_the_run(folder):
    rows = {row["name"]: row for row in inspect(folder)["tensors"]}
    results = json.loads((folder / "results.json").read_text())
    for layer in results["layers"]:
        row = rows[layer["name"]]
        assert row["format"] == "pack-quantized"
        assert row["bytes"] == layer["after_bytes"]
        assert row["bits"] == pytest.approx(8 * row["bytes"] / (row["shape"][0] * row["shape"][1]))
    assert rows["model.layers.1.mlp.up_proj.weight"]["format"] == "bfloat16"
    assert rows["model.layers.1.mlp.up_proj.weight"]["bits"] == 16


def test_density_counts_the_zeros_of_the_decoded_weight(folder, tiny_folders):
    rows = {row["name"]: row for row in inspect(folder)["tensors"]}
    assert 0.7 < rows["model.layers.0.self_attn.q_proj"]["density"] < 1  # some of 96 x 96 small weights round to zero
    assert all(row["density"] == 1 for row in inspect(tiny_folders("llama"))["tensors"])


def test_stock_folder_is_dense_and_loads_everywhere(tiny_folders):
    found = inspect(tiny_folders("opt"))
    assert found["format"] == "dense"
    assert found["model_type"] == "opt"
    assert all(engine["loads"] for engine in found["engines"])
    assert found["bytes"] == sum(t.nbytes for t in load_file(tiny_folders("opt") / "model.safetensors").values())


def test_tensor_without_elements(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"none": torch.zeros(0, 3), "zero": torch.zeros(4)}, tmp_path / "model.safetensors")
    rows = {row["name"]: row for row in inspect(tmp_path)["tensors"]}
    assert (rows["none"]["bytes"], rows["none"]["density"], rows["zero"]["density"]) == (0, 0, 0)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type"')


def with_a_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def with_a_truncated_shard(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_its_scales(folder: Path) -> None:
    tensors = load_file(folder / "model-00001-of-00003.safetensors")
    tensors.pop("model.layers.0.self_attn.k_proj.weight_scale")
    save_file(tensors, folder / "model-00001-of-00003.safetensors")


def without_its_groups(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {}
    (folder / "config.json").write_text(json.dumps(config))


def with_an_index_that_is_no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


DAMAGES = [
    (without_config, r"config\.json: cannot be read"),
    (with_cut_config, r"config\.json: not valid JSON"),
    (with_a_missing_shard, r"model-00002-of-00003\.safetensors is missing"),
    (with_a_truncated_shard, r"model-00001-of-00003\.safetensors: cannot be read as safetensors"),
    (without_its_scales, r"model\.layers\.0\.self_attn\.k_proj: its packed tensors do not fit"),
    (without_its_groups, r"is packed, but no group of config\.json"),
    (with_an_index_that_is_no_index, r"model\.safetensors\.index\.json"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damaged_folder(damage, message, copied):
    damage(copied)
    with pytest.raises(FormatError, match=message):
        inspect(copied)


# engines


def config_of(*grids: tuple[int, int | None, bool]) -> dict[str, Any]:
    """config.json with one group per (bits, group size, symmetric)."""
    groups = {
        f"group_{i}": {"weights": {"num_bits": bits, "group_size": group, "symmetric": symmetric}}
        for i, (bits, group, symmetric) in enumerate(grids)
    }
    return {"quantization_config": {"config_groups": groups}}


VERDICTS = [
    ([(4, 64, True)], {"transformers": "", "vLLM": "", "GGUF converters": ""}),
    ([(4, 64, False)], {"transformers": "5.23.0 refuses asymmetric", "vLLM": "", "GGUF converters": ""}),
    ([(3, 64, False)], {"vLLM": "no: asymmetric 3-bit", "GGUF converters": "no: convert_hf_to_gguf.py needs widths"}),
    ([(8, None, True)], {"vLLM": "", "GGUF converters": "no: convert_hf_to_gguf.py unpacks groups, not whole rows"}),
    ([(4, 96, True)], {"vLLM": "no: groups of 96"}),
    (
        [(4, 64, True), (8, 64, True)],
        {"vLLM": "", "GGUF converters": "no: convert_hf_to_gguf.py takes one config group"},
    ),
]


@pytest.mark.parametrize(("grids", "expected"), VERDICTS, ids=[str(grids) for grids, _ in VERDICTS])
def test_engines_say_whether_and_why(grids, expected):
    found = {row["engine"]: row for row in verdicts(config_of(*grids))}
    for engine, words in expected.items():
        assert found[engine]["loads"] is not words.startswith("no: ")
        assert words.removeprefix("no: ") in found[engine]["why"]


def fused_config(targets: dict[str, list[str]], ignore: list[str]) -> dict[str, Any]:
    """config.json with 4-bit groups for these targets."""
    grid = {"num_bits": 4, "group_size": 64, "symmetric": True}
    groups = {name: {"weights": grid, "targets": names} for name, names in targets.items()}
    return {"quantization_config": {"config_groups": groups, "ignore": ignore}}


@pytest.mark.parametrize(
    ("targets", "ignore", "loads"),
    [
        ({"group_0": ["Linear"]}, ["lm_head", "layers.0.mlp.down_proj"], True),
        ({"group_0": ["Linear"]}, ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"], True),
        ({"group_0": ["Linear"]}, ["layers.0.mlp.gate_proj"], False),
        ({"group_0": ["Linear"]}, ["layers.3.self_attn.v_proj"], False),
        ({"group_0": ["layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.attn.v_proj"]}, [], True),
        ({"group_0": ["layers.0.attn.q_proj"], "group_1": ["layers.0.attn.k_proj", "layers.0.attn.v_proj"]}, [], False),
    ],
    ids=["others kept", "both kept", "gate kept", "value kept", "one group", "two groups"],
)
def test_vllm_needs_one_scheme_for_what_it_fuses(targets, ignore, loads):
    row = next(row for row in verdicts(fused_config(targets, ignore)) if row["engine"] == "vLLM")
    assert row["loads"] is loads
    assert loads or "it fuses" in row["why"]


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "refusing"),
    [
        ({"model_type": "llama", "num_attention_heads": 6, "head_dim": 64, "hidden_size": 576}, set()),
        ({"model_type": "qwen2", "num_attention_heads": 9, "hidden_size": 576}, set()),
        ({"model_type": "qwen2", "num_attention_heads": 6, "head_dim": 64, "hidden_size": 576}, {"vLLM"}),
        ({"model_type": "gemma3_text", "layer_types": [*[SLIDING] * 5, FULL, SLIDING]}, set()),
        ({"model_type": "gemma3_text", "layer_types": [*[SLIDING] * 4, FULL, SLIDING]}, {"GGUF converters"}),
        ({"model_type": "llama", "per_layer_config": {"0": {"skip": ["mlp"]}}}, {"vLLM", "GGUF converters"}),
    ],
    ids=["heads", "qwen2", "qwen2-heads", "gemma3", "gemma3-blocks", "unlike"],
)
def test_smaller_dense_models_load_where_every_size_is_read(config, refusing):
    assert {row["engine"] for row in verdicts(config) if not row["loads"]} == refusing
