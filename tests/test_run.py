"""Whole runs of tiny models: what a stock reload computes is what the methods decided."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, some_slow, write_tiny
from safetensors.torch import load_file, save_file
from tiny_runs import digests, logits, proof_inside, recipe, reloaded, tensors, values, write_text

from llmcompress import job as job_module
from llmcompress import run as run_module
from llmcompress.checkpoint import partial_folder
from llmcompress.errors import FormatError, PlanError
from llmcompress.methods import METHODS, IntMethod
from llmcompress.recipe import load_recipe
from llmcompress.run import run
from llmcompress.stream import StreamedModel

Run = tuple[Path, dict[str, Any]]
DENSE = {"format": "dense"}
RTN = {"method": "rtn", "group_size": 32}
PACKED = [kind for kind in ARCHITECTURES if kind != "gpt2"]
QUANTIZERS = [name for name, cls in METHODS.items() if issubclass(cls, IntMethod)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run_tiny(tiny_folders: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Folder and results of a run, by architecture, steps and other recipe keys; the same run is made once."""
    made: dict[str, Run] = {}

    def get(kind: str, *steps: dict[str, Any], **more: Any) -> Run:
        key = json.dumps([kind, steps, more], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("runs") / "out"
            with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
                made[key] = folder, run(recipe(tiny_folders(kind), text, *steps, **more), folder)
        return made[key]

    return get


def weight(model: Any, name: str) -> torch.Tensor:
    """A weight by its dotted name, whether it is a parameter or what an engine made in its place."""
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf).detach()


def assert_same_model(found: Any, expected: Any) -> None:
    """Every parameter and the logits, bit for bit."""
    assert expected.dtype == torch.bfloat16
    for name, value in expected.named_parameters():
        assert torch.equal(weight(found, name), value), name
    assert torch.equal(logits(found), logits(expected))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root mean square of the difference."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def linear_names(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


# every architecture

AWQ8 = {"method": "awq", "bits": 8, "group_size": 32, "grid_points": 8}


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("llama", "phi3", "gpt_neox") else pytest.param(kind, marks=pytest.mark.slow) for kind in PACKED],
)
def test_packed_and_dense_output_of_one_recipe_are_the_same_model(kind, run_tiny):
    packed, results = run_tiny(kind, AWQ8)
    dense, _ = run_tiny(kind, AWQ8, output=DENSE)
    assert results["format"] == "pack-quantized"
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert_same_model(reloaded(packed), reloaded(dense))


@pytest.mark.parametrize("kind", some_slow(ARCHITECTURES))
def test_eight_bits_with_scales_moved_stay_close_to_the_model(kind, run_tiny, tiny_folders):
    """A scale that is not undone in its producer would change the logits altogether.

    Rounding to 8 bits in groups of 32 normal weights loses about 0.6 % of each linear; two blocks add up to a few.
    """
    folder, results = run_tiny(kind, AWQ8)
    assert 0 < distance(logits(reloaded(folder)), logits(reloaded(tiny_folders(kind)))) < 0.05
    assert {row["method"] for row in results["layers"]} == {"awq"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "rtn", "hqq"])
@pytest.mark.parametrize("kind", PACKED)
def test_every_method_and_architecture(kind, method, run_tiny):
    step = {"method": method, "group_size": 32}
    packed, _ = run_tiny(kind, step)
    dense, _ = run_tiny(kind, step, output=DENSE)
    assert_same_model(reloaded(packed), reloaded(dense))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_gpt2_is_written_dense_and_says_so(method, run_tiny):
    folder, results = run_tiny("gpt2", {"method": method, "group_size": 32})
    assert results["format"] == "dense"
    assert any("Conv1D" in note and "not smaller" in note for note in results["notes"])
    assert "weight_packed" not in "".join(tensors(folder))


def without_prefix(model: Path, folder: Path, prefix: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copy a model as its base model alone would be saved: `h.0` for `transformer.h.0`; returns the tensors."""
    shutil.copytree(model, folder)
    stored = {name.removeprefix(prefix): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(stored | more, folder / "model.safetensors", {"format": "pt"})
    return stored | more


def test_names_without_prefix_and_old_buffers_stay_as_they_are(tiny_folders, text, tmp_path, monkeypatch):
    """As the first GPT-2 checkpoints on the Hub are, with an attention mask in every block."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril().bool() for i in range(2)}
    stored = without_prefix(tiny_folders("gpt2"), tmp_path / "old", "transformer.", **masks)
    with proof_inside(monkeypatch):
        run(recipe(tmp_path / "old", text, RTN), tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert written.keys() == stored.keys()
    assert torch.equal(written["h.1.attn.bias"], masks["h.1.attn.bias"])


def test_config_names_modules_as_the_model_does_when_the_checkpoint_has_no_prefix(
    tiny_folders, text, tmp_path, monkeypatch
):
    """Engines match `targets` and `ignore` with module names, which are not the names of the tensors here."""
    without_prefix(tiny_folders("llama"), tmp_path / "bare", "model.")
    keep = ["lm_head", "layers.0.mlp.down_proj"]
    with proof_inside(monkeypatch):
        run(recipe(tmp_path / "bare", text, *MIXED, keep=keep), tmp_path / "out")
        run(recipe(tmp_path / "bare", text, *MIXED, keep=keep, output=DENSE), tmp_path / "dense")
    assert_same_model(reloaded(tmp_path / "out"), reloaded(tmp_path / "dense"))


def test_tokenizer_with_more_tokens_than_the_embedding_has_rows(tiny_folders, text, tmp_path, monkeypatch):
    """The random tokens that prove a data-free result must be tokens of the model."""
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_folders("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(50)])
    tokenizer.save_pretrained(model)
    with proof_inside(monkeypatch):
        assert run(recipe(model, text, RTN), tmp_path / "out")["proof"]["passed"]


# methods and grids


GRIDS = [(2, 32, True), (3, 32, False), (4, "row", True), (4, 32, False), (8, "row", False)]


@pytest.mark.parametrize(
    ("method", "bits", "group", "symmetric"),
    [
        *[(method, *grid) for method, grid in zip(["rtn", "gptq", "awq", "hqq", "gptq"], GRIDS, strict=True)],
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product(QUANTIZERS, (2, 3, 4, 8), (32, "row"), (True, False))
        ],
    ],
    ids=lambda value: {True: "symmetric", False: "asymmetric"}[value] if isinstance(value, bool) else str(value),
)
def test_every_grid_reloads_as_the_values_that_the_method_chose(method, bits, group, symmetric, run_tiny):
    """The proof has compared every weight, bit for bit; here that the values lie on a grid of so many points."""
    folder, results = run_tiny("llama", {"method": method, "bits": bits, "group_size": group, "symmetric": symmetric})
    assert results["proof"]["weights"] == len(results["layers"]) == 14
    model = reloaded(folder)
    for row in results["layers"]:
        values = weight(model, row["name"] + ".weight")
        grouped = values.reshape(len(values), -1, values.shape[1] if group == "row" else group)
        assert max(len(g.unique()) for rows in grouped for g in rows) <= 2**bits, row["name"]


def test_reloaded_weights_are_what_the_method_makes_of_the_original_ones(run_tiny, tiny_folders):
    """A data-free method sees the stored weight and nothing else, so the result can be made again beside the run."""
    folder, _ = run_tiny("llama", RTN)
    original, model = reloaded(tiny_folders("llama")), reloaded(folder)
    method = METHODS["rtn"].parse({"group_size": 32}, "")
    for name in linear_names(original) - {"lm_head"}:
        expected = method.compress(weight(original, f"{name}.weight").float(), None, torch.bfloat16).values
        assert torch.equal(weight(model, f"{name}.weight"), expected), name


MIXED = (
    {"method": "gptq", "bits": 4, "group_size": 32, "targets": ["*.self_attn.*"]},
    {"method": "rtn", "bits": 8, "group_size": "row", "targets": ["*.mlp.*"]},
)
KEPT = "model.layers.0.mlp.down_proj"


def test_two_steps_with_different_grids_and_a_kept_linear(run_tiny, tiny_folders):
    folder, results = run_tiny("llama", *MIXED, keep=["lm_head", KEPT])
    dense, _ = run_tiny("llama", *MIXED, keep=["lm_head", KEPT], output=DENSE)
    model = reloaded(folder)
    assert_same_model(model, reloaded(dense))
    bits = {row["name"]: row["bits"] for row in results["layers"]}
    assert bits["model.layers.1.self_attn.v_proj"] == 4
    assert bits["model.layers.1.mlp.down_proj"] == 8
    assert KEPT not in bits
    assert torch.equal(weight(model, f"{KEPT}.weight"), weight(reloaded(tiny_folders("llama")), f"{KEPT}.weight"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", KEPT}
    assert len(config["config_groups"]) == 2


# what is in the folder


@pytest.mark.parametrize("kind", some_slow(PACKED))
def test_ignore_lists_every_linear_that_was_left_alone(kind, run_tiny):
    folder, results = run_tiny(kind, AWQ8)
    left = linear_names(reloaded(folder)) - {row["name"] for row in results["layers"]}
    assert left == {"lm_head"}
    assert left <= set(json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"])


def test_untied_head_stays_dense(run_tiny, tiny_folders):
    folder, _ = run_tiny("qwen2", AWQ8)
    assert torch.equal(tensors(folder)["lm_head.weight"], tensors(tiny_folders("qwen2"))["lm_head.weight"])


def test_tied_head_is_stored_once(run_tiny):
    folder, _ = run_tiny("llama", AWQ8)
    model = reloaded(folder)
    assert "lm_head.weight" not in tensors(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "steps", [(AWQ8,), MIXED, (RTN | {"symmetric": False},)], ids=["one group", "two groups", "zeros"]
)
def test_config_holds_exactly_what_compressed_tensors_accepts(steps, run_tiny):
    from compressed_tensors.quantization import QuantizationConfig

    folder, _ = run_tiny("llama", *steps)
    config = json.loads((folder / "config.json").read_text())
    block = config["quantization_config"]
    assert block.keys() <= QuantizationConfig.model_fields.keys()
    assert not block.get("sparsity_config")
    assert QuantizationConfig.model_validate(block).model_dump(mode="json") == block
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


def test_tokenizer_and_generation_work_from_the_folder(run_tiny):
    from transformers import AutoTokenizer

    folder, _ = run_tiny("llama", AWQ8)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer("Hello, world", return_tensors="pt")
    assert tokenizer.decode(tokens.input_ids[0], skip_special_tokens=True) == "Hello, world"
    made = reloaded(folder).generate(**tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=1)
    assert made.shape[1] == tokens.input_ids.shape[1] + 5


def test_files_of_a_finished_folder(run_tiny):
    folder, results = run_tiny("llama", AWQ8)
    assert not partial_folder(folder).exists()
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "recipe.yaml",
        "results.json",
        "llmcompress.json",
        "README.md",
        "report.html",
        "model.safetensors.index.json",
        *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
    }
    assert json.loads((folder / "results.json").read_text()) == results
    assert load_recipe(folder / "recipe.yaml").plain() == results["recipe"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(folder).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())


def test_sizes_in_results_are_those_of_the_files(run_tiny):
    folder, results = run_tiny("llama", AWQ8)
    written = tensors(folder)
    for row in results["layers"]:
        assert row["after_bytes"] == sum(t.nbytes for n, t in written.items() if n.startswith(row["name"] + ".")), row[
            "name"
        ]
    assert results["size"]["after_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(part["after_bytes"] for part in results["size"]["parts"]) == sum(t.nbytes for t in written.values())


@pytest.mark.parametrize(
    "step",
    [
        AWQ8,
        pytest.param({"method": "gptq", "group_size": 32}, marks=pytest.mark.slow),
        pytest.param(RTN, marks=pytest.mark.slow),
    ],
    ids=lambda step: step["method"],
)
def test_the_same_recipe_makes_the_same_bytes(step, run_tiny, tiny_folders, text, tmp_path, monkeypatch):
    folder, _ = run_tiny("llama", step)
    with proof_inside(monkeypatch):
        run(recipe(tiny_folders("llama"), text, step), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(folder)


# memory, proof, dtype


def test_no_more_than_one_block_is_in_memory(text, tmp_path, monkeypatch):
    folder, loaded = write_tiny(tmp_path / "model", "llama", num_hidden_layers=4), []
    load_block = StreamedModel.load_block

    def counted(self: StreamedModel, index: int, hidden: torch.Tensor) -> Any:
        block = load_block(self, index, hidden)
        loaded.append([i for i, b in enumerate(self.blocks) if any(p.device.type != "meta" for p in b.parameters())])
        return block

    monkeypatch.setattr(StreamedModel, "load_block", counted)
    with proof_inside(monkeypatch):
        run(recipe(folder, text, {"method": "gptq", "group_size": 32}), tmp_path / "out")
    assert loaded == [[0], [1], [2], [3]]


def damage_before_proof(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one packed weight changes between writing and proving."""
    prove = run_module.prove

    def damaged(plan: Any, folder: Path, *args: Any) -> dict[str, Any]:
        path = folder / f"model-{block + 1:05d}-of-00003.safetensors"
        stored = load_file(path)
        stored[f"model.layers.{block}.mlp.up_proj.weight_packed"][0, 0] ^= 1
        save_file(stored, path, {"format": "pt"})
        return prove(plan, folder, *args)

    monkeypatch.setattr(run_module, "prove", damaged)


def test_a_result_that_does_not_load_as_decided_never_gets_its_name(tiny_folders, text, tmp_path, monkeypatch):
    damage_before_proof(0, monkeypatch)
    with proof_inside(monkeypatch), pytest.raises(FormatError, match=r"1 weights differ.*layers\.0\.mlp\.up_proj"):
        run(recipe(tiny_folders("llama"), text, RTN), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_proof_with_fewer_blocks_than_the_model_has(tiny_folders, text, tmp_path, monkeypatch):
    """As for a model larger than memory; a damaged later block is found although the model was cut before it."""
    monkeypatch.setattr(job_module, "proof_blocks", lambda plan: 1)
    whole = recipe(tiny_folders("gemma3_text"), text, {"method": "gptq", "group_size": 32, "symmetric": False})
    with proof_inside(monkeypatch):
        proof = run(whole, tmp_path / "out")["proof"]
    assert (proof["blocks"], proof["weights"], proof["relative_rms"]) == (1, 14, 0.0)
    damage_before_proof(1, monkeypatch)
    with proof_inside(monkeypatch), pytest.raises(FormatError, match=r"1 weights differ.*layers\.1\.mlp\.up_proj"):
        run(whole, tmp_path / "again")


def test_awq_names_every_link_that_it_leaves_alone(tiny_folders, text, tmp_path, monkeypatch):
    awq = {"method": "awq", "group_size": 32}
    with proof_inside(monkeypatch):
        results = run(recipe(tiny_folders("llama"), text, awq, keep=["lm_head", "*.q_proj"]), tmp_path / "out")
    assert [note for note in results["notes"] if "input_layernorm" in note and "not scaled" in note]
    assert not [note for note in results["notes"] if "post_attention_layernorm" in note]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype, run_tiny):
    from transformers import AutoModelForCausalLM

    folder, results = run_tiny("llama", RTN, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    assert results["proof"]["passed"]


def test_explicit_packed_format_for_gpt2_is_refused(tiny_folders, text, tmp_path):
    with pytest.raises(PlanError, match=r"transformer\.h\.0\..*Conv1D.*try `output: \{format: dense\}`"):
        run(recipe(tiny_folders("gpt2"), text, RTN, output={"format": "pack-quantized"}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# the real proof, in a process of its own


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), [("gemma3_text", AWQ8), ("gpt2", RTN), ("phi3", RTN | {"symmetric": False})])
def test_proof_in_a_clean_process(kind, step, tiny_folders, text, tmp_path):
    results = run(recipe(tiny_folders(kind), text, step), tmp_path / "out")
    proof = results["proof"]
    assert proof["passed"]
    assert proof["weights"] == len(results["layers"])
    assert proof["relative_rms"] <= proof["tolerance"]
    assert proof["engine"].startswith("transformers ")


def test_recipe_values_of_these_tests_are_a_recipe(tiny_folders, text):
    assert recipe(tiny_folders("llama"), text).plain() == values(tiny_folders("llama"), text)


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM


class CustomConfig(LlamaConfig):
    model_type = "custom_llama"


class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


def test_remote_code_runs_only_if_the_recipe_says_so(text, tmp_path, monkeypatch):
    """A model whose class is in its own folder, from plan to proof."""
    folder = write_tiny(tmp_path / "model", "llama")
    (folder / "custom.py").write_text(CUSTOM)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomForCausalLM"}
    config |= {"model_type": "custom_llama", "architectures": ["CustomForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(PlanError, match="trust_remote_code: true"):
        run(recipe(folder, text, RTN), tmp_path / "out")
    with proof_inside(monkeypatch):
        results = run(recipe(folder, text, RTN, trust_remote_code=True), tmp_path / "out")
    assert results["proof"]["passed"]
    assert (tmp_path / "out" / "custom.py").read_text() == CUSTOM
