"""Predictions of structure and train steps: against sums by hand, and that more work is said to take more."""

import io
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_tiny
from rich.console import Console
from tiny_runs import recipe, write_hollow, write_shape

from llmcompress import cost
from llmcompress.cost import LIBRARIES, Phase, cost_of
from llmcompress.errors import PlanError
from llmcompress.machine import check_memory
from llmcompress.source import open_source
from llmcompress.stages import plan_stages
from llmcompress.structure_budget import StructurePlan
from llmcompress.tables import plan_tables

WIDTH = {"structure": "mlp_channel", "ratio": 0.25, "of": "group"}
DEPTH = {"structure": "block", "ratio": 0.5, "of": "decoder"}
RECOVER = {"train": "recover", "loss": {"distillation": 1, "hidden": 1}}
SPEED = 1e11  # of the machine, as it is told here


@pytest.fixture(autouse=True)
def _a_machine_of_known_speed(monkeypatch):
    monkeypatch.setattr(cost, "cpu_speed", lambda: SPEED)
    monkeypatch.setattr(cost, "cpu_gain", lambda dtype: 1.0)


@pytest.fixture
def planned(tiny_folders, text) -> Any:
    """The plan of the last of some steps, with so many windows of 64 tokens."""

    def go(*steps: dict[str, Any], model: Path | None = None, samples: int = 64, length: int = 64, **more: Any) -> Any:
        calibration = {"data": str(text), "samples": samples, "length": length}
        made = recipe(model or tiny_folders("llama"), text, *steps, calibration=calibration, **more)
        return plan_stages(made, open_source(made.model))[-1][1]

    return go


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_largest_phase_decides_the_memory_and_all_add_up_in_time_and_disk(on_cpu):
    plan: Any = SimpleNamespace(on_cpu=on_cpu, source=SimpleNamespace(fetch_bytes=3))
    found = cost_of(plan, 100, [Phase(5, 1.0, 10), Phase(7, 2.0), Phase(6, 0.0, 20)])
    assert found.peak_host_bytes == LIBRARIES + 7
    assert found.peak_device_bytes == (0 if on_cpu else 7)
    assert (found.output_bytes, found.disk_bytes) == (100, 100 + 30 + 3)
    assert found.seconds == cost.START + 3


STEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "magnitude": (WIDTH | {"score": "magnitude"},),
    "fluctuation": (WIDTH | {"score": "fluctuation"},),
    "taylor": (WIDTH | {"score": {"method": "taylor", "samples": 4000}},),
    "mean": (WIDTH | {"score": "magnitude", "structure": "kv_group", "ratio": 0.5, "compensate": "mean"},),
    "block_influence": (DEPTH | {"score": "block_influence"},),
    "hidden": (WIDTH | {"structure": "hidden", "score": "activation"},),
    "recover": (WIDTH | {"score": "magnitude"}, RECOVER | {"steps": 4000}),
}


@pytest.mark.parametrize("name", STEPS)
def test_more_text_takes_more(name, planned):
    small, large = (planned(*STEPS[name], samples=samples).predicted for samples in (4, 4000))
    assert large.seconds > small.seconds
    assert large.disk_bytes > small.disk_bytes
    if name != "recover":  # whose memory is that of a window
        assert large.peak_host_bytes > small.peak_host_bytes
    assert large.output_bytes == small.output_bytes


def test_scores_that_look_at_more_take_more(planned):
    taylor = {"method": "taylor", "samples": 64}
    found = [planned(WIDTH | {"score": score}).scoring for score in ("magnitude", "fluctuation", taylor)]
    assert [phase.seconds for phase in found] == sorted({phase.seconds for phase in found})
    assert found[0].memory < found[1].memory
    assert [phase.disk > 0 for phase in found] == [False, False, True]
    assert planned(WIDTH | {"zeros": True, "ratio": None, "of": "group"}).scoring == Phase()
    assert planned(DEPTH | {"score": "random"}).scoring == Phase()


def test_units_that_are_judged_beside_all_others_take_the_square_of_their_number(planned):
    alone, beside = (planned(WIDTH | {"score": name}).scoring.seconds for name in ("magnitude", "geometric_median"))
    assert alone == 0
    assert beside == pytest.approx(2 * 2 * 160**2 * 3 * 96 / SPEED)  # two blocks; 3 x 96 weights of each channel


def test_greedy_holds_all_candidates_and_the_logits_of_a_window(planned, tmp_path):
    """What is inside a block, or the head with logits in float32 twice, whichever is larger."""
    copies = 3 * 8 * 64 * 96 * 2  # the whole model and two candidates; 8 windows of 64 tokens, 96 wide, in bfloat16
    plan = planned(DEPTH | {"score": "greedy"})
    assert plan.scoring.memory == 2 * cost.block_bytes(plan) + copies + cost.passing_bytes(plan)
    many = planned(DEPTH | {"score": "greedy"}, model=write_tiny(tmp_path / "many", "llama", vocab_size=50_000))
    assert many.scoring.memory == 50_000 * 96 * 2 + copies + 2 * 4 * 64 * 50_000


def test_least_squares_takes_a_pass_a_gram_matrix_and_its_solution(planned):
    """Beside leaving the consumer as it is; 160 -> 120 channels in both blocks, 64 x 64 tokens."""
    step = WIDTH | {"score": "fluctuation"}
    without, mean, solved = (
        planned(step | {"compensate": how}).predicted.seconds for how in ("none", "mean", "least_squares")
    )
    tokens, weights = 64 * 64, 2 * (3 * 160 * 96 + 2 * 96 * 96 + 2 * 32 * 96)
    gather = 1.6 * 2 * tokens * weights + 2 * 1.3 * tokens * 160**2
    solve = 2 * 2 * (120**3 / 3 + 2 * 120**2 * 40 + 2 * 96 * 120 * 40)
    assert mean - without == pytest.approx(gather / SPEED)
    assert solved - mean == pytest.approx(solve / SPEED)


def test_scoring_by_gradients_at_the_shape_of_an_8b_model(planned, tmp_path):
    """By hand, in 10⁹ bytes: the MLP of a block has 0.176 of weights, the whole block 0.218."""
    step = WIDTH | {"score": {"method": "taylor", "samples": 32}, "ratio": 0.2, "multiple": 128}
    plan = planned(step, model=write_hollow(tmp_path / "8b"), samples=512, length=128)
    hidden = 32 * 128 * 4096 * 4 / 1e9
    walk = 6 * 0.2181 + 12 * 0.17616 + 2 * hidden + 12 * 128 * 81920 / 1e9  # block; moments, gradient; both ends
    judging = 4 * 0.2181 + 16 * 0.17616 + 4 * 0.05872 + 2 * hidden  # block; moments, weights, scores; one more of these
    assert plan.scoring.memory / 1e9 == pytest.approx(max(walk, judging), rel=0.001)
    assert plan.scoring.disk == 32 * 32 * 128 * 4096 * 4
    assert plan.scoring.seconds == pytest.approx(4 * 2 * 32 * 128 * 32 * 0.2181e9 / SPEED, rel=0.001)
    solving = 4 * 14336**2 + 16 * 11520 * 14336 + 12 * 14336 * 4096  # the Gram matrix; four in float64; the consumer
    changing = 4 * 0.2181 + 512 * 128 * 4096 * 2 / 1e9 + solving / 1e9
    assert (plan.predicted.peak_host_bytes - LIBRARIES) / 1e9 == pytest.approx(changing, rel=0.001)


def test_what_scoring_takes_is_told(planned):
    plan = planned(WIDTH | {"score": "taylor"})
    assert isinstance(plan, StructurePlan)
    told = plan.plain()["scoring"]
    assert told == {
        "memory_bytes": int(plan.scoring.memory),
        "seconds": plan.scoring.seconds,
        "disk_bytes": plan.scoring.disk,
    }
    assert "scoring alone" in shown(plan)
    assert "scoring alone" not in shown(planned(WIDTH | {"score": "magnitude"}))


@pytest.mark.parametrize(
    ("step", "advice"),
    [
        (WIDTH | {"score": "taylor"}, "shorter ones, a score without gradients, or raise max_memory"),
        (WIDTH | {"score": "magnitude"}, "shorter ones, `compensate: none`, or raise max_memory"),
        (DEPTH | {"score": "greedy"}, "shorter ones, or raise max_memory"),
    ],
)
def test_too_little_memory_says_what_would_need_less(step, advice, planned):
    with pytest.raises(PlanError, match=advice):
        check_memory(planned(step, max_memory="600MiB"))


def test_a_narrower_model_takes_less_to_train_and_lora_still_less(planned):
    def memory(*steps: dict[str, Any]) -> int:
        return int(planned(*steps).predicted.peak_host_bytes)

    narrow = WIDTH | {"score": "magnitude", "ratio": 0.5}
    text = {"train": "recover", "loss": "cross_entropy"}
    whole, small, lora, recomputed = (
        memory(text),
        memory(narrow, text),
        memory(narrow, text | {"parameters": "lora"}),
        memory(narrow, text | {"parameters": "lora", "gradient_checkpointing": True}),
    )
    assert whole > small > lora > recomputed


def test_recovery_of_smollm2_needs_what_was_measured(planned, tmp_path):
    """3.58 GiB for passes of four windows of 512 tokens, at MLPs of 1024 channels (evals/compare_recovery.py)."""
    sizes = {"hidden_size": 576, "intermediate_size": 1024, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 512}
    model = write_shape(tmp_path / "model", **sizes, **heads)
    step = {"train": "recover", "loss": "cross_entropy", "steps": 200, "batch": 4, "micro_batch": 4}
    whole = planned(step, model=model, length=512)
    assert whole.predicted.peak_host_bytes == pytest.approx(3.58 * 2**30, rel=0.1)
    apart = planned(step | {"micro_batch": 1}, model=model, length=512).predicted.peak_host_bytes
    recomputed = planned(step | {"gradient_checkpointing": True}, model=model, length=512).predicted.peak_host_bytes
    assert apart < whole.predicted.peak_host_bytes
    assert recomputed < whole.predicted.peak_host_bytes


def test_what_training_leaves_behind_in_blocks_that_differ_is_theirs(planned):
    """One of two blocks has half its MLP: less than where both are whole, more than where both have half."""
    text = {"train": "recover", "loss": "cross_entropy", "micro_batch": 4}

    def window(**options: Any) -> float:
        plan = planned(WIDTH | {"score": "magnitude", "ratio": 0.25} | options, text)
        parameters = sum(prod(info.shape) for info in plan.source.tensors.values())
        return float(plan.predicted.peak_host_bytes - LIBRARIES - 14 * parameters)

    whole = window(ratio=0.0125)  # 158 of 160 channels
    both, one = window(ratio=0.5), window(protect_first=1)
    assert both < one < whole


def shown(plan: Any) -> str:
    """The tables of `plan` as text."""
    console = Console(width=300, file=io.StringIO())
    for table in plan_tables(plan):
        console.print(table)
    return " ".join(console.file.getvalue().split())
