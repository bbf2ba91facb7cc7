"""Launches of two processes on the CPU, plain and with FSDP2: the same losses as one, zeros stay, kills change nothing.

What each process does is in sharded_program.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_program import CASES, learn
from tiny_runs import digests, tensors, values

from llmcompress.errors import CalibrationError, PlanError
from llmcompress.files import read_json
from llmcompress.training import Recover, sharding
from llmcompress.training.loop import share_of_batch

PLAIN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port", "0"]
FSDP = [*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
TESTS = Path(__file__).parent
RECOVER = {"train": "recover", "steps": 6, "batch": 4, "learning_rate": 1e-3, "warmup": 2, "checkpoint_every": 2}
RECOVER |= {"precision": "float32"}
PRUNE = {"method": "magnitude", "pattern": "2:4"}


def launch(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes; on a CPU, whatever the machine has."""
    taken = ("ACCELERATE_", "FSDP_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(taken)}
    environment |= {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def program(launcher: list[str], what: str, **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Two processes of sharded_program.py."""
    return launch(launcher, str(TESTS / "sharded_program.py"), what, json.dumps(arguments))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all cases, learned by two plain processes and by two that share the weights."""
    found = {}
    for name, launcher in [("plain", PLAIN), ("sharded", FSDP)]:
        found[name] = tmp_path_factory.mktemp(name)
        done = program(launcher, "learn", folder=str(found[name]))
        assert done.returncode == 0, done.stderr
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(case, launcher, launched, tmp_path):
    folder = launched[launcher] / f"{case}-whole"
    alone, wanted = learn(case, tmp_path)
    seen = read_json(folder / "seen.json")
    assert seen["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert seen["sharded"] == (launcher == "sharded")
    assert seen["windows"] == alone["windows"] / 2
    found = tensors_of(folder / "learned.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Adam divides by the size of a gradient: where that is about rounding, a step may differ by its whole length.
        apart = (found[name] - value).abs()
        assert apart.max() <= 4 * 2e-3, name
        assert apart.mean() <= 1e-5, name
    if case == "pruned":
        zeros = [name for name in wanted if "_proj" in name]
        assert zeros
        assert all(torch.equal(found[name] == 0, wanted[name] == 0) for name in zeros)
        assert all(int((found[name] == 0).sum()) > 0.4 * found[name].numel() for name in zeros)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_of_two_processes_continues_to_the_same_bytes(case, launcher, launched):
    whole, killed = (launched[launcher] / f"{case}-{way}" for way in ("whole", "killed"))
    assert (killed / "learned.safetensors").read_bytes() == (whole / "learned.safetensors").read_bytes()
    seen = [read_json(folder / "seen.json") for folder in (killed, whole)]
    assert seen[0]["losses"] == seen[1]["losses"]
    assert seen[0]["windows"] == seen[1]["windows"] / 2  # it went on from the middle


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.slow
def test_a_whole_run_of_two_processes_that_share_the_weights(tiny_folders, text, tmp_path, run_here):
    """Prune, then recover under a teacher; killed in the middle and given again, it ends with the same bytes."""
    recipe_values = values(tiny_folders("llama"), text, PRUNE, RECOVER)
    for name, die in [("whole", None), ("killed", "train.json"), ("killed", None)]:
        done = program(FSDP, "run", recipe=recipe_values, folder=str(tmp_path / name), die=die)
        assert (done.returncode == 0) == (die is None), done.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    _, results = run_here("llama", PRUNE, RECOVER)
    found = read_json(tmp_path / "whole" / "results.json")
    assert found["training"][0]["losses"] == pytest.approx(results["training"][0]["losses"], rel=1e-4)
    assert found["sparsity"]["of_decoder_linears"] == 0.5
    assert {t.dtype for t in tensors(tmp_path / "whole").values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PLAIN, FSDP], ids=["plain", "sharded"])
def test_nobody_waits_for_a_first_process_that_failed(launcher, tmp_path):
    """Were they to wait, the launch would run into its time limit."""
    done = program(launcher, "first_fails", folder=str(tmp_path))
    assert done.returncode != 0
    assert "Killed" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "changes", "message"),
    [
        ([*ACCELERATE, "--use_fsdp"], {}, "FSDP1, which training does not work with"),
        (FSDP, {}, "shards nothing on cpu"),
        (PLAIN, {"batch": 3}, "multiple of 2"),
        (PLAIN, {"learning_rate": 10**30, "clip": 10**30, "warmup": 0}, "lower `learning_rate`"),
    ],
    ids=["fsdp1", "cpu", "batch", "loss"],
)
def test_a_launch_that_cannot_work_is_one_message(launcher, changes, message, tiny_folders, text, tmp_path):
    path = tmp_path / "recipe.json"
    recipe_values = values(tiny_folders("llama"), text, RECOVER | {"loss": "cross_entropy"} | changes)
    path.write_text(json.dumps(recipe_values))
    done = launch([*launcher, "-m"], "llmcompress", "run", str(path), "--output", str(tmp_path / "out"))
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "set up for Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "set up for FSDP1.*--fsdp_version 2"),
    ],
)
def test_other_launches_are_refused(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match=message):
        sharding.start(cpu=True)


def test_options_of_fsdp_that_do_not_work_are_refused():
    from accelerate.utils import FullyShardedDataParallelPlugin

    sharding.check_plugin(FullyShardedDataParallelPlugin(fsdp_version=2))
    with pytest.raises(PlanError, match="gradient_checkpointing: true"):
        sharding.check_plugin(FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True))
    with pytest.raises(PlanError, match="fsdp_offload_params"):
        sharding.check_plugin(FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True))


def test_a_batch_is_shared_evenly_or_refused():
    assert share_of_batch(Recover(batch=8, micro_batch=2), 2) == 4
    for batch, processes in [(4, 3), (4, 4)]:
        with pytest.raises(CalibrationError, match=f"multiple of {2 * processes}"):
            share_of_batch(Recover(batch=batch, micro_batch=2), processes)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A group of one process, in which a slice is all."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_what_is_shared_out_comes_back_whole(alone):
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3, bias=False))
    model[1].weight = model[0].weight  # tied
    model[0].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = torch.ones(3, 4)
    assert sharding.shared_out(plain, model[0].weight) is plain
    fully_shard(model, mesh=alone)
    cut = sharding.shared_out(plain, model[0].weight)
    assert type(cut) is type(model[0].weight.data)
    assert torch.equal(sharding.whole(cut), plain)
    sharding.put_together(model, keep=True)
    after = dict(model.named_parameters())
    assert {name: type(p) for name, p in after.items()} == {name: torch.nn.Parameter for name in before}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model[0].weight is model[1].weight
    assert [p.requires_grad for p in model[0].parameters()] == [True, False]


TECHNIQUE = RECOVER | {"train": "rigl", "start": "random", "density": 0.3, "every": 1}
TECHNIQUES = {  # masks that move; that are drawn for each step; parameters of their own; weights that go back
    "rigl": TECHNIQUE,
    "dsa": RECOVER | {"train": "dsa", "keep": 0.8, "units": ["mlp_channel", "kv_group"], "begin": 0.0},
    "skeleton": RECOVER | {"train": "skeleton", "strength": 0.5, "density": 0.5},
    "lottery_ticket": RECOVER | {"train": "lottery_ticket", "rounds": 1, "rewind": 1, "steps": 8, "warmup": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_techniques_do_alike_in_every_process(technique, tiny_folders, text, tmp_path, run_here):
    """Two plain processes, killed in the middle and given again, and one: as many zeros, and the same losses.

    The curve is the mean over processes, so it would differ if the second one had other masks, gates or weights.
    """
    step = TECHNIQUES[technique] | {"loss": "cross_entropy"}
    recipe_values = values(tiny_folders("llama"), text, step)
    for name, die in [("whole", None), ("killed", "train.json"), ("killed", None)]:
        done = program(PLAIN, "run", recipe=recipe_values, folder=str(tmp_path / name), die=die)
        assert (done.returncode == 0) == (die is None), done.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    alone, found = (
        results["training"][0]
        for results in (run_here("llama", step)[1], read_json(tmp_path / "whole" / "results.json"))
    )
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    for key in ("density", "units", "kept"):
        assert found.get(key) == alone.get(key), key


@pytest.mark.slow
def test_a_technique_does_not_share_out_its_weights(tiny_folders, text, tmp_path):
    done = program(
        FSDP, "run", recipe=values(tiny_folders("llama"), text, TECHNIQUE), folder=str(tmp_path / "o"), die=None
    )
    assert done.returncode != 0
    assert "rigl ranks all weights of a matrix" in done.stderr
    assert not (tmp_path / "o").exists()
