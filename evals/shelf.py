"""docs/techniques.md: every technique that prunes, its paper, equation, recipe, and what it reached on one small model.

    python evals/shelf.py                           # writes the page from the registry and what is known
    python evals/shelf.py --run                     # first runs every recipe below recipes/tiny-llama (an hour or two)
    python evals/shelf.py --run rigl-80 set-80 random-80 --seeds 0 1 2
    python evals/shelf.py --check                   # exit code 1 if the page is not what the registry says

Case: tiny-llama, 2.4 million parameters, trained on the same Wikipedia passages with the same number of tokens by every
recipe but the lottery ticket, which trains once per round; perplexity on passages that training has not seen (suite
`tiny`). Results are kept in docs/techniques.json, a row for each recipe and seed, with machine and date.

What is unfair: a model this small has few weights to spare, and minutes of training are short for methods that move
masks; rows tell what works at all, not which method is best for a large model.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from provenance import in_words, provenance

from llmcompress.at_runtime import RUNTIMES
from llmcompress.methods import METHODS
from llmcompress.shelf import Shelf
from llmcompress.training import TRAININGS

ROOT = Path(__file__).resolve().parents[1]
PAGE, KNOWN, RECIPES = ROOT / "docs/techniques.md", ROOT / "docs/techniques.json", ROOT / "recipes"
KINDS = {"train": TRAININGS, "method": METHODS, "runtime": RUNTIMES}
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
WHEN = ("before training", "during training", "after training", "at run time")


def main() -> int:
    args = arguments().parse_args()
    for recipe in recipes(args.run) if args.run is not None else ():
        for seed in args.seeds:
            keep(recipe, seed, measure(recipe, seed))
    text = page()
    if args.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="RECIPE", help="recipes of tiny-llama to run; all if none is named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the training")
    parser.add_argument("--check", action="store_true", help="compare the page with the registry, write nothing")
    return parser


# ---- runs ----------------------------------------------------------------------------------------------------------


def recipes(names: list[str]) -> list[Path]:
    """Recipes of tiny-llama by their names, or all."""
    found = {path.stem: path for path in sorted((RECIPES / "tiny-llama").glob("*.yaml"))}
    if unknown := sorted(set(names) - set(found)):
        raise SystemExit(f"{unknown[0]}: no recipe below recipes/tiny-llama; there are {', '.join(found)}")
    return [found[name] for name in names or found]


def measure(recipe: Path, seed: int) -> dict[str, Any]:
    """What one run reached."""
    steps = yaml.safe_load(recipe.read_text(encoding="utf-8"))["steps"]
    seeds = [f"--set=steps.{number}.seed={seed}" for number, step in enumerate(steps) if "train" in step]
    with tempfile.TemporaryDirectory() as scratch:
        line = [sys.executable, "-m", "llmcompress", "run", str(recipe), "--output", f"{scratch}/out", "--json", *seeds]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{recipe.stem}: exit code {done.returncode}")
    results = json.loads(done.stdout)
    curves, stages = results["training"], results["stages"]
    zeros = (results["sparsity"] or {}).get("of_decoder_linears", 0.0)
    row = {
        "perplexity": results["scores"]["perplexity"][0]["compressed"]["value"],
        "parameters": stages[-1]["parameters"] if stages else results["base_model"]["parameters"],
        "zeros": zeros,
        "tokens": sum(curve["tokens"] for curve in curves),
        "seconds": sum(curve["seconds"] for curve in curves),
    }
    print(f"{recipe.stem}, seed {seed}: {row}", file=sys.stderr, flush=True)
    return row


def keep(recipe: Path, seed: int, row: dict[str, Any]) -> None:
    """Add a row to what is known."""
    known = load()
    known.setdefault(recipe.stem, {})[str(seed)] = row | {"machine": in_words(provenance())}
    KNOWN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load() -> dict[str, Any]:
    """Recipe -> seed -> row."""
    return json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}


# ---- the page ------------------------------------------------------------------------------------------------------


def page() -> str:
    """The whole page."""
    known, entries = load(), sorted(shelved(), key=lambda entry: WHEN.index(entry[2].when))
    parts = [HEAD, table(entries, known), *(section(*entry) for entry in entries)]
    return "\n".join(parts)


def shelved() -> Iterator[tuple[str, str, Shelf, str]]:
    """Kind of step, name, place on the shelf and module docstring of every technique that has one."""
    for kind, registry in KINDS.items():
        for name, options in registry.items():
            if shelf := getattr(options, "shelf", None):
                yield kind, name, shelf, sys.modules[options.__module__].__doc__ or ""


def table(entries: list[tuple[str, str, Shelf, str]], known: dict[str, Any]) -> str:
    """A row per technique, with what its recipe on tiny-llama has reached."""
    lines = [
        "| technique | when | what goes | recipe | parameters | zeros | perplexity |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for kind, name, shelf, _ in entries:
        for recipe in recipes_of(kind, name) or [None]:
            row = known.get(recipe.stem) if recipe else None
            shown = f"`{recipe.relative_to(RECIPES).with_suffix('')}`" if recipe else ""
            lines.append(
                f"| [`{kind}: {name}`](#{kind}-{name}) | {shelf.when} | {shelf.removes} | {shown} | {cells(row)} |"
            )
    machines = sorted({row["machine"] for rows in known.values() for row in rows.values()})
    return "\n".join([*lines, "", *(f"Measured: {machine}." for machine in machines)])


def cells(rows: dict[str, Any] | None) -> str:
    """Parameters, zeros and perplexity; with several seeds the mean and the standard deviation."""
    if not rows:
        return " | | "
    first, found = next(iter(rows.values())), [row["perplexity"] for row in rows.values()]
    spread = f" ± {statistics.stdev(found):.2f} ({len(found)} seeds)" if len(found) > 1 else ""
    return f"{first['parameters']:,} | {first['zeros']:.0%} | {statistics.mean(found):.2f}{spread}"


def recipes_of(kind: str, name: str) -> list[Path]:
    """Recipes whose last step of this kind uses a technique, those of tiny-llama alone if there are any."""
    step = re.compile(rf"^\s*- {kind}: (\w+)", re.MULTILINE)
    found = [p for p in sorted(RECIPES.glob("*/*.yaml")) if step.findall(p.read_text(encoding="utf-8"))[-1:] == [name]]
    return [path for path in found if path.parent.name == "tiny-llama"] or found


def section(kind: str, name: str, shelf: Shelf, text: str) -> str:
    """All that is known of one technique."""
    papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in dict.fromkeys(PAPER.findall(text)))
    title, equation = text.strip().split("\n\n")[0].replace("\n", " "), re.search(r"\n\n(    .*?)\n\n", text, re.DOTALL)
    lines = [f"## {kind}: {name}", "", title, ""]
    lines += [equation[1], ""] if equation else []
    lines += [f"- When: {shelf.when}.", f"- What goes: {shelf.removes}.", f"- What that helps: {shelf.helps}."]
    lines += [f"- Tests assert: {shelf.holds}."]
    lines += [f"- Papers: {papers}."] if papers else []
    where = ", ".join(f"`{path.relative_to(RECIPES).with_suffix('')}`" for path in recipes_of(kind, name))
    lines += [f"- Recipes: {where}."] if where else []
    return "\n".join([*lines, ""])


HEAD = """# Techniques

Everything that prunes, by when it happens, as in the survey of Cheng, Zhang and Shi 2023, arXiv:2308.06767. This page
is made from the code by `python evals/shelf.py`; `make shelf` runs the recipes of tiny-llama first, which takes an hour
or two. Whole blocks, sub-layers, heads and channels also go after training by `structure` steps, see the README; KV
caches that forget are in `llmcompress.eviction`.
"""


if __name__ == "__main__":
    sys.exit(main())
