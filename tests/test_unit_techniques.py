"""Techniques that take units, stripes and halves of four away while a model learns: exact zeros, counts and budgets."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_techniques import SHORT, SPARSE, loss
from tiny_runs import logits, reloaded, tensors
from torch import Tensor

from llmcompress import arch, building
from llmcompress.arch import discover, find_couplings
from llmcompress.errors import PlanError, RecipeError
from llmcompress.mask import Pattern, follows
from llmcompress.recipe import parse_step
from llmcompress.structure import groups
from llmcompress.training import TRAININGS, stripes
from llmcompress.training.loop import Task, train
from llmcompress.training.state import Curve
from llmcompress.training.stripes import pack_stripes, stripes_product
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.techniques.dsa import SLACK, Ledger, probabilities
from llmcompress.training.techniques.geometric_median import staying
from llmcompress.training.techniques.group_lasso import shrinkage
from llmcompress.training.techniques.l0 import hard_concrete, open_share, shift_to
from llmcompress.training.techniques.proximal_24 import shrunk, triples
from llmcompress.training.units import lowest, units_in
from llmcompress.training_job import prepared

LASSO = {
    "train": "group_lasso", "units": ["mlp_channel", "kv_group", "attention", "mlp"], "strength": 2.0,
    "learning_rate": 1e-3,
}  # fmt: skip
DSA = {"train": "dsa", "keep": 0.8, "units": ["mlp_channel", "kv_group"]}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "group_lasso": LASSO,
    "geometric_median": {"train": "geometric_median", "ratio": 0.25, "every": 3},
    "growing_l2": {"train": "growing_l2", "ratio": 0.25, "every": 2, "ceiling": 100.0},
    "l0": {"train": "l0", "ratio": 0.25, "speed": 50.0},
    "dsa": DSA,
    "proximal_24": {"train": "proximal_24", "every": 2},
    "skeleton": {"train": "skeleton", "strength": 0.5, "threshold": 0.6},
}
EVERY = SPARSE | TECHNIQUES
EVERY |= {
    "dense": {"train": "dense"},
    "lottery_ticket": {"train": "lottery_ticket", "rounds": 2, "rewind": 2},
    "early_bird": {"train": "early_bird", "ratio": 0.25, "every": 1},
}
COMPILED = ["dense", "rigl", "group_lasso", "skeleton", "l0", "dsa"]
UNITS = [name for name in TECHNIQUES if name not in ("proximal_24", "skeleton")]
END = 9  # the step after which nothing goes any more, of 12
CHANNELS = "model.layers.{}.mlp.{}_proj.weight"

Watch = Callable[[int, Technique, Learner], None]


@pytest.fixture(autouse=True, scope="module")
def _observed_once():
    """What couples which rows is seen on a tiny model of the same class, whatever the sizes are."""
    known: dict[str, Any] = {}

    def once(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def found(model: Any) -> Any:
            key = f"{find.__name__} {type(model).__name__} {model.config.to_json_string()}"
            if key not in known:
                known[key] = find(model)
            return known[key]

        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "find_couplings", once(find_couplings))
        for module in (arch, building):
            patch.setattr(module, "discover", once(discover))
        yield


def uneven(kind: str = "llama") -> Any:
    """A tiny model whose MLP channels differ in size, from a tenth to all."""
    model = tiny_model(kind)
    with torch.no_grad():
        for units in units_in(model, ("mlp_channel",)):
            units.scale(torch.linspace(0.1, 1, units.count))
    return model


def learn(state: Path, step: dict[str, Any], watch: Watch = lambda *_: None, model: Any = None) -> tuple[Any, ...]:
    """A tiny model after the loop, its technique and its losses; `watch` sees what each step has left."""
    options = parse_step(SHORT | step, "steps[0]").options
    model, technique = prepared(model or tiny_model("llama"), options, keep=[]), options.technique()
    targets = tuple(name for name, _ in model.named_parameters() if "_proj" in name)
    state.mkdir(exist_ok=True)
    seen: list[Learner] = []
    prepare = technique.prepare

    def remembered(learner: Learner) -> None:
        seen.append(learner)
        prepare(learner)

    technique.prepare = remembered
    task = Task(8, 16, loss, {}, cpu=True, technique=technique, targets=targets)
    curve: Curve = train(model, options, task, state, lambda done, _: watch(done - 1, technique, seen[0]))
    return model, technique, curve


def values(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# what all have in common


@pytest.mark.parametrize("name", TECHNIQUES)
def test_what_went_is_zero_from_then_on_and_nothing_is_left_in_the_model(name, tmp_path):
    before: dict[str, Tensor] = {}
    last: list[Tensor] = []

    def watch(step: int, technique: Technique, learner: Learner) -> None:
        for key, mask in technique.masks.items():
            parameter = learner.model.get_parameter(key)
            assert not (mask & ~before.get(key, mask)).any(), (step, key)  # what went stays away
            assert not parameter[~mask].any(), (step, key)
            for moment in learner.moments(parameter):
                assert not moment[~mask].any(), (step, key)
        assert bool(technique.masks) or step < END or name == "group_lasso"
        before.update(technique.masks)
        if step == 11:
            last.append(logits(learner.model))

    model, technique, curve = learn(tmp_path, TECHNIQUES[name], watch, uneven())
    assert curve.losses[-1] < curve.losses[0]
    torch.testing.assert_close(logits(model), last[0], rtol=1e-5, atol=1e-5)  # gates and stripes are in the weights
    assert set(values(model)) == set(values(tiny_model("llama")))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny_model("llama").modules()}
    assert json.dumps(technique.record())


def other_way(name: str, state: Path, **changes: Any) -> tuple[list[float], list[float]]:
    """Losses of a short training, and of the same in another way."""
    step = EVERY[name] | {"learning_rate": 1e-3}
    found = []
    for way in ({}, changes):
        model = tiny_model("llama", num_hidden_layers=1)
        found.append(learn(state / str(len(found)), step | way, model=model)[2].losses)
    return found[0], found[1]


def test_every_technique_is_learned_in_other_ways_too():
    assert {step["train"] for step in EVERY.values()} == set(TRAININGS) - {"recover", "masked"}


@pytest.mark.parametrize("name", EVERY)
def test_micro_batches_and_checkpoints_change_nothing(name, tmp_path):
    """Gates and masks that are drawn are the same for all windows of a step, and when blocks are computed again."""
    plain, other = other_way(name, tmp_path, gradient_checkpointing=True, micro_batch=1)
    assert other == pytest.approx(plain, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_change_nothing(name, tmp_path):
    plain, other = other_way(name, tmp_path, compile=True)
    assert other == pytest.approx(plain, rel=2e-4)


@pytest.mark.parametrize("name", ["l0", "dsa"])
def test_gates_do_nothing_before_their_time(name, tmp_path):
    """Up to the step after which it begins the curve is that of dense training, to the bit."""
    losses = learn(tmp_path / name, TECHNIQUES[name] | {"begin": 0.5})[2].losses
    dense = learn(tmp_path / "dense", {"train": "dense"})[2].losses
    assert losses[:7] == dense[:7]
    assert losses[7] != dense[7]


@pytest.mark.parametrize("name", [n if n == "l0" else pytest.param(n, marks=pytest.mark.slow) for n in TECHNIQUES])
def test_a_training_that_stopped_continues_to_the_same_bytes(name, tmp_path):
    """Once while things go, and once after."""

    def stop(at: int) -> Watch:
        def watch(step: int, *_: Any) -> None:
            if step == at:
                raise KeyboardInterrupt

        return watch

    step = TECHNIQUES[name] | {"checkpoint_every": 5}
    whole, technique, _ = learn(tmp_path / "whole", step)
    for at in (7, 11):
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "again", step, stop(at))
    again, other, _ = learn(tmp_path / "again", step)
    assert all(torch.equal(value, values(again)[key]) for key, value in values(whole).items())
    assert technique.record() == other.record()


def counts(model: Any, kind: str) -> list[int]:
    """Units of each block that are zero."""
    return [int(units.zero().sum()) for units in units_in(model, (kind,))]


@pytest.mark.parametrize("name", ["geometric_median", "growing_l2"])
def test_every_block_loses_the_same_share(name, tmp_path):
    model, technique, _ = learn(tmp_path, TECHNIQUES[name] | {"units": ["mlp_channel", "query_head"], "ratio": 0.3})
    assert counts(model, "mlp_channel") == [48, 48]
    assert counts(model, "query_head") == [1, 1]
    assert technique.record()["units"] == {"mlp_channel": {"zero": 96, "of": 320}, "query_head": {"zero": 2, "of": 6}}


# group lasso


def test_the_proximal_step_of_a_norm():
    found = shrinkage(torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0]), 1.0)
    assert found.tolist() == [0.75, 0.5, 0.0, 0.0, 0.0]


def test_more_units_are_exactly_zero_with_a_larger_strength(tmp_path):
    found = []
    for strength in (1.0, 4.0, 8.0):
        step = LASSO | {"strength": strength, "units": ["mlp_channel"], "learning_rate": 1e-3}
        model, technique, _ = learn(tmp_path / str(strength), step, model=uneven())
        found.append(sum(counts(model, "mlp_channel")))
        assert technique.record()["units"]["mlp_channel"]["zero"] == found[-1]
    assert found == sorted(found)
    assert len(set(found)) == 3
    assert found[-1] < 320


def test_heads_and_sublayers_go_too(tmp_path):
    model, _, _ = learn(tmp_path, LASSO | {"strength": 3.0, "units": ["query_head", "mlp"], "learning_rate": 1e-2})
    assert counts(model, "mlp") == [1, 1]
    assert counts(model, "query_head") == [3, 3]


# geometric median


def test_copies_are_nearest_to_the_median_whatever_their_norm():
    """Half of the channels are one and the same, large one: they can stand in for each other."""
    model = tiny_model("llama")
    units = units_in(model, ("mlp_channel",))[0]
    with torch.no_grad():
        for parameter, member in units.parts():
            lines = parameter.movedim(member.dim, 0)
            lines[1:80] = 2 * lines[:1].clone()
            lines[0] = lines[1]
    assert not staying(units, 0.5)[:80].any()
    assert lowest(units.norms(), 80)[:80].all()
    filtered = staying(units, 0.5, small=0.125)  # first the smallest of the others, then copies
    assert int(filtered.sum()) == 80
    assert torch.equal(filtered[80:], lowest(units.norms(), 20)[80:])
    assert int((~filtered[:80]).sum()) == 60


def test_silenced_units_learn_on_until_the_last_choice(tmp_path):
    silent: dict[int, list[int]] = {}

    def watch(step: int, technique: Technique, learner: Learner) -> None:
        down, up = (learner.weights[CHANNELS.format(0, name)] for name in ("down", "up"))
        silent[step] = [int((down == 0).all(0).sum()), int((up == 0).all(1).sum())]

    learn(tmp_path, TECHNIQUES["geometric_median"], watch)
    assert silent[0] == silent[2] == silent[3] == [0, 0]  # choices after steps 1, 4 and 7, the last after step 9
    assert silent[1] == silent[4] == silent[7] == [40, 0]
    assert silent[8] == [0, 0]
    assert silent[9] == silent[11] == [40, 40]


def test_by_norm_the_smallest_units_go(tmp_path):
    model = uneven()
    units = units_in(model, ("mlp_channel",))[0]
    learn(tmp_path, TECHNIQUES["geometric_median"] | {"by": "norm"}, model=model)
    zero = units.zero()  # sizes rise evenly, and learning moves neighbours past each other
    assert zero.sum() == 40
    assert zero[:30].all()
    assert not zero[50:].any()


# growing regularization


def test_units_are_chosen_by_size_and_fade_before_they_go(tmp_path):
    norms: list[Tensor] = []
    model = uneven()
    units = units_in(model, ("mlp_channel",))[0]
    before, small = units.norms(), ~lowest(units.sums(torch.abs), 40)

    def watch(step: int, technique: Technique, learner: Learner) -> None:
        norms.append(units.norms())

    learn(tmp_path, TECHNIQUES["growing_l2"] | {"ceiling": 2000.0}, watch, model)
    assert (norms[-1] == 0).tolist() == small.tolist()
    assert float(norms[END - 1][small].max()) < 0.2 * float(before[small].min())
    assert float((norms[END - 1][~small] / before[~small]).min()) > 0.5


# L0


@pytest.mark.parametrize(("steps", "off"), [(60, 0.05), pytest.param(300, 0.005, marks=pytest.mark.slow)])
def test_gates_close_to_the_share_that_was_asked_for(steps, off, tmp_path):
    """The number that goes is exact, and so is what gates expect; by themselves they are the nearer, the longer they
    learn."""
    step = TECHNIQUES["l0"] | {"steps": steps, "units": ["mlp_channel", "kv_group"], "ratio": 0.3}
    model, technique, _ = learn(tmp_path, step)
    assert sum(counts(model, "mlp_channel")) == 96
    assert sum(counts(model, "kv_group")) == 1
    assert max(counts(model, "kv_group")) == 1  # of two: one stays in every block
    record = technique.record()
    assert record["learned_closed"]["mlp_channel"] == pytest.approx(0.3, abs=off)
    for share in record["expected_closed"].values():
        assert share == pytest.approx(0.3, abs=1e-4)  # half a percent was asked for


@settings(max_examples=30)
@given(share=st.floats(0.02, 0.98), values=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=9))
def test_a_shift_opens_the_share_that_is_asked_for(share, values):
    log_alpha = torch.tensor(values)
    shifted = log_alpha.double() + shift_to(log_alpha, share)
    assert float(open_share(shifted).mean()) == pytest.approx(share, abs=1e-6)


def test_the_penalty_is_that_of_the_share_whatever_the_number_of_gates():
    """ρ/2 g² at first, with λ at zero; and nothing before its time."""
    model, technique = tiny_model("llama"), parse_step(SHORT | TECHNIQUES["l0"], "").options.technique()
    learner = Learner(model, {}, lambda rows: rows, torch.arange(1))
    technique.prepare(learner)
    technique.begin_step(1, learner)
    assert technique.penalty(1, learner) is None
    technique.begin_step(5, learner)
    gap = technique.options.target(5) - (1 - float(open_share(torch.tensor(2.0))))
    assert float(technique.penalty(5, learner).detach()) == pytest.approx(10 / 2 * gap**2, rel=1e-4)


def test_the_share_of_open_gates_is_what_is_drawn():
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).repeat_interleave(4000)
    drawn = hard_concrete(log_alpha, torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    assert drawn.min() == 0
    assert drawn.max() == 1
    found = (drawn > 0).float().reshape(5, -1).mean(1)
    torch.testing.assert_close(found, open_share(log_alpha).reshape(5, -1).mean(1), rtol=0, atol=0.03)


# DSA

PRICES = [([288, 288, 15360, 15360], [1600, 1600, 2, 2], 1000), ([5, 7], [3000, 2000], 0), ([288, 90000], [900, 2], 10)]


@settings(max_examples=60)
@given(
    case=st.sampled_from(PRICES),
    keep=st.floats(0.3, 0.99),
    shares=st.lists(st.floats(0.001, 0.999), min_size=4, max_size=4),
)
def test_rounded_ratios_meet_the_budget_and_are_never_above(case, keep, shares):
    prices, units, fixed = case
    total = fixed + sum(price * count for price, count in zip(prices, units, strict=True))
    ledger = Ledger(prices, units, fixed, total, keep * total)
    if ledger.cost([1] * len(units)) > ledger.budget:
        return
    kept = ledger.rounded(shares[: len(units)])
    assert all(1 <= count <= most for count, most in zip(kept, units, strict=True))
    assert ledger.cost(kept) <= ledger.budget
    assert ledger.cost(kept) >= (1 - SLACK) * ledger.budget


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 10.0])
def test_probabilities_have_the_share_as_their_mean_and_its_derivative(sharpness):
    torch.manual_seed(0)
    importance = torch.rand(40, dtype=torch.float64) + 0.1
    share = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    p = probabilities(importance, share, sharpness)
    assert float(p.detach().mean()) == pytest.approx(0.37, abs=1e-6)
    assert torch.equal(p.argsort(), importance.argsort())
    weight = torch.randn(40, dtype=torch.float64)
    (slope,) = torch.autograd.grad((weight * p).sum(), share)
    ends = [(weight * probabilities(importance, torch.tensor(0.37 + e), sharpness)).sum() for e in (1e-3, -1e-3)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("of", ["parameters", pytest.param("flops", marks=pytest.mark.slow)])
def test_ratios_differ_and_cost_what_the_budget_says(of, tmp_path):
    model, technique, _ = learn(tmp_path, DSA | {"steps": 40, "of": of, "keep": 0.7})
    costs, kept = technique.record()["costs"], technique.record()["kept"]
    blocks = sum(p.numel() for name, p in tiny_model("llama").named_parameters() if "layers" in name)
    norms = 4 * 96
    attention = 2 * 4 * 256 * 96
    assert costs["before"] == (blocks if of == "parameters" else 2 * (blocks - norms) + attention)
    assert (1 - SLACK) * costs["budget"] <= costs["used"] <= costs["budget"]
    most = {"mlp_channel": 160, "kv_group": 2}
    apart = {kind: abs(kept[f"{kind}_0"] - kept[f"{kind}_1"]) / most[kind] for kind in most}
    assert max(apart.values()) >= 0.1  # of a block's units: one block keeps clearly more than the other
    zero = [160 - count for count in counts(model, "mlp_channel")]
    assert zero == [kept["mlp_channel_0"], kept["mlp_channel_1"]]


@pytest.mark.parametrize(("share", "multiplier"), [(0.98, 0.0), (0.98, 0.3), (0.3, 0.0), (0.3, 0.01), (0.3, 5.0)])
def test_the_budget_pulls_ratios_down_and_never_up(share, multiplier):
    """(max(0, μ + ρ g)² - μ²) / 2ρ, whose slope in g is the next multiplier: zero well below the budget."""
    model, technique = tiny_model("llama"), parse_step(SHORT | DSA, "").options.technique()
    learner = Learner(model, {}, lambda rows: rows, torch.arange(1))
    technique.prepare(learner)
    technique.begin_step(END, learner)
    technique.multiplier = torch.tensor(multiplier)
    theta = model.get_parameter("kept_shares")
    with torch.no_grad():
        theta.fill_(torch.logit(torch.tensor(share)) / technique.options.speed)
    gap = float(technique.gap(END, model).detach())
    assert (gap > 0) == (share == 0.98)
    pull = max(0.0, multiplier + gap)
    penalty = technique.penalty(END, learner)
    assert float(penalty.detach()) == pytest.approx((pull**2 - multiplier**2) / 2, rel=1e-4, abs=1e-7)
    (slope,) = torch.autograd.grad(penalty, theta)
    assert bool((slope > 0).all() if pull else (slope == 0).all())
    technique.before_step(END, learner)
    assert float(technique.multiplier) == pytest.approx(pull, rel=1e-5, abs=1e-7)


# 2:4


@settings(max_examples=60)
@given(
    u=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    strength=st.floats(0.01, 5),
    seed=st.integers(0, 99),
)
def test_the_proximal_step_of_products_of_three_is_a_minimum(u, strength, seed):
    """Nothing near it, nothing with other zeros and nothing at random has a lower value; not checked for all points."""
    point = torch.tensor([u], dtype=torch.float64)

    def value(v: Tensor) -> Tensor:
        return (v - point).square().sum(1) / 2 + strength * triples(v.abs().T)

    found = shrunk(point, strength)
    generator = torch.Generator().manual_seed(seed)
    near = found + 1e-2 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    far = point * torch.rand(400, 4, generator=generator, dtype=torch.float64)
    far[::2] *= torch.rand(200, 4, generator=generator) < 0.7
    assert float(value(torch.cat([near, far, point])).min()) >= float(value(found)) - 1e-3
    assert ((found == 0) | (found.sign() == point.sign())).all()


def test_matrices_end_with_two_of_four_everywhere(tmp_path):
    """The harder the pull, the fewer groups had to be forced."""
    forced = []
    for strength in (0.5, 30.0):
        step = TECHNIQUES["proximal_24"] | {"strength": strength}
        model, technique, _ = learn(tmp_path / str(strength), step)
        for name, value in values(model).items():
            if "_proj" in name:
                assert follows(value != 0, Pattern("n:m", 2, 4)), name
                assert int((value != 0).sum()) <= value.numel() // 2
        forced.append(technique.record()["forced"])
    assert forced[0] > 0.5
    assert forced[1] < 0.1


# stripes


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    places=st.integers(1, 7),
    stripe=st.integers(1, 6),
    share=st.floats(0, 1),
    tokens=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_the_product_of_packed_stripes_is_that_of_the_masked_matrix(rows, places, stripe, share, tokens, seed):
    """Also where a row, or everything, has gone; no weight of a stripe that fell is stored."""
    torch.manual_seed(seed)
    mask = torch.rand(rows, places) < share
    weight = torch.randn(rows, places * stripe, dtype=torch.float64) * mask.repeat_interleave(stripe, 1)
    x = torch.randn(*tokens, places * stripe, dtype=torch.float64)
    packed = pack_stripes(weight, stripe)
    assert packed.weight.shape == (int(mask.sum()), stripe)
    torch.testing.assert_close(stripes_product(x, packed), x @ weight.T, rtol=1e-12, atol=1e-12)


def test_more_stripes_than_are_gathered_at_once(monkeypatch):
    monkeypatch.setattr(stripes, "PART", 5)
    weight, x = torch.randn(6, 12, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(stripes_product(x, pack_stripes(weight, 3)), x @ weight.T, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="12 columns are not made of stripes of 5"):
        pack_stripes(weight, 5)


def test_stripes_fall_whole_and_a_density_is_met(tmp_path):
    found = {}
    for density in (None, 0.4):
        step = TECHNIQUES["skeleton"] | {"density": density, "stripe": 8}
        model, technique, _ = learn(tmp_path / str(density), step)
        striped = {name: value.reshape(-1, 8) for name, value in values(model).items() if "_proj" in name}
        zero = {name: (each == 0).all(1) for name, each in striped.items()}
        assert all(bool((striped[name][~zero[name]] != 0).all()) for name in striped)
        for weight in (value for name, value in values(model).items() if "_proj" in name):
            x, packed = torch.randn(3, weight.shape[1]), pack_stripes(weight, 8)
            assert packed.weight.numel() == int(weight.count_nonzero())
            torch.testing.assert_close(stripes_product(x, packed), x @ weight.T, rtol=1e-4, atol=1e-5)
        found[density] = 1 - float(torch.cat(list(zero.values())).float().mean())
        assert technique.record()["density"] == pytest.approx(found[density], abs=1e-6)
    assert found[0.4] == pytest.approx(0.4, abs=1e-3)
    assert 0.4 < found[None] < 1


@pytest.mark.parametrize("density", [None, 0.05])
def test_a_matrix_never_loses_its_last_stripe(density, tmp_path):
    """Pulled so hard that all others fall; of these 8,832 stripes 0.05 would be more."""
    step = TECHNIQUES["skeleton"] | {"strength": 50.0, "density": density}
    model, technique, _ = learn(tmp_path, step)
    record, matrices = technique.record(), [name for name in values(model) if "_proj" in name]
    assert sorted(record["one_stripe"]) == sorted(matrices)
    assert record["density"] == pytest.approx(14 / 8832)
    for name in matrices:
        assert int(model.get_parameter(name).count_nonzero()) == 16, name


def test_a_skeleton_of_ones_changes_nothing(tmp_path):
    _, _, curve = learn(tmp_path / "plain", {"train": "dense", "steps": 1, "warmup": 0})
    _, _, other = learn(tmp_path / "skeleton", TECHNIQUES["skeleton"] | {"steps": 2, "begin": 0.0, "until": 1.0})
    assert other.losses[0] == pytest.approx(curve.losses[0], rel=1e-6)


# whole runs: what is zero is cut out


def cut_out(*kinds: str) -> list[dict[str, Any]]:
    return [{"structure": kind, "zeros": True} for kind in kinds]


def test_the_smaller_model_computes_the_same(run_here, tmp_path_factory):
    """Channels of blocks that differ, a KV group, and a whole attention."""
    model, start = uneven(), tmp_path_factory.mktemp("uneven")
    with torch.no_grad():
        first, second = units_in(model, ("kv_group",))
        first.scale(torch.tensor([0.05, 1.0]))
        second.scale(torch.tensor([0.05, 0.05]))
    model.save_pretrained(start)
    tiny_tokenizer().save_pretrained(start)
    step = SHORT | LASSO | {"strength": 2.0, "learning_rate": 1e-3}
    kinds = ("attention", "mlp", "kv_group", "mlp_channel")
    full, _ = run_here(str(start), step, dtype="float32")
    small, results = run_here(str(start), step, *cut_out(*kinds), dtype="float32")
    config = json.loads((small / "config.json").read_text())
    assert config["per_layer_config"]["1"]["skip"] == ["self_attn"]
    assert tensors(small)["model.layers.0.self_attn.k_proj.weight"].shape == (16, 96)
    assert results["proof"]["passed"]
    gone = results["training"][0]["units"]
    assert 0 < gone["mlp_channel"]["zero"] < gone["mlp_channel"]["of"]
    sizes = [sum(t.numel() for t in tensors(folder).values()) for folder in (full, small)]
    assert sizes[1] < sizes[0]
    left = sum(int(t.count_nonzero()) for name, t in tensors(full).items() if "_proj" in name)
    assert left <= sum(t.numel() for name, t in tensors(small).items() if "_proj" in name)
    expected, found = logits(reloaded(full)), logits(reloaded(small, trust_remote_code=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*UNITS[1:], "early_bird"])
def test_the_smaller_model_of_every_technique_computes_the_same(name, run_here):
    """As the one that is left with zeros; those that take the same share of every block leave one width."""
    step = SHORT | EVERY[name] | {"units": ["mlp_channel"], "steps": 6}
    full, _ = run_here("llama", step, dtype="float32")
    small, results = run_here("llama", step, *cut_out("mlp_channel"), dtype="float32")
    assert results["proof"]["passed"]
    assert [stage["name"] for stage in results["stages"]] == ["before", name, "mlp_channel"]
    widths = [len(tensors(small)[CHANNELS.format(block, "up")]) for block in (0, 1)]
    gone = results["training"][0]["units"]["mlp_channel"]["zero"]
    assert gone > 0
    assert sum(widths) == 320 - gone
    if name not in ("l0", "dsa"):
        config = json.loads((small / "config.json").read_text())
        assert config["intermediate_size"] == widths[0] == widths[1] == 120
        assert "per_layer_config" not in config
    expected, found = logits(reloaded(full)), logits(reloaded(small, trust_remote_code=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_without_zeros_nothing_goes_and_widths_keep_their_multiple(run_here):
    same, _ = run_here("llama", *cut_out("mlp_channel"))
    assert json.loads((same / "config.json").read_text())["intermediate_size"] == 160
    step = {"structure": "mlp_channel", "zeros": True, "multiple": 32}
    folder, _ = run_here("llama", SHORT | TECHNIQUES["geometric_median"], step)
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 128


@pytest.mark.slow
def test_zeros_in_stripes_and_in_fours_outlive_quantization(run_here):
    bits = {"method": "rtn", "bits": 8, "group_size": 32}
    for name in ("skeleton", "proximal_24"):
        _, results = run_here("llama", SHORT | TECHNIQUES[name], bits)
        assert results["proof"]["passed"]
        assert results["sparsity"]["of_pruned_linears"] > 0.05


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LASSO | {"begin": 0.8, "until": 0.5}, "it would end before it starts: from step 9 to step 6 of 12"),
        (TECHNIQUES["proximal_24"] | {"until": 0.05}, "it would end before it starts"),
        (TECHNIQUES["growing_l2"] | {"every": 20}, "λ would never grow"),
        (TECHNIQUES["geometric_median"] | {"small": 0.25}, "so that none is left for distances"),
        (LASSO | {"units": ["mlp_chanel"]}, "units"),
        (LASSO | {"units": []}, "units"),
        (LASSO | {"units": ["kv_group", "query_head"]}, "share rows"),
        (LASSO | {"units": ["mlp", "mlp"]}, "names one kind twice"),
        (DSA | {"units": ["attention"]}, "attention is not for this technique, which takes mlp_channel, kv_group"),
        (DSA | {"keep": 1.0}, "less than 1"),
        ({"train": "l0"}, "ratio: this option is required"),
        ({"train": "skeleton", "threshold": 0.0}, "greater than 0"),
    ],
)
def test_a_bad_option_is_one_message(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_step(SHORT | changes, "steps[0]")


@pytest.mark.parametrize(
    ("kind", "step", "more", "message"),
    [
        ("llama", DSA | {"keep": 0.05}, {}, r"keep: 0.05 is .* parameters of the decoder blocks, .* use at least 0.1"),
        ("llama", DSA | {"units": ["kv_group"], "keep": 0.9}, {}, "no rounding meets .* let mlp_channel go too"),
        ("llama", TECHNIQUES["geometric_median"] | {"units": ["kv_group"], "ratio": 0.1}, {}, "takes 0 of the 2 units"),
        ("llama", TECHNIQUES["l0"] | {"units": ["kv_group"], "ratio": 0.9}, {}, "takes 4 of the 4 units"),
        ("opt", LASSO | {"units": ["query_head"]}, {}, "has no query_head: its attention heads do not share"),
        ("llama", LASSO, {"keep": ["up_proj"]}, "is kept, and .* would make it narrower"),
        ("llama", {"train": "skeleton", "stripe": 36}, {}, "not made of stripes of 36"),
        ("llama", {"train": "skeleton", "density": 1e-3}, {}, "leaves 9 stripes to 14 matrices, and each needs one"),
    ],
)
def test_what_does_not_fit_is_a_plan_error(kind, step, more, message, run_here, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_here(kind, SHORT | step, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"zeros": True, "ratio": 0.5}, "expected one of ratio, parameters, bytes and zeros"),
        ({"zeros": True, "compensate": "mean"}, "leave out `compensate`"),
        ({"zeros": True, "rounds": 2}, "leave out `rounds`"),
        ({"zeros": False, "score": "random"}, "zeros: "),
    ],
)
def test_a_removal_of_zeros_chooses_nothing(step, message):
    with pytest.raises(RecipeError, match=message):
        parse_step({"structure": "mlp_channel"} | step, "steps[0]")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gemma2", "opt"])
def test_units_of_other_architectures_are_cut_out_too(kind, run_here):
    """Fused and transposed matrices, biases, norms after a sub-layer."""
    _, results = run_here(kind, SHORT | TECHNIQUES["geometric_median"], *cut_out("mlp_channel"))
    assert results["proof"]["passed"]
    assert results["training"][0]["units"]["mlp_channel"]["zero"]


def test_scaling_outputs_is_what_a_gate_does():
    for kind in ("llama", "gpt2", "phi3"):
        for unit in ("mlp_channel", "kv_group"):
            model = tiny_model(kind)
            copied = copy.deepcopy(model)
            torch.manual_seed(0)
            for units, same in zip(units_in(model, (unit,)), units_in(copied, (unit,)), strict=True):
                factors = torch.rand(units.count)
                units.gated(lambda factors=factors: factors)
                same.scale_outputs(factors)
            torch.testing.assert_close(logits(model), logits(copied), rtol=1e-4, atol=1e-5)
