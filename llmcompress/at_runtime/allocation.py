"""How much of each linear's input counts as zero, so that a block reaches its share at the least error.

Greedy, as TEAL's algorithm 1: all linears begin at none; again and again the one whose raise costs least is raised,
until the weights left out are the share asked for. A raise leaves out `step` of the block's weights, so that raises of
unlike linears compare; where a linear is so small that this would be more than LARGEST_RAISE of it, it gets that, and
costs are compared per weight. The last raise is cut to end on the target exactly.

The cost of a raise is found by running the block. It rises as a linear gives up more and more, so a cost known from
before is a lower bound: only the cheapest is tried again, and taken if it is still the cheapest (Minoux 1978,
"Accelerated greedy algorithms"). Where costs rise, that is the same choice as by trying all, with a fraction of the
passes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmcompress.errors import PlanError

LARGEST_RAISE = 0.1  # of a linear's input at once
HIGHEST = 0.95  # of a linear's input
ROUNDING = 1e-9  # of a block's weights: less than that is nothing

Levels = Mapping[str, float]  # linear -> share of its input that counts as zero


@dataclass(frozen=True, slots=True)
class Raise:
    """One linear raised by one step."""

    levels: dict[str, float]  # of all linears then
    error: float  # of the block then


def uniform(sizes: Mapping[str, int], target: float) -> dict[str, float]:
    """The same level for every linear."""
    return dict.fromkeys(sizes, target)


def greedy(sizes: Mapping[str, int], target: float, step: float, error: Callable[[Levels], float]) -> dict[str, float]:
    """Levels whose mean, weighted by size, is `target`.

    sizes: weights of each linear.  error: of the block's output at some levels, >= 0, 0 where all are 0.
    Raises PlanError if even the highest levels leave out less than `target`.
    """
    if target > HIGHEST:
        raise PlanError(f"sparsity: {target:g} is more than the {HIGHEST:g} that a linear can give up")
    total = sum(sizes.values())
    levels, now = dict.fromkeys(sizes, 0.0), 0.0
    known = dict.fromkeys(sizes, 0.0)  # lower bounds of costs
    while (left := target * total - weights_left_out(levels, sizes)) > ROUNDING * total:
        if left < step * total:
            known = dict.fromkeys(sizes, 0.0)  # raises that are cut short cost less, so bounds no longer hold
        rises = {name: raised(sizes, name, levels[name], step, left) for name in sizes}
        chosen = cheapest(levels, now, known, {n: rise for n, rise in rises.items() if rise > ROUNDING}, sizes, error)
        levels, now = chosen.levels, chosen.error
    return levels


def cheapest(
    levels: dict[str, float],
    now: float,
    known: dict[str, float],
    rises: Mapping[str, float],
    sizes: Mapping[str, int],
    error: Callable[[Levels], float],
) -> Raise:
    """The raise of least cost among `rises`; `known` costs are lower bounds, and become those that were found."""
    tried: dict[str, Raise] = {}
    while True:
        name = min(rises, key=known.__getitem__)
        if name in tried:
            return tried[name]
        higher = levels | {name: levels[name] + rises[name]}
        found = error(higher)
        tried[name] = Raise(higher, found)
        known[name] = (found - now) / (sizes[name] * rises[name])


def raised(sizes: Mapping[str, int], name: str, level: float, step: float, left: float) -> float:
    """By how much a linear is raised: a step, and no more than it may, or than is left to reach the target."""
    return min(step * sum(sizes.values()) / sizes[name], LARGEST_RAISE, HIGHEST - level, left / sizes[name])


def weights_left_out(levels: Levels, sizes: Mapping[str, int]) -> float:
    """How many weights a token does not need at these levels."""
    return sum(level * sizes[name] for name, level in levels.items())
