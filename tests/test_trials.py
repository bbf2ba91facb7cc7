"""Trials: what is run and what is known already, on processes that only pretend to measure."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from evals_modules import evals_module

from llmcompress import catalog
from llmcompress.recipe import parse_recipe

trials, code, comparisons = evals_module("trials"), evals_module("code_version"), evals_module("comparisons")

PRETEND = """
import json, os, pathlib, sys
values, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
if values.get("fails"):
    sys.exit("error: it was told to")
if values["model"] != "none":
    assert (pathlib.Path(values["model"]) / "results.json").is_file()
folder.mkdir()
row = {"perplexity": 3.0, "nll": 1.0, "tokens": 10, "seconds": 1.0, "trainings": 1}
row |= {"cores": sorted(os.sched_getaffinity(0)), "threads": os.environ["OMP_NUM_THREADS"]}
(folder / "results.json").write_text(json.dumps({"row": row}))
"""


class Pretended(trials.Trial):
    """A trial that takes no time."""

    def command(self, recipe: Path, folder: Path) -> list[str]:
        return [sys.executable, "-S", "-c", PRETEND, str(recipe), str(folder)]


def some(**changes: Mapping[str, Any]) -> list[Any]:
    """A model, two trials that go on from it, and one of its own."""
    values: dict[str, dict[str, Any]] = {
        "dense": {"model": "none", "steps": [{"train": "dense"}]},
        "wanda": {"model": "@dense", "steps": [{"method": "wanda"}]},
        "twice": {"model": "@wanda", "steps": [{"method": "rtn"}]},
        "rigl": {"model": "none", "steps": [{"train": "rigl"}]},
    }
    return [Pretended(name, 0, given | changes.get(name, {})) for name, given in values.items()]


@pytest.fixture
def bench(tmp_path):
    def make(**changes: Mapping[str, Any]) -> Any:
        return trials.Bench(some(**changes), tmp_path / "known.json", 1, work=tmp_path / "work")

    return make


def names(bench: Any) -> list[str]:
    return [trial.name for trial in bench.due()]


def test_rows_are_kept_and_nothing_is_run_twice(bench, tmp_path):
    first = bench()
    assert names(first) == ["dense", "wanda", "twice", "rigl"]
    assert first.run() == []
    rows = json.loads((tmp_path / "known.json").read_text())
    assert {name: row["0"]["tokens"] for name, row in rows.items()} == {
        "dense": 10,
        "rigl": 10,
        "twice": 30,
        "wanda": 20,
    }
    assert rows["rigl"]["0"]["from"]["jobs"] == 1
    assert rows["rigl"]["0"]["from"]["commit"]
    assert rows["rigl"]["0"]["from"]["versions"] == {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert names(bench()) == []
    left = {path.name.split("-")[0] for path in (tmp_path / "work").iterdir() if path.is_dir()}
    assert left == {"dense", "wanda"}  # what others go on from


def test_another_recipe_is_another_trial_and_so_is_what_goes_on_from_it(bench):
    assert bench().run() == []
    assert names(bench(rigl={"steps": [{"train": "rigl", "density": 0.1}]})) == ["rigl"]
    assert names(bench(dense={"dtype": "float32"})) == ["dense", "wanda", "twice"]
    assert names(bench(wanda={"dtype": "float32"})) == ["wanda", "twice"]


def test_a_model_that_is_gone_is_made_again_only_if_something_goes_on_from_it(bench, tmp_path):
    assert bench().run() == []
    for folder in (tmp_path / "work").glob("dense-*/"):
        (folder / "results.json").unlink()
        folder.rmdir()
    assert names(bench()) == []
    assert names(bench(rigl={"dtype": "float32"})) == ["rigl"]
    assert names(bench(wanda={"dtype": "float32"})) == ["dense", "wanda", "twice"]


def test_what_fails_is_told_and_keeps_only_its_heirs_from_being_run(bench, capsys):
    wrong = bench(wanda={"fails": True}).run()
    assert len(wrong) == 2
    assert wrong[0].startswith("wanda, seed 0: exit code 1")
    assert wrong[0].endswith("error: it was told to")
    assert wrong[1] == "twice, seed 0: not run, as what it goes on from has failed"
    assert names(bench(wanda={"fails": True})) == ["wanda", "twice"]
    assert names(bench()) == ["wanda", "twice"]  # dense and rigl are known
    assert "4 of 4" in capsys.readouterr().err


def test_a_result_that_was_not_kept_is_read_and_half_of_one_is_made_anew(bench, tmp_path):
    first = bench()
    folders = {trial.name: first.folder(trial) for trial in first.trials}
    for name in ("dense", "rigl"):
        folders[name].mkdir(parents=True)
    row = {"perplexity": 7.0, "nll": 2.0, "tokens": 5, "seconds": 1.0, "trainings": 1}
    (folders["dense"] / "results.json").write_text(json.dumps({"row": row}))
    assert first.run() == []
    assert first.rows["dense"]["0"]["perplexity"] == 7.0
    assert first.rows["rigl"]["0"]["perplexity"] == 3.0


def test_jobs_have_cores_of_their_own(bench, monkeypatch):
    monkeypatch.setattr(trials.os, "sched_getaffinity", lambda _: {3, 1, 8, 5, 9})
    assert trials.core_shares(2) == [{1, 3}, {5, 8}]
    assert trials.core_shares(1) == [{1, 3, 5, 8, 9}]
    with pytest.raises(SystemExit, match="there are 5 cores"):
        trials.core_shares(6)
    monkeypatch.undo()
    first = bench()
    assert first.run() == []
    row = first.rows["rigl"]["0"]
    assert row["threads"] == str(len(row["cores"]))


def test_what_a_trial_goes_on_from_must_be_there(tmp_path):
    with pytest.raises(SystemExit, match="dense: another trial goes on from it"):
        trials.Bench(some()[1:], tmp_path / "known.json")


def test_processes_end_with_the_bench(bench, monkeypatch):
    first = bench()
    begun: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(Pretended, "command", lambda *_: [sys.executable, "-S", "-c", "import time; time.sleep(60)"])

    def tired(seconds: float) -> None:
        raise KeyboardInterrupt

    start = first.start
    monkeypatch.setattr(first, "start", lambda *given: begun.append((run := start(*given)).process) or run)
    monkeypatch.setattr(trials.time, "sleep", tired)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert [process.poll() is not None for process in begun] == [True]


def test_several_trainings_are_counted():
    steps = [{"train": "lottery_ticket", "rounds": 4}]
    assert trials.Trial("a", 0, {"model": "m", "steps": steps}).trainings == 5
    assert trials.Trial("a", 0, {"model": "m", "cache": "knorm"}).trainings == 1


def test_a_row_keeps_what_techniques_say_of_themselves(tmp_path):
    curve = {"name": "early_bird", "loss": {"cross_entropy": 1}, "losses": [5.0, 4.0], "data": {"sha256": "d"}}
    curve |= {"tokens": 8, "seconds": 2.0, "early_bird": {"ticket": 3, "settled": True, "distances": [0.5, 0.0]}}
    runtime = {"sparsity": 0.5, "read_bytes": {"before": 10, "after": 5}}
    results = {
        "training": [curve], "scores": {"perplexity": [{"compressed": {"value": 9.0, "nll": 2.2}}]},
        "base_model": {"parameters": 7}, "format": "bitmask", "sparsity": None, "size": {"after_bytes": 6},
        "timing": {"stages": {"compress": 1.0}}, "calibration": {"sha256": "d"}, "runtime": runtime,
    }  # fmt: skip
    row = trials.row_of(results, tmp_path, 1)
    assert row["training"] == [{key: value for key, value in curve.items() if key not in ("losses", "data")}]
    assert row["runtime"] == runtime
    assert (row["perplexity"], row["seconds"], row["tokens"], row["zeros"]) == (9.0, 2.0, 8, 0.0)


# the code's version


def test_the_version_of_code_is_that_of_what_it_computes(monkeypatch, tmp_path):
    text = 'def f(x):\n    """Words."""\n    return x + 1  # why\n'
    for name, changed in {"a": text, "b": text.replace("Words", "Other"), "c": text.replace("+ 1", "+ 2")}.items():
        (tmp_path / f"{name}.py").write_text(changed)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    a, b, c = (code.meaning(name).partition("\n")[2] for name in "abc")
    assert a == b
    assert a != c


def test_a_technique_depends_on_its_own_file_and_those_it_computes_with():
    found = code.with_imports("llmcompress.training.techniques.set")
    assert {"llmcompress.training.techniques.rigl", "llmcompress.training.sparsity", "llmcompress.mask"} <= found
    assert not {"llmcompress.training.techniques.dsa", "llmcompress.source", "llmcompress.cli"} & found
    versions = {name: code.code_version({"steps": [{"train": name}]}) for name in ("set", "rigl", "dense", "dsa")}
    assert len(set(versions.values())) == 4
    assert code.code_version({"cache": "knorm"}) != code.code_version({"cache": "all"})


DEPENDS = {
    "width-half": "structure.compensation",
    "kv-groups-half": "structure.scores.fluctuation",
    "hidden-132": "structure.residual",
    "depth-3of5": "structure.scores.greedy",
    "teal-50": "at_runtime.allocation",
    "geometric-median": "structure.scores.geometric_median",
    "dsa": "structure.groups",
    "dense": "building",
    "snip-after-80": "gradients",
    "wanda-80": "assignment",
    "random-80": "training.techniques.snip",
    "cache-knorm": "eviction.base",
}


@pytest.mark.parametrize("name", DEPENDS)
def test_a_formula_that_changes_is_measured_anew(name, monkeypatch):
    values = evals_module("shelf").recipes()[name]
    before, plain = code.code_version(values), code.meaning
    changed = {f"llmcompress.{DEPENDS[name]}", "llmcompress.training.techniques.grasp", "llmcompress.methods.ria"}
    monkeypatch.setattr(code, "meaning", lambda module: plain(module) + "x" * (module in changed))
    assert code.code_version(values) != before
    changed.remove(f"llmcompress.{DEPENDS[name]}")
    assert code.code_version(values) == before, "another technique's file changes this row"


@pytest.mark.parametrize("module", ["calibrate", "text", "new_model", "perplexity"])
def test_every_trial_depends_on_texts_first_weights_and_perplexity(module, monkeypatch):
    trials_of_all_kinds = [{"steps": [{"train": "set"}]}, {"steps": [{"method": "rtn"}]}, {"cache": "all"}]
    before, plain = list(map(code.code_version, trials_of_all_kinds)), code.meaning
    monkeypatch.setattr(code, "meaning", lambda name: plain(name) + "x" * (name == f"llmcompress.{module}"))
    after = map(code.code_version, trials_of_all_kinds)
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_every_trial_depends_on_the_suite_and_on_the_config(monkeypatch, tmp_path):
    before, suite = code.code_version({"cache": "all"}), code.SUITE.read_text()
    monkeypatch.setattr(code, "SUITE", tmp_path / "tiny.yaml")
    code.SUITE.write_text("# words\n" + suite)
    assert code.code_version({"cache": "all"}) == before
    code.SUITE.write_text(suite.replace("windows: 200", "windows: 100"))
    assert code.code_version({"cache": "all"}) != before
    code.SUITE.write_text(suite)
    monkeypatch.setitem(catalog.TINY_LLAMA, "hidden_size", 128)
    assert code.code_version({"cache": "all"}) != before


# what is compared


def test_every_row_of_a_comparison_is_a_trial_and_every_trial_a_recipe():
    found = comparisons.recipes(400)
    shown = {name for group in comparisons.GROUPS for name in group.rows}
    assert shown <= set(found)
    needed = {name for values in found.values() for name in trials.references(values)}
    assert set(found) == shown | needed
    for values in found.values():
        parse_recipe(trials.filled(values, dict.fromkeys(needed, "tiny-llama")))


def test_all_that_is_compared_learns_from_as_many_tokens():
    found = comparisons.recipes(400)
    total = {name: sum(step.get("steps", 0) for step in values["steps"]) for name, values in found.items()}
    for name, values in found.items():
        before = trials.REFERENCE.fullmatch(values["model"])
        if name not in ("ticket-80", "dense-long", "dense-part") and not name.startswith("long-"):
            assert total[name] + (total[before[1]] if before else 0) == 400, name
    assert total["dense-long"] == total["ticket-80"] == 380 * 3 + 20
    [ticket] = parse_recipe(found["ticket-80"]).parsed_steps()
    assert ticket.options.first == 400
    assert ticket.options.density == pytest.approx(0.2, abs=1e-5)


def test_trainings_of_different_length_do_not_stand_in_one_table(tmp_path, monkeypatch):
    script = evals_module("compare_techniques")
    monkeypatch.setattr(script, "COMPARED", tmp_path / "known.json")
    script.check_steps(400)
    (tmp_path / "known.json").write_text(json.dumps({"dense": {"0": {"tokens": 400 * 4 * 256}}}))
    script.check_steps(400)
    with pytest.raises(SystemExit, match="trainings of 400 steps"):
        script.check_steps(200)


def test_weights_for_a_given_mask_are_other_ones_than_it_was_found_with():
    seeds = {trial.name: trial.values["steps"][0].get("seed") for trial in comparisons.trials(400, [1])}
    assert seeds["ticket-80"] == seeds["static-80"] == 1
    assert seeds["anew-80"] == 1001
    assert seeds["sparsegpt-80"] is None
