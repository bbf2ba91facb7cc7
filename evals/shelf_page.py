"""docs/techniques.md as text: the registry's techniques, and what is known of them from two JSON files."""

import re
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from comparisons import GROUPS, Group
from provenance import in_words

from llmcompress.at_runtime import RUNTIMES
from llmcompress.eviction import EVICTIONS
from llmcompress.files import read_json
from llmcompress.methods import METHODS
from llmcompress.shelf import PLACES, Shelf
from llmcompress.structure import STRUCTURE_WORDS, STRUCTURES, Sublayer, Width, compensation, rescaling
from llmcompress.structure.scores import BLOCK_SCORES, CHANNEL_SCORES, UNIT_SCORES
from llmcompress.training import TRAININGS, losses

ROOT = Path(__file__).resolve().parents[1]
PAGE, KNOWN, COMPARED = (ROOT / "docs" / name for name in ("techniques.md", "techniques.json", "comparisons.json"))
WRITTEN = tuple(str(path.relative_to(ROOT)) for path in (PAGE, KNOWN, COMPARED))
RECIPES = ROOT / "recipes"
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "train": TRAININGS,
    "method": METHODS,
    "structure": STRUCTURES,
    "runtime": RUNTIMES,
    "cache": EVICTIONS,
}
CACHES = {  # name of the row -> what `continuation.py` measures
    "cache-all": {"cache": "all"},
    "cache-streaming": {"cache": "streaming", "budget": 64},
    "cache-knorm": {"cache": "knorm", "budget": 64},
    "cache-snapkv": {"cache": "snapkv", "budget": 64, "options": {"window": 16}},
}
CONTINUED = {"data": "boolq-heldout", "prompt": 128, "length": 256, "windows": 200}
WITHOUT = {  # (kind, name) of what has no row of its own -> why
    ("train", "masked"): "needs another model's zeros; see the lottery ticket's mask with other weights below",
}
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
WHEN = ("before training", "during training", "after training", "at run time")
HALVED = r"^(dsa|early-bird|geometric-median|growing-l2|l0|width-half.*)$"
AMOUNTS = {  # title of a table -> names of its recipes
    "80% of the decoder linears' weights gone": re.compile(r"-80(-\w+)?$"),
    "Two of four weights gone": re.compile(r"-(2to4|24)$"),
    "Half of the MLP channels gone, or as many parameters": re.compile(HALVED),
}
OTHERS = "Other amounts, not to be compared row by row"
COLUMNS = (
    "| technique | when | what goes | recipe | parameters | zeros | MiB | perplexity | time |",
    "|---|---|---|---|---:|---:|---:|---:|---:|",
)
PLAIN = ("name", "loss", "tokens", "seconds")  # of what is recorded of a training: said elsewhere
LIMIT = 1.5  # times what the dense model takes to train

Rows = Mapping[str, Any]  # seed -> row


@dataclass(frozen=True, slots=True)
class Entry:
    """A technique."""

    kind: str  # the key of a step that names it
    name: str
    shelf: Shelf
    text: str  # what says which paper and equation
    scores: Mapping[str, str] = field(default_factory=dict)  # name -> the same of a score that it can be chosen by

    @property
    def link(self) -> str:
        """To its section."""
        return f"[`{self.kind}: {self.name}`](#{self.kind}-{self.name})"

    @property
    def recipes(self) -> list[Path]:
        """Recipes that end with it, those of tiny-llama alone if there are any."""
        found = [path for path in sorted(RECIPES.glob("*/*.yaml")) if aim(path) == (self.kind, self.name)]
        return [path for path in found if path.parent.name == "tiny-llama"] or found


def page() -> str:
    """The whole page."""
    known = read_json(KNOWN)
    entries = sorted(shelved(), key=lambda entry: WHEN.index(entry.shelf.when))
    parts = [HEAD, tables(entries, known), recorded(entries, known), caches(entries, known)]
    parts.append(compared(read_json(COMPARED)))
    return "\n".join([*filter(None, parts), *(section(entry) for entry in entries)])


def shelved() -> Iterator[Entry]:
    """Everything that the registries hold."""
    for kind, registry in REGISTRIES.items():
        for name, options in registry.items():
            shelf = getattr(options, "shelf", None) or PLACES[kind, name]
            scores = scores_of(name) if kind == "structure" else {}
            text = of_structure(name) if kind == "structure" else said_of(options)
            if (kind, name) == ("train", "recover"):
                text = f"{RECOVER}\n\n{losses.__doc__}"
            yield Entry(kind, name, shelf, text, scores)


def said_of(options: Any) -> str:
    """The docstring of the module that a class is in."""
    return sys.modules[options.__module__].__doc__ or ""


def of_structure(name: str) -> str:
    """What is said of units that go: what they are, and what makes up for them."""
    besides = rescaling if name == "hidden" else compensation if issubclass(STRUCTURES[name], Width) else None
    words = f"{STRUCTURE_WORDS[name]}; which of them go is decided by a score."
    return "\n\n".join([words, *(explained(besides.__doc__ or "") if besides else [])])


def scores_of(name: str) -> dict[str, str]:
    """Docstrings of the scores that a structure can be chosen by."""
    scores: Mapping[str, Any]
    scores = BLOCK_SCORES if name == "block" else CHANNEL_SCORES if name == "hidden" else UNIT_SCORES
    alone = STRUCTURES[name] is Sublayer  # in its block, so that none can be judged by the others there
    return {score: said_of(options) for score, options in scores.items() if not (alone and options.within_block)}


def first_line(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(text.strip().split("\n\n")[0].split())


@lru_cache
def aim(path: Path) -> tuple[str, str]:
    """Kind and name of a recipe's last step, those aside that only cut out what it has zeroed."""
    steps = yaml.safe_load(path.read_text(encoding="utf-8"))["steps"]
    last = [step for step in steps if not step.get("zeros")][-1]
    kind = next(kind for kind in REGISTRIES if kind in last)
    return kind, last[kind]


# what was reached on one model


def tables(entries: Sequence[Entry], known: Rows) -> str:
    """One for each kind of amount, so that rows of a table can be compared, each led by the dense model."""
    pairs: list[tuple[Entry, Path | None]]
    pairs = [(entry, path) for entry in entries if entry.kind != "cache" for path in entry.recipes or [None]]
    shelves: dict[str, list[str]] = {title: [] for title in [*AMOUNTS, OTHERS]}
    dense = [line(entry, path, known) for entry, path in pairs if path and path.stem == "dense"]
    for entry, path in pairs:
        if path is None or path.stem != "dense":
            shelves[amount(path)].append(line(entry, path, known))
    parts = [part for title, lines in shelves.items() for part in (f"## {title}", "", *COLUMNS, *dense, *lines, "")]
    closing = [*limits(entries, known), *sources(known)]
    return "\n".join([*parts, *(["## Times, and where numbers are from", "", *closing, ""] if closing else [])])


def amount(recipe: Path | None) -> str:
    """The table that a recipe is in."""
    name = recipe.stem if recipe else ""
    return next((title for title, names in AMOUNTS.items() if names.search(name)), OTHERS)


def line(entry: Entry, recipe: Path | None, known: Rows) -> str:
    """The row of a recipe, or of a technique that has none."""
    tiny = recipe is not None and recipe.parent.name == "tiny-llama"
    rows = known.get(recipe.stem, {}) if recipe and tiny else {}
    shown = f"`{recipe.stem if tiny else named(recipe)}`" if recipe else ""
    reached = cells(rows, known.get("dense", {}))
    if not rows and (entry.kind, entry.name) in WITHOUT:
        reached = f" | | | {WITHOUT[entry.kind, entry.name]} | "
    return f"| {entry.link} | {entry.shelf.when} | {entry.shelf.removes} | {shown} | {reached} |"


def named(recipe: Path) -> str:
    """As `list recipes` calls it."""
    return recipe.relative_to(RECIPES).with_suffix("").as_posix()


def cells(rows: Rows, dense: Rows) -> str:
    """Parameters, zeros, size, perplexity (of several seeds the mean and the standard deviation) and time."""
    if not rows:
        return " | | | | "
    first = next(iter(rows.values()))
    size = f"{first['bytes'] / 2**20:.2f}"
    reached = spread(rows, "perplexity", 2)
    return f"{first['parameters']:,} | {first['zeros']:.1%} | {size} | {reached} | {times(rows, dense)}"


def spread(rows: Rows, key: str, digits: int) -> str:
    """The mean over seeds, with the standard deviation if there are several."""
    found = [row[key] for row in rows.values()]
    more = f" ± {statistics.stdev(found):.{digits}f} ({len(found)} seeds)" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{more}"


def times(rows: Rows, dense: Rows) -> str:
    """Time beside that of the dense model, of one training where there are several; "" without such a time."""
    ratio = time_ratio(rows, dense)
    return "" if ratio is None else f"{ratio:.2f}x" + (" (over the limit)" if ratio > LIMIT else "")


def time_ratio(rows: Rows, dense: Rows) -> float | None:
    """Mean over seeds that were measured under the same conditions as the dense model of that seed."""
    pairs = [(row, dense[seed]) for seed, row in rows.items() if seed in dense]
    found = [
        row["seconds"] / row["trainings"] / of["seconds"] for row, of in pairs if conditions(row) == conditions(of)
    ]
    return statistics.mean(found) if found else None


def conditions(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What times depend on besides the work."""
    return tuple(row["from"].get(key) for key in ("cpu", "cores", "jobs", "threads"))


def limits(entries: Sequence[Entry], known: Rows) -> list[str]:
    """Who keeps to the limit of time."""
    dense = known.get("dense", {})
    names = dict.fromkeys(path.stem for entry in entries for path in entry.recipes if path.parent.name == "tiny-llama")
    ratios = {name: time_ratio(known.get(name, {}), dense) for name in names if name != "dense"}
    timed = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if not timed:
        return []
    over = [f"`{name}` ({ratio:.2f}x)" for name, ratio in timed.items() if ratio > LIMIT]
    verdict = f"missed by {', '.join(over)}" if over else f"met by all {len(timed)}"
    return [f"Limit of {LIMIT} times the dense model's time under the same conditions: {verdict}.", ""]


def sources(known: Rows) -> list[str]:
    """Where numbers are from, a line for each machine and commit."""
    found = {
        f"Measured: {in_words(row['from'])}{made_with(row)}, {row['from']['jobs']} at a time with "
        f"{row['from']['threads']} thread{'s' * (row['from']['threads'] != 1)} each."
        for rows in known.values()
        for row in rows.values()
    }
    return sorted(found)


def made_with(row: Mapping[str, Any]) -> str:
    """Versions of the packages, where the row has them."""
    return "".join(f", {name} {version}" for name, version in row["from"].get("versions", {}).items())


def recorded(entries: Sequence[Entry], known: Rows) -> str:
    """What techniques have recorded of themselves: tickets, shares, gates; "" before anything is measured."""
    names = dict.fromkeys(path.stem for entry in entries for path in entry.recipes if path.parent.name == "tiny-llama")
    told = {name: said(next(iter(known[name].values()))) for name in names if known.get(name)}
    lines = [f"- `{name}`: {words}." for name, words in told.items() if words]
    return "\n".join([RECORDED, "", *lines, ""]) if lines else ""


def said(row: Mapping[str, Any]) -> str:
    """One row's records in words."""
    found = [{key: curve[key] for key in curve if key not in PLAIN} for curve in row.get("training", [])]
    return ", ".join(part for record in [*found, row.get("runtime") or {}] for part in flat(record))


def flat(record: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Names and values of a record and what is in it; of many numbers the smallest and the largest."""
    for key, value in record.items():
        inside = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(inside, list) and len(inside) > 3 and all(isinstance(each, int | float) for each in inside):
            yield f"{before}{key} {min(inside):.4g} to {max(inside):.4g} ({len(inside)} numbers)"
        elif isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        elif isinstance(value, float):
            yield f"{before}{key} {value:.4g}"
        elif key == "mask_sha256":
            yield f"masks {value[:12]}"
        else:
            yield f"{before}{key} {value}"


def caches(entries: Sequence[Entry], known: Rows) -> str:
    """What forgetting costs."""
    by_name = {entry.name: entry for entry in entries if entry.kind == "cache"}
    lines = [FORGETTING, "", "| cache | what goes | entries held | KiB | perplexity |", "|---|---|---:|---:|---:|"]
    for name, values in CACHES.items():
        rows, entry = known.get(name, {}), by_name.get(str(values["cache"]))
        first = next(iter(rows.values()), None)
        held = f"{first['kept']} | {first['cache_bytes'] / 2**10:.0f}" if first else " | "
        reached = spread(rows, "perplexity", 2) if rows else ""
        which = f"{entry.link} | {entry.shelf.removes}" if entry else "every token | nothing"
        lines.append(f"| {which} | {held} | {reached} |")
    return "\n".join([*lines, ""])


# several seeds


def compared(known: Rows) -> str:
    """A table for each group."""
    if not known:
        return "\n".join([SEEDS, "", "Not measured yet.", ""])
    trained = next(iter(known["dense"].values()))["tokens"] if known.get("dense") else None
    every = [f"Every training but those of the ticket: {trained:,} tokens.", ""] if trained else []
    return "\n".join([SEEDS, "", *every, *(group_table(group, known) for group in GROUPS), *sources(known), ""])


def group_table(group: Group, known: Rows) -> str:
    """Losses, and how far they are above the first row's, seed by seed."""
    lines = [f"### {group.title[0].upper()}{group.title[1:]}", ""]
    lines += ["| | parameters | zeros | tokens | loss | above the first |", "|---|---:|---:|---:|---:|---:|"]
    first = known.get(next(iter(group.rows)), {})
    for name, words in group.rows.items():
        rows = known.get(name, {})
        one = next(iter(rows.values()), None)
        reached = (
            "| | | | "
            if one is None
            else (
                f"{one['parameters']:,} | {one['zeros']:.1%} | {one['tokens']:,} | {spread(rows, 'nll', 3)} | "
                f"{'' if rows is first else difference(rows, first)}"
            )
        )
        lines.append(f"| {words} | {reached} |")
    return "\n".join([*lines, ""])


def difference(rows: Rows, first: Rows) -> str:
    """Mean and standard deviation of the differences in loss of the same seeds."""
    found = [row["nll"] - first[seed]["nll"] for seed, row in rows.items() if seed in first]
    if not found:
        return ""
    return f"{statistics.mean(found):+.3f}" + (f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else "")


# a section for each


def section(entry: Entry) -> str:
    """All that is known of one technique."""
    numbers = dict.fromkeys(PAPER.findall("\n".join([entry.text, *entry.scores.values()])))
    papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)
    lines = [f"## {entry.kind}: {entry.name}", "", first_line(entry.text), ""]
    lines += [line for part in explained(entry.text) for line in (part, "")]
    for score, text in entry.scores.items():
        lines += [f"- `score: {score}`: {first_line(text)}", ""]
        lines += [line for part in explained(text) for line in (textwrap.indent(part, "  "), "")]  # in the list's item
    shelf = entry.shelf
    lines += [f"- When: {shelf.when}.", f"- What goes: {shelf.removes}.", f"- What that helps: {shelf.helps}."]
    lines += [f"- Tests assert: {shelf.holds}."]
    lines += [f"- Papers: {papers}."] if papers else []
    where = ", ".join(f"`{named(path)}`" for path in entry.recipes)
    lines += [f"- Recipes: {where}."] if where else []
    return "\n".join([*lines, ""])


def explained(text: str) -> list[str]:
    """The blocks of equations in a docstring, each after the paragraph that leads to it, but for the very first one."""
    parts = [part.rstrip() for part in text.split("\n\n")]
    found = list[str]()
    for before, part in pairwise(parts):
        if is_block(part):
            found += [part] if before is parts[0] or is_block(before) else [" ".join(before.split()), part]
    return found


def is_block(part: str) -> bool:
    """Whether a part of a docstring is set off, as equations are."""
    return part.startswith("    ")


HEAD = """# Techniques

Everything that makes a model sparser, smaller or coarser, by when it happens, as in the survey of Cheng, Zhang and Shi
2023, arXiv:2308.06767. This page is made from the code by `python evals/shelf.py`; `make shelf` first measures what is
not known yet, two recipes at a time, about two hours from nothing on two cores.

All recipes are for one model, tiny-llama from scratch, and all learn from the same 1000 windows of 256 tokens for
1,228,800 tokens in all; those of techniques for a trained model prune what the dense recipe has learned from as many.
Exceptions: a lottery ticket trains once per round, each time nearly as long, and recipes with two trainings begin their
order of the windows anew in the second. Perplexity is on passages that training has not seen (suite `tiny`), time that
of all training, choosing and cutting beside the dense model's; of a ticket, time per training.

Rows are of one seed, 0, but where a cell says of how many: small differences between them may be chance. Those of one
table have about as many parameters, or zeros, left; over three seeds fewer techniques are compared further below.
"""
RECORDED = """## What techniques recorded

Of the first seed: how far what they learned is from what was asked for, when tickets were drawn, fingerprints of masks.
Of lists the smallest and the largest number."""
FORGETTING = f"""## A cache that forgets

The dense model goes on with held-out texts of {CONTINUED["length"]} tokens after a prompt of {CONTINUED["prompt"]}, a
token at a time; perplexity is that of the {CONTINUED["length"] - CONTINUED["prompt"]} tokens after the prompt, and
entries and KiB are the most that one text holds (`evals/continuation.py`)."""
SEEDS = """## Over several seeds

Held-out loss in nats per token, mean and standard deviation over seeds, and how far a row is above the first one of its
table, seed by seed. Trainings are shorter than above (`python evals/compare_techniques.py`; what is compared with what
is in `evals/comparisons.py`)."""
RECOVER = """Recovery: a model from which something was taken learns on, from the text or from what the dense model
predicts. Knowledge distillation, Hinton et al. 2015, arXiv:1503.02531; for pruned language models Muralidharan et al.
2024, arXiv:2407.14679."""
