"""Techniques side by side over several seeds, at equal parameters: which differences are larger than chance?

    python evals/compare_techniques.py                      # 400 steps, 3 seeds, two jobs: two hours on two cores
    python evals/compare_techniques.py --steps 200 --seeds 0 1
    python evals/compare_techniques.py --dry-run            # what would be run

Case: tiny-llama from scratch, as in `shelf.py` but for fewer steps; groups and what is in them: `comparisons.py`. The
seed decides the first weights, the order of the windows and random masks, and rows of one seed share all that they can,
so that differences are taken seed by seed. Results are kept in docs/comparisons.json, and docs/techniques.md is written
anew; a trial that is known, of the same recipe and code, is not run again, and one that was killed goes on.

What is unfair: a few hundred steps are short for methods that move masks or search over rounds, and three seeds tell
large differences from none, not small ones from each other. Learning rates are those that suit the dense model. DSA
stands beside uniform soft pruning, and differs from it in more than how much each block keeps: it draws masks at random
until they settle, and then no unit comes back, while soft pruning zeroes the same number again and again and lets all
grow back. So a difference between these rows is one of whole procedures, not of the allocation alone.
"""

import argparse
import sys

from comparisons import trials
from shelf_page import COMPARED, PAGE, WRITTEN, page
from trials import Bench, say

from llmcompress.files import read_json

TOKENS = 4 * 256  # of a step


def main() -> int:
    args = arguments().parse_args()
    check_steps(args.steps)
    bench = Bench(trials(args.steps, args.seeds), COMPARED, args.jobs, WRITTEN)
    if args.dry_run:
        print(*(f"{trial.name}, seed {trial.seed}" for trial in bench.due()), sep="\n")
        return 0
    wrong = bench.run()
    PAGE.write_text(page(), encoding="utf-8")
    for problem in wrong:
        say(problem)
    return int(bool(wrong))


def check_steps(steps: int) -> None:
    """Rows of trainings of different length are not to stand in one table."""
    for row in read_json(COMPARED).get("dense", {}).values():
        found = row["tokens"] // TOKENS
        if found != steps:
            raise SystemExit(f"{COMPARED} holds trainings of {found} steps; give --steps {found}, or remove the file")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of every training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time, each on its share of the cores")
    parser.add_argument("--dry-run", action="store_true", help="list what would be run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
