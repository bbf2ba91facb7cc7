"""Lottery tickets and Early-Bird tickets: densities, weights that go back to the bit, and draws that settle."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_techniques import SHORT
from test_unit_techniques import learn, uneven, values
from torch import Tensor

from llmcompress.errors import NumericalError, RecipeError
from llmcompress.recipe import parse_step
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.techniques.early_bird import difference
from llmcompress.training.techniques.lottery_ticket import LotteryTicket

TICKET = {"train": "lottery_ticket", "steps": 14, "rounds": 3, "rewind": 2}  # trainings of 5, 3, 3 and 3 steps
BIRD = {"train": "early_bird", "ratio": 0.25, "every": 1, "window": 3, "distance": 0.05, "learning_rate": 1e-4}
NAME = "model.layers.0.mlp.up_proj.weight"
Weights = dict[str, Tensor]


# lottery tickets


@given(steps=st.integers(4, 400), rounds=st.integers(1, 9), rewind=st.integers(0, 60))
def test_trainings_share_the_steps_and_begin_where_they_should(steps, rounds, rewind):
    values = {"steps": steps, "rounds": rounds, "rewind": rewind, "warmup": 0}
    if (steps - rewind) // (rounds + 1) < 1:
        with pytest.raises(RecipeError, match=f"use at least {rewind + rounds + 1}"):
            LotteryTicket.parse(values, "")
        return
    options = LotteryTicket.parse(values, "")
    places = [options.place(step) for step in range(steps)]
    begins = [within for n, (training, within, _) in enumerate(places) if n == 0 or training != places[n - 1][0]]
    ends = [within + 1 == length for n, (training, within, length) in enumerate(places)]
    assert begins == [0] + [rewind] * rounds
    assert sum(ends) == rounds + 1
    assert ends[-1]
    assert places[-1][0] == rounds


def trained(state: Path, step: dict[str, Any]) -> tuple[Weights, Technique, list[Weights], list[list[Tensor]]]:
    """Weights in the end, the technique, weights after every step, and Adam's moments of all matrices after it."""
    after: list[Weights] = []
    moments: list[list[Tensor]] = []

    def watch(step: int, technique: Technique, learner: Learner) -> None:
        after.append(values(learner.model))
        moments.append([m.clone() for weight in learner.weights.values() for m in learner.moments(weight)])

    model, technique, _ = learn(state, step, watch)
    return values(model), technique, after, moments


@pytest.mark.parametrize("rewind", [0, 1, 2])
def test_weights_go_back_to_the_bit(rewind, tmp_path):
    """All parameters, to those of a dense training after as many steps of the same schedule: masks are what differs."""
    step = TICKET | {"rewind": rewind}
    options = parse_step(SHORT | step, "").options
    dense = trained(tmp_path / "dense", {"train": "dense", "steps": options.first})[2]
    wanted = dense[rewind - 1] if rewind else values(tiny_model("llama"))
    _, technique, after, moments = trained(tmp_path / "ticket", step)
    assert torch.equal(after[options.first - 2][NAME], dense[options.first - 2][NAME])  # the first one is a dense one
    ends = [n for n in range(13) if options.place(n)[0] != options.place(n + 1)[0]]
    assert len(ends) == 3
    for rounds, end in enumerate(ends, 1):
        left = 0
        for name, weight in after[end].items():
            stay = weight != 0 if name in technique.masks else torch.ones_like(weight, dtype=torch.bool)
            assert torch.equal(weight, wanted[name] * stay), (end, name)
            left += int(stay.sum()) if name in technique.masks else 0
        assert left == round(0.8**rounds * sum(mask.numel() for mask in technique.masks.values()))
        assert not any(bool(moment.any()) for moment in moments[end])
        assert not torch.equal(after[end + 1][NAME], after[end][NAME])  # and learn on


def test_the_density_is_that_of_the_rounds_over_all_matrices_together(tmp_path):
    _, technique, after, _ = trained(tmp_path, TICKET)
    total = sum(mask.numel() for mask in technique.masks.values())
    for n, rounds in [(3, 0), (4, 1), (7, 2), (10, 3), (13, 3)]:
        left = sum(int(after[n][name].count_nonzero()) for name in technique.masks)
        assert left == round(0.8**rounds * total), n
    assert technique.record()["density"] == pytest.approx(0.512, abs=1 / total)
    assert len({float(mask.float().mean()) for mask in technique.masks.values()}) > 1  # one ranking, unlike shares


def test_what_went_stays_away_and_is_the_smallest(tmp_path):
    sizes: list[Weights] = []

    def watch(step: int, technique: Technique, learner: Learner) -> None:
        sizes.append({name: mask.clone() for name, mask in technique.masks.items()})

    learn(tmp_path, TICKET, watch)
    for before, after in itertools.pairwise(sizes):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    _, technique, after, _ = trained(tmp_path / "again", TICKET | {"rounds": 1, "steps": 6, "back": "rate"})
    kept = torch.cat([after[3][name].abs()[mask] for name, mask in technique.masks.items()])
    assert float(kept.min()) > 0


def with_a_small_matrix() -> Any:
    """A tiny model with a matrix whose weights are all smaller than those of any other."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(NAME).mul_(1e-6)
    return model


def test_no_matrix_loses_all_its_weights(tmp_path):
    """It keeps a tenth of an even share, its own largest, and the total is the same."""
    step = TICKET | {"rounds": 1, "steps": 6, "fraction": 0.8, "learning_rate": 1e-6}
    _, technique, _ = learn(tmp_path / "some", step, model=with_a_small_matrix())
    mask = technique.masks[NAME]
    assert int(mask.sum()) == int(0.1 * (1 - 0.8) * mask.numel())
    assert technique.record()["density"] == pytest.approx(0.2, abs=1e-5)
    with pytest.raises(NumericalError, match=f"{NAME}: none of its 15,360 scores .* use a larger `least`"):
        learn(tmp_path / "none", step | {"least": 0.0}, model=with_a_small_matrix())


def test_going_back_in_rate_alone_keeps_what_was_learned(tmp_path):
    _, technique, after, _ = trained(tmp_path, TICKET | {"back": "rate"})
    early, late = after[1][NAME], after[4][NAME]
    assert not torch.equal(late, early * (late != 0))
    assert technique.schedule(4) == (4, 5)
    assert technique.schedule(5) == (2, 5)


def test_the_same_seed_gives_the_same_ticket(tmp_path):
    records = [trained(tmp_path / str(n), TICKET)[1].record()["mask_sha256"] for n in range(2)]
    assert records[0] == records[1]
    assert trained(tmp_path / "other", TICKET | {"seed": 1})[1].record()["mask_sha256"] != records[0]


@pytest.mark.parametrize("step", [TICKET, TICKET | {"rewind": 0}, TICKET | {"back": "rate"}, BIRD], ids=str)
def test_a_training_that_stopped_continues_to_the_same_bytes(step, tmp_path):
    """Right after it has gone back, too."""

    def stop(at: int) -> Any:
        def watch(step: int, *_: Any) -> None:
            if step == at:
                raise KeyboardInterrupt

        return watch

    step = step | {"checkpoint_every": 1}
    whole, technique, _ = learn(tmp_path / "whole", step)
    for at in (4, 5, 8):
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "again", step, stop(at))
    again, other, _ = learn(tmp_path / "again", step)
    assert all(torch.equal(value, values(again)[key]) for key, value in values(whole).items())
    assert technique.record() == other.record()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (TICKET | {"steps": 5, "warmup": 0}, "5 steps are too few for 4 trainings"),
        (TICKET | {"warmup": 5}, "the learning rate would rise for 5 steps of 5"),  # of the later ones, 2 + 3
        (BIRD | {"begin": 0.9, "until": 0.5, "warmup": 0}, "it would end before it starts"),
    ],
)
def test_a_bad_schedule_is_one_message(step, message):
    with pytest.raises(RecipeError, match=message):
        parse_step(step, "steps[0]")


# Early-Bird tickets


def test_the_distance_of_draws():
    draw = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False])}
    other = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([True, False])}
    assert difference(draw, draw) == 0
    assert difference(draw, other) == pytest.approx(2 / 6)


def test_a_ticket_is_drawn_when_draws_agree(tmp_path):
    """Channels of very unlike size, and steps that are small: four draws are three distances."""
    records = []
    for n in range(2):
        _, technique, _ = learn(tmp_path / str(n), BIRD, model=uneven())
        records.append(technique.record())
    found = records[0]["early_bird"]
    assert records[0] == records[1]
    assert (found["settled"], found["ticket"]) == (True, 4)  # draws after steps 1, 2, 3 and 4
    assert len(found["distances"]) == 3
    assert max(found["distances"]) < 0.05
    assert records[0]["units"]["mlp_channel"] == {"zero": 80, "of": 320}


def test_draws_come_nearer_to_each_other_while_a_model_learns(tmp_path):
    """From random weights, and however long training takes: a ticket is never taken before the end."""
    step = BIRD | {"window": 99, "steps": 60, "learning_rate": 1e-2, "until": 1.0, "begin": 0.0}
    _, technique, _ = learn(tmp_path, step)
    found = technique.record()["early_bird"]["distances"]
    third = len(found) // 3
    parts = [sum(found[n * third : (n + 1) * third]) / third for n in range(3)]
    assert parts[0] > 2 * parts[1] > 0
    assert parts[0] > 4 * parts[2]


def test_without_agreement_the_last_draw_is_taken_and_the_record_says_so(tmp_path):
    _, technique, _ = learn(tmp_path, BIRD | {"window": 50})
    found = technique.record()["early_bird"]
    assert (found["settled"], found["ticket"]) == (False, 9)
    assert technique.record()["units"]["mlp_channel"]["zero"] == 80
