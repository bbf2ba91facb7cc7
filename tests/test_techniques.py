"""Techniques beside the loop: exact counts, masks that move as their papers say, zeros that stay, exact resumption."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_budget import SMOLLM
from tiny_runs import digests, logits, proof_inside, recipe, reloaded, run_die_at, tensors, values, write_text
from torch import Tensor, nn

from llmcompress.cli import main
from llmcompress.errors import NumericalError, PlanError, RecipeError, ResumeError
from llmcompress.export import export
from llmcompress.progress import Silent
from llmcompress.recipe import parse_step
from llmcompress.run import run
from llmcompress.runtime import load
from llmcompress.source import open_source
from llmcompress.stages import plan_stages
from llmcompress.training import TRAININGS
from llmcompress.training.loop import Task, rate, train
from llmcompress.training.losses import cross_entropy
from llmcompress.training.sharding import refuse_sharing
from llmcompress.training.sparsity import best_of_all, kept_in_all, spread_counts
from llmcompress.training.state import Curve
from llmcompress.training.technique import Learner, Technique, mask_sha256
from llmcompress.training.techniques.grasp import grasp_scores
from llmcompress.training.techniques.snip import Snip, SnipMask, ranked, snip_scores
from llmcompress.training_job import prepared

SHORT = {
    "steps": 12, "batch": 2, "micro_batch": 2, "learning_rate": 1e-2, "warmup": 1, "weight_decay": 0.1,
    "precision": "float32", "checkpoint_every": 100,
}  # fmt: skip
RIGL = {"train": "rigl", "density": 0.3, "every": 3, "until": 0.8}
SPARSE: dict[str, dict[str, Any]] = {
    "random": {"train": "random", "density": 0.3},
    "uniform": {"train": "random", "density": 0.3, "spread": "uniform"},
    "random-snip": {"train": "random", "density": 0.3, "spread": "snip", "windows": 4},
    "snip": {"train": "snip", "density": 0.3, "windows": 4},
    "grasp": {"train": "grasp", "density": 0.3, "windows": 4},
    "rigl": RIGL,
    "set": RIGL | {"train": "set"},
    "gradual": {"train": "gradual", "density": 0.3, "begin": 0.1, "until": 0.8, "every": 2},
}
STATIC = ["random", "uniform", "random-snip", "snip", "grasp"]
TOKENS = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(1))
Watch = Callable[[int, Technique, Learner], None]


def loss(model: Any, rows: Tensor) -> Tensor:
    return cross_entropy(model(TOKENS[rows], use_cache=False).logits, TOKENS[rows])


def learn(state: Path, step: dict[str, Any], watch: Watch = lambda *_: None) -> tuple[Any, Technique, Curve]:
    """A tiny model after the loop, its technique and its losses; `watch` sees what each step has left."""
    options = parse_step(SHORT | step, "steps[0]").options
    model, technique = tiny_model("llama", num_hidden_layers=1), options.technique()
    targets = tuple(name for name, _ in model.named_parameters() if "_proj" in name)
    seen: list[Learner] = []
    prepare = technique.prepare

    def remembered(learner: Learner) -> None:
        seen.append(learner)
        prepare(learner)

    technique.prepare = remembered
    task = Task(8, 16, loss, {}, cpu=True, technique=technique, targets=targets)
    state.mkdir(parents=True, exist_ok=True)
    curve = train(model, options, task, state, lambda done, _: watch(done - 1, technique, seen[0]))
    return model, technique, curve


@dataclass
class Seen:
    """A training that went through, and what was seen after each of its steps."""

    model: Any
    technique: Technique
    losses: list[float]
    masks: list[dict[str, Tensor]]
    nonzero: list[str]  # pruned weights or moments that are not zero
    new_nonzero: list[str]  # the same of weights that have just come back


@cache
def learned(name: str) -> Seen:
    """The training of a row of SPARSE, done once."""
    masks: list[dict[str, Tensor]] = []
    nonzero: list[str] = []
    new_nonzero: list[str] = []

    def watch(step: int, technique: Technique, learner: Learner) -> None:
        for key, mask in technique.masks.items():
            weight = learner.weights[key]
            tensors = [weight, *learner.moments(weight)]
            new = mask & ~masks[-1].get(key, mask) if masks else torch.zeros_like(mask)
            nonzero.extend(f"{step} {key}" for tensor in tensors if tensor[~mask].any())
            new_nonzero.extend(f"{step} {key}" for tensor in tensors if tensor[new].any())
        masks.append(dict(technique.masks))

    with TemporaryDirectory() as folder:
        model, technique, curve = learn(Path(folder), SPARSE[name], watch)
    return Seen(model, technique, curve.losses, masks, nonzero, new_nonzero)


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


class Stopped(Exception):
    """Ends a training in the middle."""


# how many stay


@pytest.mark.parametrize(
    ("density", "square", "narrow", "wide"),
    [(0.5, 0.62222, 1.0, 0.42778), (0.2, 0.24151, 0.48302, 0.16604), (0.1, 0.12075, 0.24151, 0.08302)],
)
def test_golden_counts(density, square, narrow, wide):
    """Of a decoder block of SmolLM2-135M, to one weight."""
    shares = {"q": square, "k": narrow, "v": narrow, "o": square, "gate": wide, "up": wide, "down": wide}
    found = spread_counts(SMOLLM, density, "erk")
    for name, share in shares.items():
        size = prod(SMOLLM[name])
        assert found[name] / size == pytest.approx(share, abs=5e-6 + 1 / size)  # golden values have five digits
    assert sum(found.values()) == round(density * 3_538_944)


@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8),
    density=st.floats(0.01, 0.99),
    spread=st.sampled_from(["erk", "uniform"]),
)
def test_counts_add_up_and_no_matrix_has_more_than_it_holds(shapes, density, spread):
    named = {str(i): shape for i, shape in enumerate(shapes)}
    found = spread_counts(named, density, spread)
    assert sum(found.values()) == kept_in_all(named, density)
    assert all(0 <= found[name] <= prod(shape) for name, shape in named.items())


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_one_ranking_of_all_keeps_the_highest(sizes, seed, share):
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(size, 2, generator=generator) for i, size in enumerate(sizes)}
    count = round(share * 2 * sum(sizes))
    masks = best_of_all(scores, count)
    inside = torch.cat([scores[name][mask] for name, mask in masks.items()])
    outside = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert len(inside) == count
    assert not len(inside) or not len(outside) or inside.min() >= outside.max()


# what all have in common


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_pruned_is_zero_and_has_no_moments(name):
    seen = learned(name)
    assert seen.nonzero == []
    assert seen.losses[-1] < seen.losses[0]
    masks = seen.technique.masks
    total = sum(mask.numel() for mask in masks.values())
    assert sum(counts(masks).values()) == round(0.3 * total)
    assert seen.technique.record()["density"] == pytest.approx(0.3, abs=1 / total)
    for key, mask in masks.items():
        assert torch.equal(seen.model.get_parameter(key) != 0, mask)  # and nothing else is zero


@pytest.mark.parametrize("name", SPARSE)
def test_a_stopped_training_continues_to_the_same_masks_and_weights(name, tmp_path):
    """After step 5 of 12, with the state of step 4; masks that move do so at steps 3 and 6."""

    def stop(step: int, technique: Technique, learner: Learner) -> None:
        if step == 5:
            raise Stopped

    step, steps = SPARSE[name] | {"checkpoint_every": 4}, list[int]()
    with pytest.raises(Stopped):
        learn(tmp_path, step, stop)
    again, technique, curve = learn(tmp_path, step, lambda step, *_: steps.append(step))
    assert steps == list(range(4, 12))
    assert curve.losses == learned(name).losses
    assert technique.record() == learned(name).technique.record()
    for key, weight in learned(name).model.named_parameters():
        assert torch.equal(again.get_parameter(key), weight), key


@pytest.mark.parametrize("name", SPARSE)
def test_another_seed_gives_another_mask(name, tmp_path):
    technique = learn(tmp_path, SPARSE[name] | {"seed": 1})[1]
    assert technique.record()["mask_sha256"] != learned(name).technique.record()["mask_sha256"]


def test_dense_is_plain_training(tmp_path):
    dense = learn(tmp_path / "dense", {"train": "dense"})[2].losses
    assert dense == learn(tmp_path / "recover", {"train": "recover", "loss": "cross_entropy"})[2].losses


def test_a_rate_may_begin_anew():
    options = TRAININGS["dense"].parse({"steps": 100, "warmup": 10}, "")
    assert rate(55, options, (5, 50)) == rate(5, options)
    assert rate(99, options, (49, 50)) < rate(50, options)


def test_penalties_count_and_are_not_in_the_curve(tmp_path):
    class Pull(Technique):
        def penalty(self, step: int, learner: Learner) -> Tensor:
            return 1e4 * sum(weight.square().sum() for weight in learner.weights.values())

    options = TRAININGS["dense"].parse(SHORT | {"steps": 30}, "")
    model, name = tiny_model("llama"), "model.layers.0.mlp.up_proj.weight"
    before = float(model.get_parameter(name).detach().norm())
    task = Task(8, 16, loss, {}, cpu=True, technique=Pull(options), targets=(name,))
    curve = train(model, options, task, tmp_path, lambda *_: None)
    assert float(model.get_parameter(name).detach().norm()) < 0.2 * before
    assert max(curve.losses) < 100


# masks that stay


@pytest.mark.parametrize("name", STATIC)
def test_a_mask_from_before_training_never_moves(name):
    hashes = [mask_sha256(masks) for masks in learned(name).masks]
    assert len(hashes) == 12
    assert len(set(hashes)) == 1


def test_random_spreads_as_it_is_told():
    uniform, erk = (learned(name).technique.masks for name in ("uniform", "random"))
    density = {name: float(mask.float().mean()) for name, mask in uniform.items()}
    assert max(density.values()) - min(density.values()) < 1e-3
    narrow, wide = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert erk[narrow].float().mean() > 1.5 * erk[wide].float().mean()


def toy() -> tuple[Learner, Tensor]:
    """A small network in float64 with a loss over rows, and all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    weights = {f"{i}.weight": model[i].weight for i in (0, 2)}
    rows = torch.arange(6)
    return Learner(model, weights, lambda rows: model(x[rows]).square().sum(1).mean(), rows), rows


def test_scores_of_snip_are_their_equation():
    learner, rows = toy()
    found = snip_scores(learner, Snip(density=0.5, windows=6))
    gradients = torch.autograd.grad(learner.loss(rows), list(learner.weights.values()))
    for (name, weight), gradient in zip(learner.weights.items(), gradients, strict=True):
        torch.testing.assert_close(found[name], (weight * gradient).abs())
        assert weight.grad is None


def test_scores_of_grasp_are_those_of_the_hessian():
    learner, rows = toy()
    weights = list(learner.weights.values())
    before = [weight.detach().clone() for weight in weights]
    gradients = torch.autograd.grad(learner.loss(rows), weights, create_graph=True)
    inner = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(inner, weights)
    found = grasp_scores(learner, rows)
    for weight, old, product, score in zip(weights, before, products, found.values(), strict=True):
        torch.testing.assert_close(score, -old * product, rtol=1e-2, atol=1e-4)  # the difference is of second order
        assert torch.equal(weight, old)


def test_scores_are_taken_with_checkpoints_if_training_has_them(tmp_path):
    """Blocks then go forward twice for each window, once to recompute."""
    passes = []
    for checkpointing in (False, True):
        step = SHORT | SPARSE["snip"] | {"steps": 2, "gradient_checkpointing": checkpointing}
        options = parse_step(step, "steps[0]").options
        model = prepared(tiny_model("llama", num_hidden_layers=1), options, keep=[])
        technique, seen = options.technique(), list[int]()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        choose = technique.choose

        def chosen(learner: Learner, choose: Any = choose, seen: list[int] = seen) -> dict[str, Tensor]:
            masks: dict[str, Tensor] = choose(learner)
            passes.append(len(seen))
            return masks

        technique.choose = chosen
        targets = tuple(name for name, _ in model.named_parameters() if "_proj" in name)
        state = tmp_path / str(checkpointing)
        state.mkdir()
        train(model, options, Task(8, 16, loss, {}, True, technique, targets), state, lambda *_: None)
    assert passes == [4, 8]


@pytest.mark.parametrize("stop_at", [1, 5])
def test_scores_are_not_taken_again_when_a_training_continues(stop_at, tmp_path, monkeypatch):
    """Not even when it was stopped before its first state of weights."""

    def stop(step: int, *_: Any) -> None:
        if step == stop_at:
            raise Stopped

    step = SPARSE["snip"] | {"checkpoint_every": 4}
    wanted = learned("snip")
    with pytest.raises(Stopped):
        learn(tmp_path, step, stop)
    monkeypatch.setattr(SnipMask, "choose", lambda *_: pytest.fail("scores were taken again"))
    again, technique, curve = learn(tmp_path, step)
    assert curve.losses == wanted.losses
    assert technique.record() == wanted.technique.record()
    assert all(torch.equal(again.get_parameter(key), weight) for key, weight in wanted.model.named_parameters())


def test_a_ranking_that_empties_a_matrix_is_refused():
    scores = {"a": torch.rand(4, 4) + 1, "b": torch.rand(4, 4)}
    with pytest.raises(NumericalError, match=r"b: none of its 16 scores is among the best 25.00% of all"):
        ranked(scores, Snip(density=0.25, least=0.0))
    with pytest.raises(NumericalError, match="NaN"):
        ranked({"a": torch.full((2, 2), torch.nan)}, Snip(density=0.5))


def test_every_matrix_has_its_least_of_a_ranking():
    """Of its own scores the best, out of the same total."""
    scores = {"a": torch.rand(4, 4) + 1, "b": torch.rand(4, 4)}
    masks = ranked(scores, Snip(density=0.25, least=0.5))
    assert counts(masks) == {"a": 6, "b": 2}
    assert scores["b"][masks["b"]].min() > scores["b"][~masks["b"]].max()


# masks that move


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_masks_trade_weights_until_they_stay(name):
    """Updates at steps 3 and 6, not at 9, from which on masks stay; what has come back is zero, moments too."""
    masks = learned(name).masks
    assert all(counts(each) == counts(masks[0]) for each in masks)
    moved = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in pairwise(masks)]
    assert [step for step, changed in enumerate(moved, 1) if changed] == [3, 6]
    assert learned(name).new_nonzero == []


def test_rigl_takes_the_largest_gradients_and_gives_up_the_smallest_weights():
    """At step 3 of 9, with drop 0.5: 0.375 of five weights, which is one."""
    technique = parse_step(SHORT | RIGL | {"drop": 0.5}, "steps[0]").options.technique()
    weight = nn.Parameter(torch.tensor([[1.0, -0.1, 0.5, 0.0], [0.0, 0.0, 2.0, -3.0]]))
    learner = Learner(nn.Linear(1, 1), {"w": weight}, lambda rows: rows, torch.arange(1))
    technique.masks = {"w": weight != 0}
    weight.grad = torch.tensor([[9.0, 9.0, 0.0, 1.0], [-5.0, 0.5, 0.0, 0.0]])
    assert technique.before_step(2, learner) is True
    assert technique.before_step(3, learner) is False
    assert torch.equal(technique.masks["w"], weight != 0)  # the smallest went, and came back for its gradient
    weight.grad[0, 1] = 0
    technique.before_step(3, learner)
    assert technique.masks["w"].int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]


def test_gradual_follows_its_cubic_and_never_takes_back():
    masks = learned("gradual").masks
    assert masks[0] == {}
    for step in range(1, 12):
        number = min(4, (step - 1) // 2)  # after steps 1, 3, 5, 7 and 9; the first takes nothing
        found, total = masks[step], sum(mask.numel() for mask in masks[step].values())
        wanted = 0.3 + 0.7 * (1 - number / 4) ** 3
        assert sum(counts(found).values()) / total == pytest.approx(wanted, abs=1 / total), step
        for key, mask in found.items():
            assert not (mask & ~masks[step - 1].get(key, mask)).any()


# whole runs


def stated(step: dict[str, Any]) -> dict[str, Any]:
    """A short step from random weights, with states to continue from."""
    return SHORT | {"start": "random", "checkpoint_every": 4} | step


def sparse_run(name: str, **changes: Any) -> dict[str, Any]:
    return stated(SPARSE[name]) | changes


def test_a_run_leaves_zeros_that_later_steps_keep(run_here):
    bits = {"method": "rtn", "bits": 8, "group_size": 32}
    folder, results = run_here("llama", sparse_run("rigl"), SHORT | {"train": "dense", "steps": 2}, bits)
    assert results["proof"]["passed"]
    assert [stage["name"] for stage in results["stages"]] == ["before", "rigl", "dense", "rtn"]
    assert 0.69 < results["sparsity"]["of_decoder_linears"] < 0.75
    first, second = results["training"]
    assert first["density"] == pytest.approx(0.3, abs=1e-3)
    assert len(first["mask_sha256"]) == 64
    assert (len(first["losses"]), len(second["losses"])) == (12, 2)
    assert "rigl" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("step", "output"),
    [
        (sparse_run("rigl"), "bitmask"),
        (SHORT | {"train": "skeleton", "stripe": 8, "strength": 0.5, "threshold": 0.6, "density": 0.4}, "bitmask"),
        (SHORT | {"train": "proximal_24", "every": 2}, "sparse24"),
    ],
    ids=lambda value: value["train"] if isinstance(value, dict) else value,
)
def test_what_training_has_pruned_is_stored_sparse(step, output, run_here, tmp_path):
    """As the run writes it and as `export` does from dense files: the same tensors, and logits of the dense folder."""
    dense, _ = run_here("llama", step)
    sparse, results = run_here("llama", step, output={"format": output})
    export(dense, output, tmp_path / "exported")
    assert results["format"] == output
    assert results["proof"]["passed"]
    found, exported = tensors(sparse), tensors(tmp_path / "exported")
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in found)
    size = sum(tensor.nbytes for tensor in found.values())
    assert size < 0.9 * sum(tensor.nbytes for tensor in tensors(dense).values())
    torch.testing.assert_close(logits(load(sparse, packed=False)), logits(reloaded(dense)), rtol=0, atol=0)
    rows = {row["name"]: row["after_bytes"] for row in results["layers"]}
    for name, stored in rows.items():
        assert stored == sum(tensor.nbytes for key, tensor in found.items() if key.startswith(f"{name}.weight"))
    export(sparse, "dense", tmp_path / "back")
    first, back = tensors(dense), tensors(tmp_path / "back")
    assert all(torch.equal(first[name], back[name]) for name in first)


@pytest.mark.parametrize(
    ("step", "output", "message"),
    [
        (SHORT | {"train": "dense"}, "bitmask", "'bitmask' is for packed weights, and .* leaves dense ones"),
        (sparse_run("rigl"), "sparse24", "cannot be stored as 'sparse24'"),
        (sparse_run("rigl"), "pack-quantized", "cannot be stored as 'pack-quantized'"),
    ],
)
def test_a_format_must_fit_what_training_leaves(step, output, message, tiny_folders, text):
    model = tiny_folders("llama")
    with pytest.raises(PlanError, match=message):
        plan_stages(recipe(model, text, step, output={"format": output}), open_source(str(model)))


@pytest.mark.slow
def test_a_run_from_random_weights_depends_on_its_seed_alone(run_here):
    step = SHORT | {"train": "dense", "start": "random", "steps": 2}
    first, again, other = (digests(run_here("llama", step | {"seed": seed})[0]) for seed in (1, 1, 2))
    assert first == again != other


def test_a_mask_is_taken_from_another_model(run_here, tiny_folders):
    found, results = run_here("llama", sparse_run("random"))
    step = SHORT | {"train": "masked", "mask": str(found), "start": "random", "seed": 7}
    other, others = run_here("llama", step)
    assert others["training"][0]["mask_sha256"] == results["training"][0]["mask_sha256"]
    old, new = tensors(found), tensors(other)
    for name in [name for name in old if "_proj" in name]:
        assert torch.equal(old[name] == 0, new[name] == 0)
        assert not torch.equal(old[name], new[name])
    with pytest.raises(PlanError, match="has no zeros to keep; name a model that was pruned"):
        run_here("llama", step | {"mask": str(tiny_folders("llama"))})
    with pytest.raises(PlanError, match=r"is a mask for another model: model\.layers\.0\.self_attn\.\w+\.weight is "):
        run_here("qwen3", step, keep=[])


def test_zeros_of_a_model_are_not_chosen_anew(run_here, tmp_path):
    """Zeros that no manifest tells of: those of a folder that somebody else has pruned."""
    with pytest.raises(PlanError, match="holds many zeros already, which set would choose anew"):
        run_here(str(write_pruned(tmp_path / "zeros")), SHORT | SPARSE["set"])


def write_pruned(folder: Path, **changes: Any) -> Path:
    """A tiny model with half of its matrices' weights zero, as a stock folder."""
    model = tiny_model("llama", **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(torch.rand(weight.shape) > 0.5 if "_proj" in name else 1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_score_may_be_taken_on_what_the_dense_model_says(run_here):
    step = sparse_run("snip", loss="distillation", windows=8)
    assert run_here("llama", step)[1]["training"][0]["loss"] == {"distillation": 1.0}


class StopAt(Silent):
    """Ends a run in its training."""

    def advance(self, done: int, detail: str = "") -> None:
        """Told of step 6, it does."""
        if detail.startswith("loss") and done == 6:
            raise Stopped


def test_a_stopped_run_continues_with_its_own_seed_and_data_alone(tiny_folders, tmp_path):
    model, text, folder = tiny_folders("llama"), write_text(tmp_path / "t.txt"), tmp_path / "stopped"
    mine = recipe(model, text, sparse_run("rigl"))
    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        run(mine, tmp_path / "whole")
        with pytest.raises(Stopped):
            run(mine, folder, progress=StopAt())
        with pytest.raises(ResumeError, match="another model, data, recipe or version"):
            run(recipe(model, text, sparse_run("rigl", seed=1)), folder)
        content = text.read_bytes()
        text.write_bytes(content[::-1])
        with pytest.raises(ResumeError, match="another model, data, recipe or version"):
            run(mine, folder)
        text.write_bytes(content)
        assert not folder.exists()
        run(mine, folder)
    assert digests(folder) == digests(tmp_path / "whole")


KILLED: dict[str, dict[str, Any]] = {  # at the first state, after step 4 of 12
    "rigl": SPARSE["rigl"],
    "gradual": SPARSE["gradual"],
    "lottery_ticket": {"train": "lottery_ticket", "rounds": 2, "rewind": 2},
    "dsa": {"train": "dsa", "keep": 0.8, "units": ["mlp_channel", "kv_group"]},
    "skeleton": {"train": "skeleton", "strength": 0.5, "density": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_continues_with_the_same_bytes(name, tiny_folders, text, tmp_path):
    moment, step = {"folder": str(tmp_path / "a"), "side": "after", "file": "train.json"}, stated(KILLED[name])
    run_die_at([moment], tmp_path / "whole", values(tiny_folders("llama"), text, step))
    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        run(recipe(tiny_folders("llama"), text, step), tmp_path / "a")
    assert digests(tmp_path / "a") == digests(tmp_path / "whole")


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (RIGL | {"every": 10}, "masks would never move"),
        (RIGL | {"density": 1.0}, "density: input should be less than 1"),
        (RIGL | {"drop": 0}, "drop: input should be greater than 0"),
        (RIGL | {"densty": 0.1}, "did you mean 'density'"),
        (SPARSE["gradual"] | {"begin": 0.8}, "pruning would end before it starts"),
        ({"train": "random"}, "density: this option is required"),
        (SPARSE["random"] | {"windows": 4}, "windows: is for the ranking of `spread: snip`, and erk takes none"),
        (SPARSE["uniform"] | {"least": 0.2}, "least: is for the ranking of `spread: snip`, and uniform takes none"),
        ({"train": "dense", "warmup": 12}, "the learning rate would rise for 12 steps of 12"),
        ({"train": "random", "density": 0.1, "spread": "all"}, "spread: "),
        ({"train": "dense", "start": "anew"}, "start: "),
        ({"train": "masked"}, "mask: this option is required"),
        ({"train": "riggl", "density": 0.1}, "did you mean 'rigl'"),
    ],
)
def test_a_bad_technique_is_one_message(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_step(SHORT | changes, "steps[0]")


def test_the_plan_knows_what_a_ticket_remembers_and_ranks(tiny_folders, text):
    """The weights to go back to in float32, and a ranking of all weights beside gradients and moments."""
    found = {}
    steps: dict[str, dict[str, Any]] = {
        "dense": {"train": "dense"},
        "rate": {"train": "lottery_ticket", "rounds": 2, "back": "rate"},
        "weights": {"train": "lottery_ticket", "rounds": 2},
    }
    source = open_source(str(tiny_folders("llama")))
    for name, step in steps.items():
        plan = plan_stages(recipe(tiny_folders("llama"), text, SHORT | {"micro_batch": 1} | step), source)[0][-1]
        found[name] = plan.predicted.peak_host_bytes
    parameters = sum(prod(info.shape) for info in source.tensors.values())
    pruned = sum(prod(info.shape) for name, info in source.tensors.items() if "_proj" in name)
    assert found["weights"] - found["rate"] == 4 * parameters
    assert 15 * pruned < found["rate"] - found["dense"] <= 27 * pruned  # a mask too, instead of one pass


PRUNED = {"method": "magnitude", "pattern": "2:4"}
FEWER_BLOCKS = {"structure": "block", "score": "random", "ratio": 0.5, "of": "decoder"}


@pytest.mark.parametrize(
    ("steps", "more", "message"),
    [
        ([{"train": "random", "density": 1e-5}], {}, "leaves 1 weights to 14 matrices, and each needs one"),
        ([{"train": "random", "density": 2e-4, "spread": "uniform"}], {}, "leaves no weight of"),
        ([PRUNED, {"train": "random", "density": 0.1}], {}, "is pruned already, and random would choose its zeros"),
        ([PRUNED, {"train": "dense", "start": "random"}], {}, "would fill the zeros of 14 pruned linears"),
        ([RIGL, FEWER_BLOCKS], {}, "put structure steps first"),
        ([{"method": "rtn", "group_size": 32}, RIGL], {}, "quantize last"),
        ([{"train": "dense", "loss": "distillation"}], {}, "there is nothing to learn from it"),
        ([{"train": "random", "density": 0.1}], {"keep": ["*_proj"]}, "leaves no linear for random to prune"),
        ([{"train": "dense", "start": "random"}], {"keep": ["q_proj"]}, r"set `keep: \[\]`"),
        ([RIGL], {"calibration": None}, "needs `calibration` data"),
    ],
)
def test_a_technique_that_does_not_fit_is_a_plan_error(steps, more, message, run_here, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_here("llama", *[SHORT | step if "train" in step else step for step in steps], **more)
    assert not list(tmp_path.iterdir())


def refused(capsys: pytest.CaptureFixture[str], folder: Path, recipe_values: dict[str, Any]) -> str:
    """The one message with which `run` into FOLDER/out ends with code 2."""
    path = folder.parent / "recipe.json"
    path.write_text(json.dumps(recipe_values))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path), "--output", str(folder / "out")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    return said[said.index("error: ") :]


BEGUN = "out.partial/.state"


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder, and in those in it."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (RIGL | {"every": 10}, r"error: steps\[0\].*masks would never move"),
        ({"train": "dsa", "keep": 0.05}, r"keep: 0\.05 is .* use at least 0\.\d"),
        ({"train": "masked", "mask": "dense"}, "has no zeros to keep; name a model that was pruned"),
        ({"train": "masked", "mask": "other"}, r"is a mask for another model: model\.layers\.\d\."),
    ],
    ids=["schedule", "budget", "no zeros", "another model"],
)
def test_bad_input_ends_the_command_with_code_2_and_one_message(step, message, tiny_folders, text, tmp_path, capsys):
    folder, start = tmp_path / "here", tiny_folders("llama")
    folder.mkdir()
    if step.get("mask") == "dense":
        step = step | {"mask": str(start)}
    if step.get("mask") == "other":
        step = step | {"mask": str(write_pruned(tmp_path / "other", intermediate_size=128))}
    assert re.search(message, refused(capsys, folder, values(start, text, SHORT | step)))
    left = set(files_of(folder))  # that a mask has no zeros is seen when weights are read, in a run that has begun
    assert left == ({"out.partial", BEGUN, f"{BEGUN}/run.json"} if step.get("mask") == str(start) else set())


def test_another_seed_or_text_does_not_continue_a_stopped_run(tiny_folders, tmp_path, capsys):
    """As the command line tells it: what the stopped run has left stays as it is."""
    model, text, folder = tiny_folders("llama"), write_text(tmp_path / "t.txt"), tmp_path / "here"
    folder.mkdir()
    mine = sparse_run("rigl")
    with pytest.raises(Stopped):
        run(recipe(model, text, mine), folder / "out", progress=StopAt())
    before, message = files_of(folder), "another model, data, recipe or version"
    assert f"{BEGUN}/run.json" in before
    assert message in refused(capsys, folder, values(model, text, mine | {"seed": 1}))
    text.write_bytes(text.read_bytes()[::-1])
    assert message in refused(capsys, folder, values(model, text, mine))
    assert files_of(folder) == before


def test_weights_that_are_shared_out_are_refused(monkeypatch):
    refuse_sharing("rigl")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PlanError, match="rigl ranks all weights of a matrix; launch plain processes"):
        refuse_sharing("rigl")
