"""How many units stay, and which: budgets, rounding, and the choice by score.

A budget is a share, a number of parameters or a number of bytes, of the whole model, of its decoder blocks or of what
the group itself holds. By default every block keeps the same number of units, so that stock engines load the result;
or the units of all blocks are ranked together (`Ranking`), and some blocks keep more than others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.errors import CalibrationError, PlanError


@dataclass(frozen=True, slots=True)
class Share:
    """What one unit is of a budget's denominator, so that a refusal can name budgets that exist."""

    of: str  # model, decoder or group
    unit: float


def uniform_width(units: int, remove: float, multiple: int, where: str, share: Share) -> int:
    """Units that stay of `units`, when `remove` of them (not rounded) should go; a multiple of `multiple`.

    The nearest multiple, the larger of two equally near. Raises PlanError if keeping all of them is nearer, or none.
    share: of one unit in every block that loses some.
    """
    wanted = units - remove
    possible = list(range(multiple, units, multiple))
    if not possible:
        raise PlanError(f"{where}.multiple: {multiple} leaves no smaller width of the {units} units there are")
    best = min([units, *reversed(possible)], key=lambda width: abs(width - wanted))
    if best == units or wanted <= 0:
        shown = possible[-4:] if best == units else possible[:4]
        ratios = ", ".join(f"{(units - width) * share.unit:.3g} (keeps {width})" for width in reversed(shown))
        raise PlanError(
            f"{where}: removing {remove:.3g} of {units} units rounds to {'none' if best == units else 'all'}; "
            + f"ratios of the {share.of} that exist: {ratios}"
        )
    return best


@dataclass(frozen=True, slots=True)
class Ranking:
    """Units of several blocks that are ranked together, and how many parameters of them should go.

    Units of a block go in steps of `multiple`, its lowest first; a step is worth the mean of its units. Steps of all
    blocks are looked at from the lowest on, and one goes if that brings what has gone nearer to the budget, counted in
    the parameters that it really has; where one is too large, its block is left as it is, and smaller steps of others
    may still fit. With values per parameter (`comparable`) that is the greedy solution of the knapsack problem. Where
    all units cost the same, exactly the lowest steps go.
    """

    units: Mapping[int, int]  # of every block that may lose some
    costs: Mapping[int, int]  # parameters of one unit of each block
    multiple: int
    fewest: int  # steps that stay in every block
    remove: int  # parameters

    @property
    def parameters(self) -> int:
        """Of all units."""
        return sum(count * self.costs[block] for block, count in self.units.items())

    @property
    def grain(self) -> int:
        """Parameters of the smallest step."""
        return self.multiple * min(self.costs.values())

    @property
    def most(self) -> int:
        """Parameters that can go."""
        stay = self.fewest * self.multiple
        return sum(max(0, count - stay) * self.costs[block] for block, count in self.units.items())

    def widths(self, values: Mapping[int, Tensor]) -> dict[int, int]:
        """Units that each block keeps; values: what its units are worth, [units]. Of equal steps the last one goes."""
        steps, left, gone, full = list[tuple[float, int, int]](), dict(self.units), 0, set[int]()
        for block, value in values.items():
            best = value.sort(descending=True).values.split(self.multiple)
            steps += [(float(part.mean()), block, len(part)) for part in reversed(best[self.fewest :])]
        for _, block, size in sorted(steps, key=lambda step: (step[0], -step[1])):
            cost = size * self.costs[block]
            if block in full or cost >= 2 * (self.remove - gone):
                full.add(block)
                continue
            left[block] -= size
            gone += cost
        return left

    def spread(self) -> dict[int, int]:
        """The same before anything is known of the units: about the same share of every block goes."""
        return self.widths({block: torch.linspace(1, 0, count) for block, count in self.units.items()})


def ranking_of(
    units: Mapping[int, int], costs: Mapping[int, int], remove: float, multiple: int, fewest: int, where: str, of: Share
) -> Ranking:
    """The ranking by which about `remove` parameters go, rounded to whole steps where all units cost the same.

    Raises PlanError if that rounds to none, or leaves less than the fewest.  of: share of one parameter.
    """
    costs = {block: costs[block] for block in units}
    found = Ranking(units, costs, multiple, fewest, 0)
    grain, alike = found.grain, len(set(costs.values())) == 1
    rounded = round(remove / grain) * grain if alike else round(remove)
    if 2 * rounded <= grain or rounded > found.most:
        unit, noun = (grain // multiple, "units") if alike else (1, "parameters")
        most = found.most // grain * grain if alike else found.most
        raise PlanError(
            f"{where}: removing {remove / unit:.3g} of {found.parameters // unit} {noun} rounds to "
            f"{rounded // unit if 2 * rounded > grain else 0}; from {grain // unit} to {most // unit} can go"
            + (f", in steps of {multiple}" if alike else "")
            + f", which are ratios of the {of.of} of {grain * of.unit:.3g} to {most * of.unit:.3g}"
        )
    return replace(found, remove=rounded)


def comparable(score: Tensor, cost: float, *, across: bool, per_parameter: bool) -> Tensor:
    """What the units of a block are worth beside those of other blocks, from their scores [units].

    Scores that mean the same in every block count per parameter (cost: of one unit, in any unit that all blocks
    share), so that a large unit goes before a small one that matters as much. Others only say which units of a block
    matter more: they are standardized, and compared as they are.
    """
    if not across and len(score) > 1:
        return standardized(score)
    return score / cost if per_parameter else score


def standardized(score: Tensor) -> Tensor:
    """score [units] of a block with mean 0 and variance 1, so that blocks whose inputs are large do not win by that."""
    return (score - score.mean()) / score.std().clamp(min=torch.finfo(score.dtype).tiny) if len(score) > 1 else score


def keep_highest(score: Tensor, kept: int) -> Tensor:
    """Positions [kept] int64, in order, of the highest scores [units]; of equal ones the first."""
    order = torch.argsort(score, descending=True, stable=True)
    return order[:kept].sort().values


def protected(count: int, first: int, last: int) -> set[int]:
    """Numbers of the first and last blocks."""
    return {*range(first), *range(count - last, count)}


def check_scores(scores: Sequence[Tensor], where: str) -> None:
    """A score that is no number would choose at random."""
    for score in scores:
        if not bool(score.isfinite().all()):
            raise CalibrationError(
                f"{where}: a score is NaN or infinite; the weights or the calibration data are damaged"
            )
