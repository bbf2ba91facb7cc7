"""docs/techniques.md: every technique, its paper, equation, recipe, and what it reached on one small model.

    python evals/shelf.py                           # writes the page from the registry and what is known
    python evals/shelf.py --run                     # first measures what is not known: two hours from nothing
    python evals/shelf.py --run rigl-80 set-80 random-80 --seeds 0 1 2
    python evals/shelf.py --run --dry-run           # what would be measured
    python evals/shelf.py --check                   # exit code 1 if the page is not what the registry says

Case: tiny-llama, 2.4 million parameters, from scratch. All recipes learn from the same 1000 windows of Wikipedia
passages, 1,228,800 tokens in all; the seed decides the first weights and the order of the windows, which are the same
for all that begin at random. Two kinds of recipe see the windows differently: those with two trainings begin the order
anew in the second, and the lottery ticket trains once per round, on nearly as many tokens each time. Techniques for a
trained model go on from the result of the recipe `dense`. Perplexity is on passages that training has not seen (suite
`tiny`), for KV caches that of the tokens after a prompt.

Results are kept in docs/techniques.json, a row for each recipe and seed with machine, commit and date, as soon as they
are there; what is known of the same recipe and code is not measured again (`trials.py`, `code_version.py`). Times are
compared with the dense model's under the same conditions, and the exit code is 1 if something could not be measured.

What is unfair: a model this small has few weights to spare, and minutes of training are short for methods that move
masks; rows tell what works at all, not which method is best for a large model. Two trainings at a time share caches and
memory, so times depend a little on who runs beside whom.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from shelf_page import CACHES, CONTINUED, KNOWN, PAGE, RECIPES, WRITTEN, limits, page, shelved
from trials import Bench, Trial, references, say, seeded

DENSE = "dense"  # the recipe that those for a trained model go on from


def main() -> int:
    args = arguments().parse_args()
    wrong: list[str] = []
    if args.run is not None:
        bench = Bench(with_needs(chosen(args.run), args.seeds), KNOWN, args.jobs, WRITTEN)
        if args.dry_run:
            print(*(f"{trial.name}, seed {trial.seed}" for trial in bench.due()), sep="\n")
            return 0
        wrong = bench.run()
        say("\n".join(limits(list(shelved()), bench.rows)))
    text = page()
    if args.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    for problem in wrong:
        say(problem)
    return int(bool(wrong))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="recipes of tiny-llama and caches; all if left out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the training")
    parser.add_argument("--jobs", type=int, default=2, help="recipes at a time, each on its share of the cores")
    parser.add_argument("--dry-run", action="store_true", help="with --run: list what would be measured")
    parser.add_argument("--check", action="store_true", help="compare the page with the registry, write nothing")
    return parser


def chosen(names: list[str]) -> list[str]:
    """Names of trials, all if none is given; what takes long comes first, so that no core waits at the end."""
    known = recipes()
    everything = sorted(known, key=lambda name: (name != DENSE, -steps_of(known[name])))
    if unknown := sorted(set(names) - set(everything)):
        raise SystemExit(f"{unknown[0]}: neither a recipe below recipes/tiny-llama nor a cache; there are {everything}")
    return [name for name in everything if not names or name in names]


def with_needs(names: list[str], seeds: list[int]) -> list[Trial]:
    """The trials, for each seed, and what they go on from."""
    known = recipes()
    needed = [name for each in names for name in references(known[each]) if name not in names]
    return [
        Trial(name, seed, known[name] if "cache" in known[name] else seeded(known[name], seed))
        for seed in seeds
        for name in [*dict.fromkeys(needed), *names]
    ]


def recipes() -> dict[str, dict[str, Any]]:
    """Name -> plain values of every recipe of tiny-llama, and of every cache."""
    paths = sorted((RECIPES / "tiny-llama").glob("*.yaml"))
    plain: dict[str, dict[str, Any]] = {path.stem: read(path) for path in paths}
    found = {name: continued(values, plain[DENSE]) for name, values in plain.items()}
    return found | {name: CONTINUED | values | {"model": f"@{DENSE}"} for name, values in CACHES.items()}


def read(path: Path) -> dict[str, Any]:
    """A recipe's plain values."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def continued(values: dict[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that begins as the dense one does goes on from what that leaves."""
    first, *rest = values["steps"]
    same = all(values.get(key) == dense.get(key) for key in ("model", "dtype", "calibration", "keep"))
    if not rest or not same or first != dense["steps"][0]:
        return values
    return values | {"model": f"@{DENSE}", "steps": rest}


def steps_of(values: Mapping[str, Any]) -> int:
    """Optimizer steps of a recipe."""
    return sum(int(step.get("steps", 0)) for step in values.get("steps", ()))


if __name__ == "__main__":
    sys.exit(main())
