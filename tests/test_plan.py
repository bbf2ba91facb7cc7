"""Plans: made from headers alone, exact about size, and refusing what cannot work."""

import io
import json
import re
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import GQA, SIZES, tiny_tokenizer, write_tiny
from rich.console import Console
from tiny_runs import proof_inside, recipe, tensors, write_hollow, write_text

from llmcompress.errors import PlanError
from llmcompress.layout import find_block_path, is_expert
from llmcompress.machine import check_machine
from llmcompress.plan import Plan, make_plan
from llmcompress.recipe import Recipe
from llmcompress.run import run
from llmcompress.source import open_source
from llmcompress.tables import plan_tables

RTN = {"method": "rtn", "group_size": 32}
GPTQ = {"method": "gptq", "group_size": 32}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def plan_of(made: Recipe) -> Plan:
    return make_plan(made, open_source(made.model))


# from headers alone


def test_a_model_of_16_gigabytes_is_planned_without_reading_it(tmp_path, text):
    made = recipe(write_hollow(tmp_path / "8b"), text, {"method": "gptq", "group_size": 128})
    plan = plan_of(made)
    assert plan.before_bytes == 2 * 8_030_261_248
    assert len(plan.linears) == 7 * 32
    weights = 2 * 128256 * 4096 * 2 + 65 * 4096 * 2  # both tables and the norms stay in bfloat16
    packed = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096) * (4 + 16 / 128) / 8
    assert plan.predicted.output_bytes == pytest.approx(weights + packed, rel=0.001)
    assert plan.predicted.peak_host_bytes < 8 * 2**30


def test_planning_imports_neither_transformers_nor_datasets(tiny_folders, text, tmp_path):
    model = str(tiny_folders("llama"))
    script = (
        "import sys\n"
        "from llmcompress.plan import make_plan\n"
        "from llmcompress.recipe import parse_recipe\n"
        "from llmcompress.source import open_source\n"
        f"make_plan(parse_recipe({recipe(Path(model), text, GPTQ).plain()!r}), open_source({model!r}))\n"
        "heavy = ('transformers', 'datasets', 'lm_eval', 'compressed_tensors', 'matplotlib')\n"
        "print([module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# what it says


@pytest.mark.parametrize("output", [{}, {"format": "dense"}], ids=["auto", "dense"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt", "phi3"])
def test_every_linear_of_the_blocks_is_planned_with_its_shape(kind, output, tiny_folders, text):
    plan = plan_of(recipe(tiny_folders(kind), text, RTN, output=output))
    stored = {n.removesuffix(".weight"): list(t.shape) for n, t in tensors(tiny_folders(kind)).items() if t.ndim == 2}
    inside = {name: shape for name, shape in stored.items() if f"{plan.blocks}." in name}
    assert {linear.name: list(linear.shape) for linear in plan.linears} == inside
    assert plan.kept.keys() == stored.keys() - inside.keys()


def test_gpt2_shapes_are_out_by_in_and_its_format_is_dense_with_a_note(tiny_folders, text):
    plan = plan_of(recipe(tiny_folders("gpt2"), text, RTN))
    assert {linear.name: linear.shape for linear in plan.linears}["transformer.h.0.attn.c_attn"] == (288, 96)
    assert plan.format_name == "dense"
    assert any("Conv1D" in note and "not smaller" in note for note in plan.notes)


def test_reasons_for_what_is_left_alone(tiny_folders, text):
    steps = RTN | {"targets": ["*.self_attn.*", "*.mlp.*_proj"]}
    plan = plan_of(recipe(tiny_folders("qwen2"), text, steps, keep=["lm_head", "*.down_proj"]))
    assert plan.kept["lm_head"] == "keep"
    assert plan.kept["model.layers.0.mlp.down_proj"] == "keep"
    assert plan.kept["model.embed_tokens"] == "outside the decoder blocks"
    assert "model.layers.0.mlp.up_proj" not in plan.kept


@pytest.mark.parametrize(
    ("step", "output"),
    [
        pytest.param(RTN | {"bits": 3, "symmetric": False}, {}, id="3 bits with zeros"),
        pytest.param(RTN | {"bits": 8, "group_size": "row"}, {}, id="8 bits by rows", marks=pytest.mark.slow),
        pytest.param(RTN, {"format": "dense"}, id="dense", marks=pytest.mark.slow),
    ],
)
def test_predicted_size_is_the_measured_one_within_a_percent(step, output, text, tmp_path, monkeypatch):
    """On a model of about 10 MB, as smaller ones are mostly headers."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 3, "head_dim": 64}
    model = write_tiny(tmp_path / "model", "llama", **sizes)
    with proof_inside(monkeypatch):
        results = run(recipe(model, text, step, output=output), tmp_path / "out")
    predicted, measured = (results["plan"][kind]["output_bytes"] for kind in ("predicted", "measured"))
    assert measured == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert predicted == pytest.approx(measured, rel=0.01)
    assert results["size"]["before_bytes"] == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.01)


def test_data_makes_a_run_longer_and_larger(tiny_folders, text):
    small, large = (
        plan_of(recipe(tiny_folders("llama"), text, GPTQ, calibration={"data": str(text), "samples": n, "length": 64}))
        for n in (4, 4000)
    )
    assert large.predicted.peak_host_bytes > small.predicted.peak_host_bytes
    assert large.predicted.disk_bytes > small.predicted.disk_bytes
    assert large.predicted.seconds > small.predicted.seconds
    assert large.predicted.output_bytes == small.predicted.output_bytes


def test_plain_values_are_json(tiny_folders, text):
    plain = plan_of(recipe(tiny_folders("llama"), text, GPTQ)).plain()
    assert json.loads(json.dumps(plain))["linears"][0]["methods"] == ["gptq"]


# what it refuses


MLP = {"targets": ["*.mlp.*"]}
REFUSED: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], str]] = {
    "group": (
        (RTN | {"group_size": 64},), {},
        r"layers\.0\..*160 input columns.*steps\[0\]\.group_size 64; try group_size: 32 or row",
    ),
    "group of the second step": (
        (RTN | MLP, RTN | {"group_size": 128, "targets": ["*.q_proj"]}), {},
        r"q_proj: 96 input columns.*steps\[1\]\.group_size 128; try group_size: 32 or row",
    ),
    "target matches nothing": (
        (RTN | {"targets": ["*.mlp.*", "*.q_porj"]},), {}, r"steps\[0\]\.targets: '\*\.q_porj' matches no linear",
    ),
    "target of the head": ((RTN | {"targets": ["lm_head"]},), {}, r"steps\[0\]\.targets: 'lm_head' matches no linear"),
    "keep matches nothing": ((RTN,), {"keep": ["lm_haed"]}, "keep: 'lm_haed' matches nothing"),
    "keep leaves nothing": ((RTN,), {"keep": ["*"]}, r"steps\[0\]: `keep` \['\*'\] leaves nothing"),
    "steps overlap": ((RTN, GPTQ | MLP), {}, r"steps\[0\] \(rtn\) and steps\[1\] \(gptq\) both"),
    "no data": ((GPTQ,), {"calibration": None}, "method 'gptq' needs `calibration`"),
}  # fmt: skip


@pytest.mark.parametrize(("steps", "more", "message"), REFUSED.values(), ids=REFUSED)
def test_recipe_that_does_not_fit(steps, more, message, tiny_folders, text):
    with pytest.raises(PlanError, match=message):
        plan_of(recipe(tiny_folders("llama"), text, *steps, **more))


@pytest.mark.parametrize("group", [32, 64, 128, "row"])
def test_groups_that_a_refusal_proposes_do_work(group, text, tmp_path):
    """Widths 192 and 320: 64 and 32 divide both, 128 neither; the message of 128 must name exactly what works."""
    model = write_tiny(tmp_path / "model", "llama", hidden_size=192, intermediate_size=320, head_dim=32)
    made = recipe(model, text, RTN | {"group_size": group})
    if group == 128:
        with pytest.raises(PlanError, match="try group_size: 64 or 32 or row"):
            plan_of(made)
    else:
        assert {linear.steps for linear in plan_of(made).linears} == {(0,)}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral of four experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SIZES, **GQA, num_local_experts=4, sliding_window=None)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_mixture_of_experts_is_refused_and_what_the_message_proposes_works(mixtral, text, tmp_path, monkeypatch):
    with pytest.raises(PlanError, match=r"model\.layers\.0\..*experts: .*fused 3-D tensors") as caught:
        plan_of(recipe(mixtral, text, GPTQ))
    proposal = yaml.safe_load(str(caught.value).partition("`")[2].partition("`")[0])
    with proof_inside(monkeypatch):
        results = run(recipe(mixtral, text, GPTQ, **proposal), tmp_path / "out")
    assert results["format"] == "dense"
    assert any("experts" in note for note in results["notes"])
    assert {row["name"].rpartition(".")[2] for row in results["layers"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    before, after = tensors(mixtral), tensors(tmp_path / "out")
    kept = [name for name in before if is_expert(name) or ".gate" in name]
    assert len(kept) == 2 * (4 * 3 + 1)
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_mixture_of_experts_in_packed_form_is_refused(mixtral, text):
    keep = ["lm_head", "*.experts.*", "*.gate"]
    with pytest.raises(PlanError, match="'pack-quantized' cannot hold this mixture of experts"):
        plan_of(recipe(mixtral, text, RTN, keep=keep, output={"format": "pack-quantized"}))


def test_code_from_the_repository_is_not_run_unasked(tiny_folders, text, tmp_path):
    model = shutil.copytree(tiny_folders("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text("raise SystemExit('code from the repository was run')")
    with pytest.raises(PlanError, match=r"auto_map.*`trust_remote_code: true`"):
        plan_of(recipe(model, text, RTN))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_device_that_is_not_there(device, tiny_folders, text):
    with pytest.raises(PlanError, match="torch finds no CUDA device; use `device: cpu`"):
        plan_of(recipe(tiny_folders("llama"), text, RTN, device=device))


def test_checkpoint_that_lacks_a_block(tiny_folders, text, tmp_path):
    model = shutil.copytree(tiny_folders("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 3}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="no 3 numbered decoder blocks among its 20 tensors"):
        find_block_path(open_source(str(model)))


# the machine


def test_too_little_memory_is_refused_with_both_numbers(tiny_folders, text, tmp_path):
    plan = plan_of(recipe(tiny_folders("llama"), text, RTN, max_memory="500MiB"))
    with pytest.raises(PlanError, match=r"max_memory: the run would need about 0\.[56]\d GiB, 500\.0 MiB are allowed"):
        check_machine(plan, tmp_path / "out")
    check_machine(plan_of(recipe(tiny_folders("llama"), text, RTN, max_memory="2GiB")), tmp_path / "out")


def test_too_little_disk_is_refused_with_both_numbers(tiny_folders, text, tmp_path, monkeypatch):
    plan, asked = plan_of(recipe(tiny_folders("llama"), text, RTN)), []
    usage = namedtuple("usage", "total used free")

    def nearly_full(path: Path) -> Any:
        asked.append(Path(path))
        return usage(10**9, 10**9, plan.predicted.disk_bytes - 1)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(PlanError, match=r"the run needs .* of disk and .* are free"):
        check_machine(plan, tmp_path / "not" / "yet" / "there")
    assert asked == [tmp_path], "the disk of the nearest folder that exists"


def test_what_a_killed_run_has_written_counts_as_free(tiny_folders, text, tmp_path, monkeypatch):
    """Else the disk that it filled would keep it from being continued."""
    plan = plan_of(recipe(tiny_folders("llama"), text, RTN))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, plan.predicted.disk_bytes - 1000))
    (tmp_path / "out.partial" / ".state").mkdir(parents=True)
    with pytest.raises(PlanError, match="of disk"):
        check_machine(plan, tmp_path / "out")
    (tmp_path / "out.partial" / ".state" / "hidden-00000.safetensors").write_bytes(bytes(2000))
    check_machine(plan, tmp_path / "out")


def processor_seconds(*command: str) -> float:
    """Of a fresh interpreter; the best of three, as other work on the machine only adds to it."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.mark.slow
def test_a_plan_is_quicker_than_importing_torch():
    """Which it does without; a ratio, as machines differ and are shared."""
    plan = processor_seconds("-m", "llmcompress", "plan", "smollm2-135m/w4a16-gptq")
    assert plan < 1.2 * processor_seconds("-c", "import torch")


def test_the_table_shows_each_linear_as_it_will_be(tiny_folders, text):
    """Overrides and shapes give linears their own share; what a survey decides is called an average."""
    step = {"method": "magnitude", "sparsity": 0.6, "budget": "erk", "overrides": {"*.down_proj": 0.25}}
    words = shown(plan_of(recipe(tiny_folders("llama"), text, step)))
    assert "25% removed" in words
    assert len(set(re.findall(r"(\d+)% removed", words))) > 2
    owl = shown(plan_of(recipe(tiny_folders("llama"), text, {"method": "wanda", "sparsity": 0.6, "budget": "owl"})))
    assert "60% removed on average, by owl" in owl


def shown(plan: Any) -> str:
    """The tables of `plan` as text."""
    console = Console(width=300, file=io.StringIO())
    for table in plan_tables(plan):
        console.print(table)
    return " ".join(console.file.getvalue().split())
