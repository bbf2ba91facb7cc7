"""docs/techniques.md is what the registry says, and every technique is on it, with a result or a reason."""

import re
from contextlib import suppress

import pytest
from evals_modules import evals_module

from llmcompress.at_runtime import RUNTIMES
from llmcompress.errors import RecipeError
from llmcompress.eviction import EVICTIONS
from llmcompress.files import read_json
from llmcompress.methods import METHODS
from llmcompress.recipe import load_recipe, parse_step, recipe_paths
from llmcompress.shelf import Shelf
from llmcompress.structure import STRUCTURES
from llmcompress.structure.scores import BLOCK_SCORES, CHANNEL_SCORES, UNIT_SCORES
from llmcompress.training import TRAININGS

REGISTRIES = {"train": TRAININGS, "method": METHODS, "structure": STRUCTURES, "runtime": RUNTIMES, "cache": EVICTIONS}
TINY = {name: load_recipe(path) for name, path in recipe_paths().items() if name.startswith("tiny-llama/")}
NO_PAPER = {("train", "dense"), ("train", "random"), ("method", "rtn"), ("method", "random"), ("method", "magnitude")}
shelf, page = evals_module("shelf"), evals_module("shelf_page")

ROW = {
    "perplexity": 40.0, "nll": 3.7, "parameters": 2_400_000, "zeros": 0.8, "bytes": 2**21, "tokens": 1000,
    "seconds": 300.0, "trainings": 1, "from": {"cpu": "c", "cores": 2, "jobs": 2, "threads": 1},
}  # fmt: skip


def test_the_page_is_what_the_registry_says():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python evals/shelf.py"


def test_every_technique_is_on_the_page():
    entries = {(entry.kind, entry.name): entry for entry in page.shelved()}
    assert entries.keys() == {(kind, name) for kind, registry in REGISTRIES.items() for name in registry}
    for key, entry in entries.items():
        assert isinstance(entry.shelf, Shelf)
        assert all((entry.shelf.removes, entry.shelf.helps, entry.shelf.holds))
        said = [line.partition(":")[0] for line in page.section(entry).splitlines() if line.startswith("- ")]
        assert said[len(entry.scores) :][:4] == ["- When", "- What goes", "- What that helps", "- Tests assert"]
        if key not in NO_PAPER:
            texts = "\n".join([entry.text, *entry.scores.values()])
            assert re.search(r" 20\d\d, |arXiv:", texts), f"{key} names no paper"


NO_EQUATION = {("train", "dense")}


def equations(text: str, indent: int) -> int:
    """Blocks that are set off by so many spaces."""
    return len(re.findall(rf"(?<=\n\n) {{{indent}}}\S", text))


@pytest.mark.parametrize("key", REGISTRIES)
def test_every_technique_and_every_score_has_its_equation(key):
    for entry in (entry for entry in page.shelved() if entry.kind == key):
        shown = page.section(entry)
        if entry.scores:
            assert equations(shown, 6) >= len(entry.scores)
            assert all(page.explained(text) for text in entry.scores.values()), entry.name
        else:
            assert bool(equations(shown, 4)) == ((entry.kind, entry.name) not in NO_EQUATION), entry.name


@pytest.mark.parametrize("name", STRUCTURES)
def test_scores_are_those_that_a_structure_takes(name):
    taken = set()
    for score in UNIT_SCORES | BLOCK_SCORES | CHANNEL_SCORES:
        with suppress(RecipeError):
            parse_step({"structure": name, "score": score, "ratio": 0.5}, "")
            taken.add(score)
    assert set(page.scores_of(name)) == taken


def test_blocks_of_a_docstring_come_after_the_words_that_lead_to_them():
    block, last = "    a = b\n    c", "    d = e"
    text = f"What it is.\nMore.\n\n{block}\n\nWith d\nas said:\n\n{last}\n\nThe end.\n"
    assert page.explained(text) == [block, "With d as said:", last]
    assert page.explained(f"What.\n\nWho.\n\n{last}\n") == ["Who.", last]  # it may be the last
    assert page.explained("What.\n\nWho.\n") == []


def test_every_technique_is_measured_on_tiny_llama_or_says_why_not():
    for entry in page.shelved():
        if entry.kind == "cache":
            assert entry.name in {values["cache"] for values in page.CACHES.values()}
        elif (entry.kind, entry.name) not in page.WITHOUT:
            assert entry.recipes, f"{entry.kind}: {entry.name} has no recipe"
            assert all(path.parent.name == "tiny-llama" for path in entry.recipes)


def test_what_the_page_says_of_passages_and_tokens_is_so():
    tokens = {}
    for name, recipe in TINY.items():
        assert recipe.calibration == TINY["tiny-llama/dense"].calibration
        steps = [step for step in recipe.steps if "train" in step]
        tokens[name] = sum(step["steps"] * step["batch"] * recipe.calibration.length for step in steps)
    assert recipe.calibration.samples == 1000
    assert {name for name, count in tokens.items() if count != 1_228_800} == {"tiny-llama/lottery-ticket-80"}
    data = {row.get("data") for rows in read_json(page.KNOWN).values() for row in rows.values()}
    assert len(data - {None}) <= 1


def test_recipes_for_a_trained_model_go_on_from_the_dense_one():
    known = shelf.recipes()
    assert known["dense"]["model"] == known["rigl-80"]["model"] == known["growing-l2"]["model"] == "tiny-llama"
    assert known["wanda-80"]["model"] == known["depth-3of5"]["model"] == known["teal-50"]["model"] == "@dense"
    assert known["wanda-80"]["steps"] == [{"method": "wanda", "sparsity": 0.8, "pattern": "row"}]
    assert known["width-half-recover"]["model"] == "tiny-llama"  # trains for less before it prunes
    names = [trial.name for trial in shelf.with_needs(["wanda-80"], [3])]
    assert names == ["dense", "wanda-80"]
    order = shelf.chosen([])
    assert order[:2] == ["dense", "lottery-ticket-80"]
    with pytest.raises(SystemExit, match="rigl: neither a recipe"):
        shelf.chosen(["rigl"])


def test_cells_tell_size_spread_and_time():
    assert page.cells({}, {}) == " | | | | "
    assert page.cells({"0": ROW}, {}) == "2,400,000 | 80.0% | 2.00 | 40.00 | "
    several = {str(seed): ROW | {"perplexity": value} for seed, value in enumerate((39.0, 40.0, 41.0))}
    assert "| 40.00 ± 1.00 (3 seeds) |" in page.cells(several, {})


def test_times_are_those_of_one_training_beside_the_dense_one():
    dense, slow = {"0": ROW | {"seconds": 200.0}}, {"0": ROW | {"seconds": 310.0}}
    assert page.times({"0": ROW}, dense) == "1.50x"
    assert page.times(slow, dense) == "1.55x (over the limit)"
    assert page.times({"0": slow["0"] | {"trainings": 5}}, dense) == "0.31x"
    alone = ROW | {"from": ROW["from"] | {"jobs": 1}}
    assert page.times({"0": alone}, dense) == page.times({"1": ROW}, dense) == ""


def test_limits_name_who_misses_them():
    entries = list(page.shelved())
    known = {"dense": {"0": ROW}, "rigl-80": {"0": ROW}, "set-80": {"0": ROW | {"seconds": 900.0}}}
    assert page.limits(entries, {}) == []
    assert "missed by `set-80` (3.00x)." in page.limits(entries, known)[0]
    assert "met by all 1." in page.limits(entries, {"dense": {"0": ROW}, "rigl-80": {"0": ROW}})[0]


def test_rows_of_a_table_have_about_as_much_left():
    names = {path.stem: page.amount(path) for entry in page.shelved() for path in entry.recipes}
    eighty, pairs, half = page.AMOUNTS
    assert names["rigl-80"] == names["random-80-snip"] == names["lottery-ticket-80"] == eighty
    assert names["proximal-24"] == names["wanda-2to4"] == pairs
    assert names["l0"] == names["width-half-recover"] == half
    assert names["kv-groups-half"] == names["w4a16-rtn"] == page.amount(None) == page.OTHERS
    for name, recipe in TINY.items():
        for step in recipe.steps:
            if step.get("density", 1) == 0.2 or step.get("sparsity") == 0.8:
                assert names[name.split("/")[1]] == eighty, name
    text = page.tables(list(page.shelved()), {})
    assert text.count("| `dense` |") == text.count("\n## ") + 1 == 4


def test_what_techniques_recorded_is_told():
    entries, gates = list(page.shelved()), {"mlp_channel": 0.4871}
    curve = {"name": "l0", "tokens": 5, "learned_closed": gates, "mask_sha256": "ab" * 32, "distances": [3, 1, 2, 0.5]}
    runtime = {"sparsity": 0.5, "file": "thresholds"}
    told = page.recorded(
        entries, {"l0": {"0": ROW | {"training": [curve]}}, "teal-50": {"0": ROW | {"runtime": runtime}}}
    )
    assert "- `l0`: learned_closed.mlp_channel 0.4871, masks abababababab, distances 0.5 to 3 (4 numbers)." in told
    assert "- `teal-50`: sparsity 0.5, file thresholds." in told
    assert page.recorded(entries, {}) == page.recorded(entries, {"dense": {"0": ROW}}) == ""


def test_versions_stand_where_numbers_are_from():
    machine = ROW["from"] | {
        "date": "2026-01-01",
        "memory_bytes": 2**30,
        "commit": "abc",
        "versions": {"torch": "2.13"},
    }
    assert "1 GiB, torch 2.13, 2 at a time" in page.sources({"dense": {"0": ROW | {"from": machine}}})[0]


def test_differences_are_taken_seed_by_seed():
    first = {str(seed): ROW | {"nll": value} for seed, value in enumerate((3.0, 4.0, 5.0))}
    second = {str(seed): ROW | {"nll": value} for seed, value in enumerate((3.1, 4.1, 5.1))}
    assert page.difference(second, first) == "+0.100 ± 0.000"
    assert page.difference({"0": second["0"]}, first) == "+0.100"
    assert page.difference({"7": ROW}, first) == ""
    group = page.GROUPS[0]
    names = list(group.rows)
    lines = page.group_table(group, {names[0]: first, names[1]: second}).splitlines()
    assert lines[4].endswith("| 1,000 | 4.000 ± 1.000 (3 seeds) |  |")
    assert lines[5].endswith("| +0.100 ± 0.000 |")
    assert all(line.count("|") == 7 for line in lines[2 : 4 + len(names)])
