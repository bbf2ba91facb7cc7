"""DeepSpeed: what its configuration may say, and launches of two processes on a CPU that learn what one learns.

The launches are slow and need the library, which is optional (the extra `deepspeed`).
"""

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sharded_program import BFLOAT16, CASES, learn
from test_sharded_training import ACCELERATE, PRUNE, RECOVER, program, tensors_of
from tiny_runs import digests, values

from llmcompress.errors import CalibrationError, PlanError
from llmcompress.files import read_json
from llmcompress.training import Recover, deepspeed, sharding

STAGES = {1: ["pruned"], 2: [*CASES, BFLOAT16]}  # and the cases that each learns
WHOLE = [(stage, case) for stage, cases in STAGES.items() for case in cases]
IDS = [f"zero{stage}-{case}" for stage, case in WHOLE]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def zero(stage: int) -> list[str]:
    """A launcher."""
    return [*ACCELERATE, "--use_deepspeed", "--zero_stage", str(stage)]


def configuration(**changes: Any) -> dict[str, Any]:
    """What accelerate hands over of a plain launch."""
    nothing = {"device": "none", "nvme_path": None}
    automatic = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"]
    return (
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": nothing, "offload_param": nothing},
            "gradient_accumulation_steps": 1,
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
        }
        | dict.fromkeys(automatic, "auto")
        | changes
    )


def test_the_configuration_of_a_plain_launch_is_taken():
    deepspeed.check_configuration(configuration())
    deepspeed.check_configuration({"zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3.*--zero_stage 2"),
        ({"zero_optimization": {}}, "ZeRO stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: cpu"),
        ({"fp16": {"enabled": True}}, "fp16.*`precision`"),
        ({"bf16": {"enabled": True}}, "bf16.*`precision`"),
        ({"gradient_clipping": 0.5}, "gradient_clipping.*`clip`"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4.*`micro_batch`"),
        ({"train_batch_size": 8}, "train_batch_size.*`batch`"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.*`learning_rate`"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.*`warmup`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_recipe_says_is_refused_in_a_configuration(changes, message):
    with pytest.raises(PlanError, match=message):
        deepspeed.check_configuration(configuration(**changes))


def test_the_recipe_is_told_to_deepspeed():
    options = Recover(batch=12, micro_batch=2, clip=0.5, precision="bfloat16")
    found = deepspeed.settings(options, 3)
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (12, 2)
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.5
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert not deepspeed.settings(Recover(precision="float32"), 1)["torch_autocast"]["enabled"]


def test_a_configuration_is_as_before_when_an_engine_is_made():
    made: dict[str, Any] = configuration()
    plugin = SimpleNamespace(deepspeed_config=made, hf_ds_config=SimpleNamespace(config=made))
    with deepspeed.told(plugin, {"gradient_clipping": 0.5}):
        assert plugin.deepspeed_config["gradient_clipping"] == 0.5
        plugin.deepspeed_config["zero_optimization"]["stage"] = 1
    assert plugin.deepspeed_config == configuration()
    assert plugin.hf_ds_config.config is plugin.deepspeed_config
    assert made["gradient_clipping"] == 0.5  # which the engine goes on reading


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_a_launch_without_the_library_is_refused(monkeypatch):
    monkeypatch.setenv(deepspeed.SWITCH, "true")
    with pytest.raises(PlanError, match=r"not installed.*pip install"):
        sharding.start(cpu=True)


def test_techniques_do_not_share_out_their_weights(monkeypatch):
    monkeypatch.setenv(deepspeed.SWITCH, "true")
    with pytest.raises(PlanError, match="DeepSpeed, and rigl ranks all weights"):
        sharding.refuse_sharing("rigl")


class Engine:
    """As much of DeepSpeed's as `Zero` asks for."""

    def __init__(self, norm: float) -> None:
        adam = SimpleNamespace(state={})
        self.optimizer: Any = SimpleNamespace(scaled_global_norm=lambda: norm, optimizer=adam, param_groups=[])
        self.optimizer._lazy_init_hp_params_optimizer_state = lambda: None
        self.calls: list[Any] = []
        self.set_gradient_accumulation_boundary = self.calls.append
        self.backward = lambda loss, scale_wrt_gas: self.calls.append((float(loss), scale_wrt_gas))
        self.step = lambda: self.calls.append("step")
        self.was_step_applied = lambda: norm < math.inf


def zero_of(norm: float, **options: Any) -> deepspeed.Zero:
    """`Zero` of two processes with such an engine."""
    found = deepspeed.Zero(SimpleNamespace(num_processes=2), Recover(**options))
    found.engine = Engine(norm)
    return found


def test_only_the_last_pass_of_a_step_completes_its_gradient():
    found = zero_of(1.0, batch=4, micro_batch=1)
    for loss in (1.0, 2.0, 3.0):
        found.backward(torch.tensor(loss))
    assert found.engine.calls == [False, (1.0, False), True, (2.0, False), False, (3.0, False)]
    assert found.num_processes == 2  # of accelerate


def test_a_gradient_that_is_no_number_is_infinite_and_takes_no_step():
    assert float(zero_of(0.5).clip_grad_norm_([], 1.0)) == 0.5
    assert float(zero_of(math.inf).clip_grad_norm_([], 1.0)) == math.inf
    deepspeed.ZeroOptimizer(zero_of(0.5).engine).step()
    with pytest.raises(CalibrationError, match="lower `learning_rate`"):
        deepspeed.ZeroOptimizer(zero_of(math.inf).engine).step()


def test_moments_of_all_groups_are_there_when_they_are_linked():
    engine, slices = Engine(1.0), [torch.nn.Parameter(torch.ones(count)) for count in (6, 2)]
    engine.optimizer.param_groups = [{"params": [slice_]} for slice_ in slices]
    seen: list[int] = []
    states = engine.optimizer.optimizer.state
    engine.optimizer._lazy_init_hp_params_optimizer_state = lambda: seen.append(len(states))
    deepspeed.ZeroOptimizer(engine)
    assert seen == [2]
    assert all(sorted(states[slice_]) == ["exp_avg", "exp_avg_sq", "step"] for slice_ in slices)
    assert all(states[slice_]["exp_avg"].shape == slice_.shape for slice_ in slices)


def test_masks_clear_gradients_on_their_way():
    found, weight, mask = zero_of(1.0), torch.nn.Parameter(torch.ones(2, 2)), torch.eye(2, dtype=torch.bool)
    found.accelerator.free_memory = lambda: None
    found.hold({"w": weight}, {"w": mask})
    (3 * weight).sum().backward()
    assert torch.equal(weight.grad, 3 * torch.eye(2))
    found.free_memory()
    weight.sum().backward()
    assert torch.equal(weight.grad, 3 * torch.eye(2) + 1)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Stage -> folder of all cases that two processes learn in it."""

    @cache
    def folder(stage: int) -> Path:
        found = tmp_path_factory.mktemp(f"stage{stage}")
        done = program(zero(stage), "learn", folder=str(found), cases=STAGES[stage])
        assert done.returncode == 0, done.stderr
        return found

    return folder


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "case"), WHOLE, ids=IDS)
def test_two_processes_learn_what_one_does(stage, case, launched, tmp_path):
    folder = launched(stage) / f"{case}-whole"
    alone, wanted = learn(case, tmp_path)
    seen = read_json(folder / "seen.json")
    assert seen["wrapped"] == "DeepSpeedEngine"
    assert seen["windows"] == alone["windows"] / 2
    assert seen["losses"][0] == pytest.approx(
        alone["losses"][0], rel=1e-6
    )  # of the same weights, in the same precision
    assert seen["losses"] == pytest.approx(alone["losses"], rel=2**-8 if case == BFLOAT16 else 1e-4)
    found = tensors_of(folder / "learned.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Adam divides by the size of a gradient: where that is about rounding, a step may differ by its whole length.
        apart = (found[name] - value).abs()
        assert apart.max() <= 4 * 2e-3, name
        assert case == BFLOAT16 or apart.mean() <= 1e-5, name
    if case == "pruned":
        zeros = [name for name in wanted if "_proj" in name]
        assert zeros
        assert all(torch.equal(found[name] == 0, wanted[name] == 0) for name in zeros)
        assert all(int((found[name] == 0).sum()) > 0.4 * found[name].numel() for name in zeros)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "case"), WHOLE, ids=IDS)
def test_a_killed_training_continues_to_the_same_bytes(stage, case, launched):
    whole, killed = (launched(stage) / f"{case}-{way}" for way in ("whole", "killed"))
    assert (killed / "learned.safetensors").read_bytes() == (whole / "learned.safetensors").read_bytes()
    seen = [read_json(folder / "seen.json") for folder in (killed, whole)]
    assert seen[0]["losses"] == seen[1]["losses"]
    assert seen[0]["windows"] == seen[1]["windows"] / 2  # it went on from the middle


@needs_deepspeed
@pytest.mark.slow
def test_a_gradient_that_is_no_number_ends_the_launch(tmp_path):
    done = program(zero(2), "unknown", folder=str(tmp_path))
    assert done.returncode != 0
    assert "CalibrationError" in done.stderr
    assert "lower `learning_rate`" in done.stderr
    assert len(read_json(tmp_path / "train.json")["losses"]) == 2  # those before


@needs_deepspeed
@pytest.mark.slow
def test_a_whole_run(tiny_folders, text, tmp_path, run_here):
    """Prune, then recover under a teacher; killed in the middle and given again, it ends with the same bytes."""
    recipe_values = values(tiny_folders("llama"), text, PRUNE, RECOVER)
    for name, die in [("whole", None), ("killed", "train.json"), ("killed", None)]:
        done = program(zero(2), "run", recipe=recipe_values, folder=str(tmp_path / name), die=die)
        assert (done.returncode == 0) == (die is None), done.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    _, results = run_here("llama", PRUNE, RECOVER)
    found = read_json(tmp_path / "whole" / "results.json")
    assert found["training"][0]["losses"] == pytest.approx(results["training"][0]["losses"], rel=1e-4)
    assert found["sparsity"]["of_decoder_linears"] == 0.5
