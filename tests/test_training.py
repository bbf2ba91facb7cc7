"""Losses against their definitions; runs that learn, keep masks, and continue after a kill with the same bytes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import digests, proof_inside, recipe, reloaded, run_die_at, tensors, values

from llmcompress.checkpoint import partial_folder
from llmcompress.errors import CalibrationError, PlanError, RecipeError, ResumeError
from llmcompress.recipe import parse_step
from llmcompress.run import run
from llmcompress.training import TRAININGS, Recover
from llmcompress.training.loop import Task, agreed, batch_rows, drawn_rows, masked, rate, train
from llmcompress.training.losses import Taught, cross_entropy, distillation, hidden_error, keep_largest
from llmcompress.training.schedule import ramp
from llmcompress.training.technique import Learner, Technique

RECOVER = {"train": "recover", "steps": 6, "batch": 2, "learning_rate": 1e-3, "warmup": 2, "checkpoint_every": 2}
NARROW = {"structure": "mlp_channel", "score": "magnitude", "ratio": 0.5, "of": "group", "compensate": "none"}


def random_logits(seed: int, vocabulary: int = 40) -> torch.Tensor:
    return 3 * torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_over_all_tokens_is_the_divergence(temperature):
    p, q = random_logits(0), random_logits(1)
    found = distillation(q, Taught(*keep_largest(p, 40, temperature), None), temperature)
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (p, q))
    expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # others have probability 1e-6 instead of 0


@settings(max_examples=30)
@given(k=st.integers(1, 39), seed=st.integers(0, 99))
def test_distillation_of_few_tokens_is_a_divergence_below_the_full_one(k, seed):
    p, q = random_logits(seed), random_logits(seed + 1000)
    few, full = (float(distillation(q, Taught(*keep_largest(p, n, 1.0), None), 1.0)) for n in (k, 40))
    assert -1e-5 <= few <= full + 1e-3
    assert float(distillation(p, Taught(*keep_largest(p, k, 1.0), None), 1.0)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_losses_is_that_of_their_formulas(dtype):
    """Over more positions than are taken at once, and not a multiple of these."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 40, generator=generator).to(dtype).requires_grad_()
    tokens = torch.randint(40, (3, 50), generator=generator)
    log_p = torch.randn(3, 50, 40, generator=generator).log_softmax(-1)
    taught = Taught(torch.arange(40).expand(3, 50, 40), log_p, None)

    def plain(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(rows.float().log_softmax(-1), log_p, log_target=True, reduction="none").sum(
            -1
        )

    for found, expected in (
        (distillation(logits, taught, 1.0), plain(logits).mean()),
        (
            cross_entropy(logits, tokens),
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),
        ),
    ):
        wanted = torch.autograd.grad(expected.float(), logits)[0]
        have = torch.autograd.grad(2 * found, logits)[0]
        assert float((have - 2 * wanted).norm()) <= 4 * torch.finfo(dtype).eps * float((2 * wanted).norm())


def test_cross_entropy_and_hidden_error():
    logits, tokens = random_logits(0), torch.arange(10).reshape(2, 5)
    expected = -sum(logits[i, j].log_softmax(-1)[tokens[i, j + 1]] for i in range(2) for j in range(4)) / 8
    torch.testing.assert_close(cross_entropy(logits, tokens), expected)
    wanted = torch.full((1, 2, 3), 2.0)
    taught = Taught(torch.zeros(0), torch.zeros(0), wanted)
    assert float(hidden_error(wanted, taught)) == 0
    assert float(hidden_error(wanted + 1, taught)) == pytest.approx(0.25)


@settings(max_examples=30)
@given(windows=st.integers(1, 12), batch=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_pass_sees_every_window_once(windows, batch, seed):
    options = Recover(batch=batch, seed=seed)
    seen = torch.cat([batch_rows(windows, options, step) for step in range(2 * windows)])
    for passed in seen[: len(seen) // windows * windows].split(windows):
        assert sorted(passed.tolist()) == list(range(windows))
    assert torch.equal(batch_rows(windows, options, 3), batch_rows(windows, options, 3))


def test_the_rate_rises_and_falls():
    options = Recover(steps=100, warmup=10, learning_rate=1.0)
    rates = [rate(step, options) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11


def test_masks_clear_gradients_and_weights():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.tensor([[1.0, torch.inf], [torch.nan, 1.0]])  # of which zero times is not zero
    mask = {"w": torch.tensor([[True, False], [False, True]])}
    for gradients in (True, False):
        masked({"w": weight}, mask, gradients=gradients)
    assert weight.grad.tolist() == weight.tolist() == [[1, 0], [0, 1]]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2", "gemma3_text", "opt")]


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", *SLOW])
def test_a_narrower_model_comes_closer_to_the_dense_one(kind, run_here):
    steps = RECOVER | {"steps": 12, "batch": 4, "precision": "float32"}
    folder, results = run_here(kind, NARROW, steps)
    losses = results["training"][0]["losses"]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert results["proof"]["passed"]
    assert [stage["name"] for stage in results["stages"]] == ["before", "mlp_channel", "recover"]
    assert reloaded(folder).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "cross_entropy"},
        {"loss": {"distillation": 1, "hidden": 0.5}, "temperature": 2.0, "top_k": 8},
        {"parameters": "lora", "rank": 4},
        {"gradient_checkpointing": True, "micro_batch": 2},
    ],
    ids=["cross_entropy", "mixed", "lora", "checkpointing"],
)
def test_losses_and_ways_to_train(options, run_here):
    steps = RECOVER | {"steps": 12, "batch": 4, "precision": "float32", "learning_rate": 3e-3} | options
    _, results = run_here("llama", NARROW, steps)
    losses = results["training"][0]["losses"]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_gradient_checkpointing_and_micro_batches_change_nothing(run_here):
    steps = RECOVER | {"precision": "float32", "loss": "cross_entropy"}
    plain = run_here("llama", steps)[1]["training"][0]["losses"]
    other = run_here("llama", steps | {"gradient_checkpointing": True, "micro_batch": 2})[1]["training"][0]["losses"]
    assert other == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
@pytest.mark.parametrize("loss", ["distillation", {"distillation": 1, "hidden": 1}])
def test_compiled_blocks_learn_the_same(loss, run_here):
    changed = {"loss": loss, "precision": "float32"}
    losses = []
    for compiled in (False, True):
        results = run_here("llama", NARROW, RECOVER | changed | {"compile": compiled})[1]
        losses.append(results["training"][0]["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_compiling_without_a_compiler_is_refused(run_here, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PlanError, match=r"compile: there is no no-such-compiler on this machine"):
        run_here("llama", RECOVER | {"loss": "cross_entropy", "compile": True})
    assert not list(tmp_path.iterdir())


def test_pruned_weights_stay_zero_while_others_learn(run_here):
    prune = {"method": "magnitude", "pattern": "2:4"}
    before, _ = run_here("llama", prune, output={"format": "dense"})
    after, results = run_here("llama", prune, RECOVER)
    old, new = tensors(before), tensors(after)
    pruned = [name for name in old if "_proj" in name]
    assert pruned
    for name in pruned:
        assert torch.equal(old[name] == 0, new[name] == 0), name
        assert not torch.equal(old[name], new[name])
    assert math.isfinite(results["training"][0]["losses"][-1])
    assert results["sparsity"]["of_decoder_linears"] == 0.5
    assert {row["pattern"] for row in results["layers"]} == {"2:4"}


def test_a_killed_training_continues_with_the_same_bytes(tiny_folders, text, tmp_path):
    wanted = values(tiny_folders("llama"), text, NARROW, RECOVER)
    moments = [
        {"folder": str(tmp_path / name), "side": side, "file": file}
        for name, side, file in [("a", "after", "train.json"), ("b", "before", "trained.safetensors")]
    ]
    run_die_at(moments, tmp_path / "whole", wanted)
    for moment in moments:
        folder = Path(moment["folder"])
        assert partial_folder(folder).exists() or (folder.parent / (folder.name + ".stages")).exists()
        with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
            run(recipe(tiny_folders("llama"), text, NARROW, RECOVER), folder)
        assert digests(folder) == digests(tmp_path / "whole")
        assert not (folder.parent / (folder.name + ".stages")).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "recovr"}, "did you mean 'recover'"),
        ({"loss": "kl"}, "expected one of cross_entropy, distillation, hidden"),
        ({"loss": {"distillation": 0}}, "above 0"),
        ({"batch": 3, "micro_batch": 2}, "no multiple"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"warmup": 6}, "the learning rate would rise for 6 steps of 6 and never be what `learning_rate` says"),
        ({"parameters": "some"}, "lora"),
        ({"stepz": 5}, "did you mean 'steps'"),
    ],
)
def test_a_bad_train_step_is_one_message(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_step(RECOVER | changes, "steps[0]")


def test_training_needs_data_and_lora_would_fill_zeros(run_here):
    with pytest.raises(PlanError, match="needs `calibration` data"):
        run_here("llama", RECOVER | {"loss": "cross_entropy"}, calibration=None)
    with pytest.raises(PlanError, match="would fill the zeros"):
        run_here("llama", {"method": "magnitude", "pattern": "2:4"}, RECOVER | {"parameters": "lora"})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([RECOVER], "the model that the run begins with is the teacher"),
        ([{"method": "rtn", "group_size": 32}, RECOVER], "quantize last"),
        ([{"method": "magnitude", "pattern": "2:4"}, NARROW], "put structure steps first"),
        ([RECOVER | {"loss": "cross_entropy", "data": {"data": "x.txt", "samples": 1, "length": 4096}}], "knows 128"),
    ],
)
def test_an_order_that_makes_no_sense_is_a_plan_error(steps, message, run_here, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_here("llama", *steps)
    assert not list(tmp_path.iterdir())


def tiny_task(loss: Any, technique: Any = None, targets: tuple[str, ...] = ()) -> Task:
    return Task(8, 16, loss, {}, cpu=True, technique=technique, targets=targets)


def test_a_gradient_that_is_no_number_ends_the_training_before_the_step(tmp_path):
    """The loss is a number, its gradient is infinite: the weights are still those of the step before."""
    model, seen = torch.nn.Linear(2, 1), list[torch.Tensor]()

    def loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
        seen.append(model.weight.detach().clone())
        total = model.weight.sum()
        return (total - total.detach()).abs().sqrt() if len(seen) == 3 else total.square()

    options = TRAININGS["dense"].parse({"steps": 5, "batch": 1, "warmup": 0, "checkpoint_every": 100}, "")
    with pytest.raises(
        CalibrationError, match=r"step 2: the loss is 0\.0 and the norm of its gradient (nan|inf).*lower"
    ):
        train(model, options, tiny_task(loss), tmp_path, lambda *_: None)
    assert len(seen) == 3
    assert torch.equal(model.weight, seen[-1])
    assert not torch.equal(seen[1], seen[2])


def test_what_a_technique_adds_is_clipped_by_itself(tmp_path):
    """A gate with a huge gradient leaves the weights theirs."""

    class Gate(Technique):
        scale = 1.0

        def prepare(self, learner: Learner) -> None:
            learner.model.register_parameter("gate", torch.nn.Parameter(torch.ones(())))

        def penalty(self, step: int, learner: Learner) -> torch.Tensor:
            return self.scale * learner.model.get_parameter("gate")

        def after_step(self, step: int, learner: Learner) -> None:
            self.seen = [p.grad.detach().clone() for p in learner.model.parameters()]

    norms = []
    for scale in (1e-3, 1e6):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1, bias=False)
        options = TRAININGS["dense"].parse({"steps": 1, "batch": 1, "warmup": 0, "clip": 0.5}, "")
        technique = Gate(options)
        technique.scale = scale
        task = tiny_task(lambda model, rows: 0.1 * model.weight.sum(), technique)
        train(model, options, task, tmp_path / str(scale), lambda *_: None)
        norms.append([float(gradient.norm()) for gradient in technique.seen])
    assert norms[0] == pytest.approx([0.1 * 2**0.5, 1e-3], rel=1e-4)
    assert norms[1] == pytest.approx([0.1 * 2**0.5, 0.5], rel=1e-4)


def test_all_processes_take_what_the_first_has_chosen(monkeypatch):
    """Masks, and what else was chosen, as who goes first under growing_l2."""
    technique = TRAININGS["growing_l2"].parse({"ratio": 0.5}, "").technique()
    technique.masks, technique.stay = {"w": torch.tensor([True, False])}, {"a": torch.tensor([True, True, False])}
    learner = Learner(torch.nn.Linear(1, 1), {}, lambda rows: rows, torch.arange(1))
    monkeypatch.setattr("accelerate.utils.broadcast", lambda tensor: 1 - tensor)  # the first process has the opposite
    agreed(technique, learner, SimpleNamespace(num_processes=1, device="cpu"))
    assert technique.masks["w"].tolist() == [True, False]
    agreed(technique, learner, SimpleNamespace(num_processes=2, device="cpu"))
    assert technique.masks["w"].tolist() == [False, True]
    assert technique.stay["a"].tolist() == [False, False, True]


def test_a_ramp_goes_from_nothing_to_all():
    assert [ramp(x) for x in (-1, 0, 0.25, 1, 2)] == [0, 0, 0.25, 1, 1]
    assert [ramp(x, 3) for x in (0, 0.5, 1)] == [0, 0.875, 1]


def test_a_loss_that_is_no_number_ends_the_run(run_here):
    with pytest.raises(CalibrationError, match="lower `learning_rate`"):
        run_here("llama", RECOVER | {"learning_rate": 1e30, "clip": 1e30, "loss": "cross_entropy", "warmup": 0})


def test_a_mask_survives_training_into_a_packed_format(run_here):
    """Prune, recover, round: the format for both takes what is left, as the pattern is known to the end."""
    prune, bits = {"method": "magnitude", "pattern": "2:4"}, {"method": "rtn", "group_size": 32}
    _, results = run_here("llama", prune, RECOVER, bits, output={"format": "sparse24-int4"})
    assert results["format"] == "sparse24-int4"
    assert results["sparsity"]["of_decoder_linears"] >= 0.5
    assert [stage["name"] for stage in results["stages"]] == ["before", "magnitude", "recover", "rtn"]


def test_every_stage_of_prune_recover_quantize_has_its_size_and_score(run_here, tmp_path, text):
    suite = tmp_path / "suite.yaml"
    texts = [{"name": "text", "source": str(text), "length": 32, "windows": 4}]
    suite.write_text(json.dumps({"name": "test", "version": 1, "perplexity": texts}))
    steps = [NARROW | {"multiple": 32}, RECOVER, {"method": "rtn", "group_size": 32}]
    folder, results = run_here("llama", *steps, evaluate={"suite": str(suite)})
    stages = results["stages"]
    assert [stage["name"] for stage in stages] == ["before", "mlp_channel", "recover", "rtn"]
    dense, narrow, recovered, rounded = (stage["bytes"] for stage in stages)
    assert dense > narrow == recovered > rounded
    found = [stage["perplexity"][0]["value"] for stage in stages]
    assert [found[0], found[-1]] == [
        results["scores"]["perplexity"][0][side]["value"] for side in ("base", "compressed")
    ]
    assert len(set(found)) == 4
    card = (folder / "README.md").read_text()
    assert all(f"{value:.2f}" in card for value in found)


def test_what_is_kept_does_not_learn(run_here, tiny_folders):
    keep = ["model.layers.0.self_attn.q_proj"]
    folder, _ = run_here("llama", RECOVER | {"loss": "cross_entropy"}, keep=keep)
    old, new = tensors(Path(tiny_folders("llama"))), tensors(folder)
    same = {name for name in old if torch.equal(old[name].to(new[name].dtype), new[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in same
    assert "model.layers.1.self_attn.q_proj.weight" not in same


def test_a_stage_of_another_recipe_is_not_replaced(run_here, tiny_folders, text, tmp_path, monkeypatch):
    """Killed after its first stage; another recipe on the same folder must ask for --overwrite."""
    folder = tmp_path / "out"
    wanted = values(tiny_folders("llama"), text, NARROW, RECOVER)
    run_die_at([{"folder": str(folder), "side": "after", "file": "train.json"}], tmp_path / "whole", wanted)
    other = recipe(tiny_folders("llama"), text, NARROW | {"ratio": 0.25}, RECOVER)
    with proof_inside(monkeypatch), pytest.raises(ResumeError, match="give --overwrite"):
        run(other, folder)
    more_steps = recipe(tiny_folders("llama"), text, NARROW, RECOVER | {"steps": 7})
    with proof_inside(monkeypatch), pytest.raises(ResumeError, match="give --overwrite"):
        run(more_steps, folder)
    with proof_inside(monkeypatch):
        run(other, folder, overwrite=True)
    assert not (tmp_path / "out.stages").exists()


def test_folders_of_somebody_else_stay(run_here, tmp_path, monkeypatch, tiny_folders, text):
    mine = tmp_path / "out.stages" / "mine"
    mine.mkdir(parents=True)
    with proof_inside(monkeypatch), pytest.raises(ResumeError, match="was not made by llmcompress"):
        run(recipe(tiny_folders("llama"), text, NARROW), tmp_path / "out")
    assert mine.exists()


def test_the_teacher_reads_what_will_be_learned_from():
    options = Recover.parse({"steps": 3, "batch": 2, "warmup": 0}, "")
    rows = drawn_rows(100, options)
    assert rows == sorted({int(r) for step in range(3) for r in batch_rows(100, options, step)})
    assert len(rows) == 6


def test_hidden_states_of_unlike_width_are_refused(run_here):
    narrow = {"structure": "hidden", "score": "random", "ratio": 0.3}
    with pytest.raises(PlanError, match="hidden compares hidden states, of which the dense model has 96"):
        run_here("llama", narrow, RECOVER | {"loss": {"hidden": 1, "distillation": 1}})
