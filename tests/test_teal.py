"""Run-time sparsity: what is left out is what the thresholds say, in prefill and decoding, and nothing is changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tiny_runs import digests, logits, proof_inside, recipe, reloaded, tensors, values

import llmcompress
from llmcompress.cli import main
from llmcompress.errors import FormatError, PlanError, SourceError
from llmcompress.evaluate import evaluate, suite_from_options
from llmcompress.export import export
from llmcompress.inspection import inspect
from llmcompress.run import run
from llmcompress.runtime_job import RuntimeJob
from llmcompress.source import open_source
from llmcompress.stages import plan_stages
from llmcompress.teal import SparseLinear, apply_thresholds, mean_share, measured, positions, weight_sizes
from llmcompress.thresholds import FILE, Threshold, Thresholds, thresholds_of

TEAL = {"runtime": "teal", "sparsity": 0.4, "dense_tokens": 4}
ROUND = {"method": "rtn", "bits": 4, "group_size": 32}
KINDS = ["llama", "gpt2", "opt"] + [
    pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3", "phi3", "gemma2", "gpt_neox")
]


@pytest.fixture(scope="module")
def made(tiny_folders, text, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("teal") / "out"
    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        return folder, run(recipe(tiny_folders("llama"), text, TEAL), folder)


def linears_of(model: Any) -> dict[str, Any]:
    """Every linear of the decoder blocks, a Conv1D included."""
    from llmcompress.arch import block_linears, find_blocks

    path, blocks = find_blocks(model)
    return {f"{path}.{i}.{name}": b.get_submodule(name) for i, b in enumerate(blocks) for name in block_linears(b)}


def some_thresholds(model: Any, dense: int = 4, size: float = 0.5) -> Thresholds:
    """The same threshold for all linears."""
    found = {n: getattr(m, "in_features", getattr(m, "nx", 0)) for n, m in linears_of(model).items()}
    return Thresholds(0.4, dense, {name: Threshold(size, 0.4, columns) for name, columns in found.items()})


def masked_by_hand(model: Any, thresholds: Thresholds) -> Any:
    """The same model with a hook on every linear, for whole texts: the truth."""

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].reshape(1, -1, args[0].shape[-1]).clone()
        late = x[:, thresholds.dense_tokens :]
        late[late.abs() <= module.cut] = 0
        return (x.view(args[0].shape),)

    for name, linear in linears_of(model).items():
        if each := thresholds.modules.get(name):
            linear.cut = each.threshold
            linear.register_forward_pre_hook(hook)
    return model


# applying


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_computed_with_masked_inputs(kind):
    model, thresholds = tiny_model(kind), some_thresholds(tiny_model(kind))
    dense = logits(model)
    truth = logits(masked_by_hand(tiny_model(kind), thresholds))
    apply_thresholds(model, thresholds)
    found = logits(model)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, :4], dense[:, :4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[:, 4:], dense[:, 4:], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_what_the_whole_text_gives(kind):
    """Through the cache, token by token, the first of them dense: the sparse product is the masked one."""
    model = tiny_model(kind)
    apply_thresholds(model, some_thresholds(model))
    tokens = torch.randint(3, 128, (1, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, past, parts = model(tokens).logits, None, []
        for piece in tokens.split([2, *[1] * 12], dim=1):
            out = model(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_not_the_start_of_a_text():
    model = tiny_model("llama")
    apply_thresholds(model, some_thresholds(model))
    tokens = torch.randint(3, 128, (1, 10), generator=torch.Generator().manual_seed(0))
    padded, mask = torch.cat([torch.ones(1, 5, dtype=torch.int64), tokens], 1), torch.ones(1, 15, dtype=torch.int64)
    mask[:, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(tokens).logits
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


def test_masks_of_every_shape_tell_where_texts_begin():
    """What [batch, tokens] says, as the masks say it that transformers makes of it for some caches."""
    flat = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    shown = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] & (flat[:, None, None] == 1)
    places = positions(flat, 2, 0, 5).clamp(min=-1)
    assert places.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    added = torch.zeros(2, 1, 5, 5).masked_fill(~shown, torch.finfo(torch.float32).min)
    for mask in (shown, added, {"full_attention": added, "sliding_attention": shown & shown.triu(-1)}):
        assert torch.equal(positions(mask, 2, 0, 5), places)
    assert positions(shown[:, :, 4:], 2, 4, 1).tolist() == [[2], [4]]
    assert positions({"full_attention": None}, 2, 3, 2).tolist() == [[3, 4], [3, 4]]
    for mask in (flat[:, 3:], "causal", shown[0, 0][None]):
        with pytest.raises(PlanError, match="does not tell where texts begin"):
            positions(mask, 2, 3, 2)


def test_a_static_cache_beside_padding_computes_the_same():
    """Its masks have four dimensions."""
    model = tiny_model("llama")
    apply_thresholds(model, some_thresholds(model))
    tokens = torch.randint(3, 128, (1, 10), generator=torch.Generator().manual_seed(0))
    padded, mask = torch.cat([torch.ones(1, 5, dtype=torch.int64), tokens], 1), torch.ones(1, 15, dtype=torch.int64)
    mask[:, :5] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    plain, static = (
        torch.stack(model.generate(padded, attention_mask=mask, cache_implementation=cache, **options).logits)
        for cache in (None, "static")
    )
    torch.testing.assert_close(static, plain, rtol=1e-4, atol=1e-4)


def test_generate_is_greedy_decoding_of_the_masked_model():
    model, thresholds = tiny_model("llama"), some_thresholds(tiny_model("llama"), size=0.3)
    truth = masked_by_hand(tiny_model("llama"), thresholds)
    apply_thresholds(model, thresholds)
    prompt = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(2))
    found = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = truth.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(found, expected)


def test_no_threshold_leaves_the_same_bits():
    model = tiny_model("llama")
    dense = logits(model)
    apply_thresholds(model, Thresholds(0.0, 0, {}))
    assert torch.equal(logits(model), dense)


def test_weights_names_and_tied_tables_stay(tmp_path):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storage = {p.data_ptr() for p in model.parameters()}
    apply_thresholds(model, some_thresholds(model))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(sparse) == 14
    assert all(m.weight.T.is_contiguous() for m in sparse)
    assert "threshold=0.5" in repr(sparse[0])
    assert len(storage) == len({p.data_ptr() for p in model.parameters()})  # no second copies
    model.save_pretrained(tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert all(torch.equal(again[name], before[name]) for name in again)


def test_what_is_left_out_is_counted():
    model = tiny_model("llama")
    thresholds = some_thresholds(model)
    tokens = apply_thresholds(model, thresholds)
    seen: dict[str, list[float]] = {}

    def note(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(
            float((args[0][:, 4:].abs() <= 0.5).float().mean())
        )

    for name, linear in linears_of(model).items():
        linear.register_forward_pre_hook(note(name))
    with measured(tokens) as meter:
        logits(model)
    shares = meter.shares()
    assert shares == pytest.approx({name: found[0] for name, found in seen.items()})
    logits(model)
    assert meter.shares() == shares  # no longer counted
    sizes = weight_sizes(model, shares)
    assert mean_share(shares, sizes) == pytest.approx(sum(shares[n] * sizes[n] for n in shares) / sum(sizes.values()))
    assert mean_share({}, {}) == 0.0


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("model.layers.7.mlp.up_proj", 96, "no module 'model.layers.7.mlp.up_proj'"),
        ("model.layers.0.mlp.up_proj", 64, "has 96 inputs, and the file is of a model with 64"),
        ("model.norm", 96, "model.norm has None inputs"),
    ],
)
def test_thresholds_of_another_model_are_refused(name, columns, message):
    model = tiny_model("llama")
    good = some_thresholds(model).modules
    with pytest.raises(FormatError, match=message):
        apply_thresholds(model, Thresholds(0.4, 0, {**good, name: Threshold(0.1, 0.4, columns)}))
    assert not [m for m in model.modules() if isinstance(m, SparseLinear)]


def test_a_linear_that_is_fused_with_others_is_not_left_out_silently():
    model = tiny_model("llama")
    apply_thresholds(model, some_thresholds(model))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(x[..., :1].expand(*x.shape[:-1], 160))
    with pytest.raises(FormatError, match=r"layers.1.mlp.gate_proj was not called"):
        logits(model)


# the step


def test_a_run_finds_the_share_that_was_asked_for(made):
    folder, results = made
    found = thresholds_of(folder)
    assert found is not None
    assert found.sparsity == pytest.approx(0.4, abs=0.02)
    assert (found.dense_tokens, len(found.modules)) == (4, 14)
    levels = [each.sparsity for each in found.modules.values()]
    assert max(levels) - min(levels) > 0.05  # the search has spread them
    runtime = results["runtime"]
    assert runtime["sparsity"] == found.sparsity
    linears = sum(row["before_bytes"] for row in results["layers"])
    saved = runtime["read_bytes"]["before"] - runtime["read_bytes"]["after"]
    assert saved == pytest.approx(found.sparsity * linears, rel=1e-3)
    assert {row["method"] for row in results["layers"]} == {"teal"}
    assert all(row["input_sparsity"] == found.modules[row["name"]].sparsity for row in results["layers"])


def test_other_text_leaves_out_about_as_much(made, tiny_folders):
    """And the linear inputs that the search saw, with sparse blocks before them, are what comes at run time."""
    folder, _ = made
    model = reloaded(folder)
    tokens = apply_thresholds(model, thresholds_of(folder))
    with measured(tokens) as meter, torch.no_grad():
        for start in range(0, 96, 32):
            model(torch.arange(start, start + 32)[None])
    shares = meter.shares()
    assert mean_share(shares, weight_sizes(model, shares)) == pytest.approx(0.4, abs=0.06)  # of 84 random tokens


def test_the_folder_holds_the_dense_model(made, tiny_folders):
    folder, results = made
    before, after = tensors(tiny_folders("llama")), tensors(folder)
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert results["proof"]["passed"]
    assert results["size"]["ratio"] == pytest.approx(1, abs=0.05)
    assert torch.equal(logits(reloaded(folder)), logits(reloaded(tiny_folders("llama"))))
    loaded = logits(llmcompress.load(folder))
    assert not torch.allclose(loaded[:, 4:], logits(reloaded(folder))[:, 4:], atol=1e-2)
    with pytest.raises(SourceError, match="activation thresholds"):
        open_source(str(folder))


def test_the_card_and_inspect_say_who_applies_them(made, capsys):
    folder, _ = made
    card, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    assert "`llmcompress.load` leaves out" in card
    assert "any other engine computes with all of them" in card
    assert "llmcompress.load(name)" in card
    assert "weights read for a token" in card
    assert FILE in page
    found = inspect(folder)
    assert found["thresholds"] == {"sparsity": thresholds_of(folder).sparsity, "dense_tokens": 4, "linears": 14}
    assert found["engines"][0]["engine"] == "llmcompress"
    assert all("only llmcompress.load" in row["why"] for row in found["engines"][1:])
    main_ok("inspect", str(folder))
    assert "left out for each" in capsys.readouterr().out
    main_ok("list", "runtimes", "--json")
    assert json.loads(capsys.readouterr().out)[0]["name"] == "teal"


def main_ok(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code


def test_scores_are_of_the_sparse_model(made, tiny_folders, text):
    suite = suite_from_options(None, None, text, 16, 2, None)
    sparse, dense = evaluate(made[0], suite), evaluate(tiny_folders("llama"), suite)
    assert (sparse["thresholds"], dense["thresholds"]) == (True, False)
    assert sparse["perplexity"][0]["compressed"] != dense["perplexity"][0]["compressed"]


def test_a_stopped_search_goes_on_behind_the_blocks_that_are_done(made, tiny_folders, text, tmp_path, monkeypatch):
    """Killed after the first of two blocks: its histograms and its search are not taken again, and nothing changes."""
    wanted = recipe(tiny_folders("llama"), text, TEAL)
    searched: list[str] = []
    find = RuntimeJob._find_in

    def counted(job: Any, block: Any, *args: Any) -> Any:
        if block.name in stop:
            raise KeyboardInterrupt
        searched.append(block.name)
        return find(job, block, *args)

    monkeypatch.setattr(RuntimeJob, "_find_in", counted)
    stop = ["model.layers.1"]
    with pytest.raises(KeyboardInterrupt), proof_inside(monkeypatch):
        run(wanted, tmp_path / "out")
    stop.clear()
    with proof_inside(monkeypatch):
        run(wanted, tmp_path / "out")
    assert searched == ["model.layers.0", "model.layers.1"]
    assert (tmp_path / "out" / FILE).read_bytes() == (made[0] / FILE).read_bytes()


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_file(made, tiny_folders, text, tmp_path, monkeypatch):
    with proof_inside(monkeypatch):
        run(recipe(tiny_folders("llama"), text, TEAL), tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_bytes() == (made[0] / FILE).read_bytes()
    assert digests(tmp_path / "out") == digests(made[0])


def test_kept_and_untargeted_linears_have_no_threshold(run_here):
    step = TEAL | {"targets": ["*.mlp.*"], "allocation": "uniform"}
    folder, results = run_here("llama", step, keep=["model.layers.0.mlp.up_proj"])
    found = thresholds_of(folder)
    assert len(found.modules) == 5
    assert all(".mlp." in name for name in found.modules)
    assert all(each.sparsity == pytest.approx(0.4, abs=0.01) for each in found.modules.values())
    assert len(results["layers"]) == 5


@pytest.mark.slow
def test_nothing_left_out_is_the_dense_model(run_here, tiny_folders):
    folder, results = run_here("llama", TEAL | {"sparsity": 0})
    assert results["runtime"]["sparsity"] == 0
    assert torch.equal(logits(llmcompress.load(folder)), logits(reloaded(tiny_folders("llama"))))


def test_quantized_weights_stay_as_they_are(run_here):
    before, _ = run_here("llama", ROUND)
    folder, results = run_here("llama", ROUND, TEAL)
    old, new = digests(before), digests(folder)
    assert {name: new[name] for name in old} == old
    assert {row["method"] for row in results["layers"]} == {"rtn + teal"}
    assert results["runtime"]["read_bytes"]["before"] == results["runtime"]["read_bytes"]["after"]
    model = llmcompress.load(folder)
    assert not torch.allclose(logits(model)[:, 4:], logits(reloaded(folder))[:, 4:], atol=1e-2)


def test_an_export_keeps_the_thresholds(made, tmp_path):
    export(made[0], "dense", tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (made[0] / FILE).read_bytes()
    torch.testing.assert_close(logits(llmcompress.load(tmp_path / "again")), logits(llmcompress.load(made[0])))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi3", "gemma3_text", "mistral"])
def test_other_architectures_get_thresholds(kind, run_here):
    folder, results = run_here(kind, TEAL)
    assert results["runtime"]["sparsity"] == pytest.approx(0.4, abs=0.03)
    model = llmcompress.load(folder)
    assert not torch.allclose(logits(model)[:, 4:], logits(reloaded(folder))[:, 4:], atol=1e-2)


# what is refused


@pytest.mark.parametrize(
    ("steps", "more", "message"),
    [
        ([TEAL, ROUND], {}, r"steps\[1\] \(rtn\): would change the model whose activations steps\[0\] \(teal\)"),
        ([TEAL, TEAL], {}, "would change the model whose activations"),
        ([ROUND, {"train": "recover", "parameters": "lora"}, TEAL], {}, "leaves LoRA beside them"),
        ([TEAL], {"calibration": None}, "needs `calibration` data"),
        ([TEAL | {"dense_tokens": 32}], {}, "samples have only 32"),
        ([TEAL | {"search_samples": 5}], {}, "5 windows, but calibration has 4"),
        ([TEAL | {"targets": ["*.mpl.*"]}], {}, r"'\*.mpl.\*' matches no linear"),
        ([TEAL], {"output": {"format": "bitmask"}}, "leaves dense ones"),
        ([TEAL], {"keep": ["lm_haed"]}, "matches nothing"),
    ],
)
def test_what_does_not_fit_is_a_plan_error(steps, more, message, run_here, tmp_path):
    with pytest.raises(PlanError, match=message):
        run_here("llama", *steps, **more)
    assert not list(tmp_path.iterdir())


def test_a_bad_option_is_named_and_nothing_is_written(tiny_folders, text, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values(tiny_folders("llama"), text, TEAL | {"sparsty": 0.4})))
    with pytest.raises(SystemExit) as end:
        main(["run", str(path), "--output", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "did you mean 'sparsity'" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_damaged_file_is_refused_by_load_and_eval(made, text, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    contents = json.loads((folder / FILE).read_text())
    contents["modules"]["model.layers.0.mlp.up_proj"]["in_features"] = 7
    (folder / FILE).write_text(json.dumps(contents))
    with pytest.raises(FormatError, match="has 96 inputs"):
        llmcompress.load(folder)
    with pytest.raises(FormatError, match="has 96 inputs"):
        evaluate(folder, suite_from_options(None, None, text, 16, 2, None))


def test_the_plan_says_what_it_does(made, tiny_folders, text):
    plan = plan_stages(recipe(tiny_folders("llama"), text, TEAL), open_source(str(tiny_folders("llama"))))[0][1]
    assert "40% of the weights of 14 linears" in plan.notes[0]
    measured_bytes = made[1]["plan"]["measured"]["output_bytes"]
    assert plan.predicted.output_bytes == pytest.approx(measured_bytes, rel=0.1)
