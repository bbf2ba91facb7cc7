"""How many units stay, and which: budgets, rounding, and the choice by score.

A budget is a share, a number of parameters or a number of bytes, of the whole model, of its decoder blocks or of what
the group itself holds. By default every block keeps the same number of units, so that stock engines load the result;
or the units of all blocks are ranked together, and some blocks keep more than others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.errors import PlanError


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


def total_width(units: Mapping[int, int], remove: float, multiple: int, fewest: int, where: str, share: Share) -> int:
    """Units that stay in all blocks together, when `remove` of them (not rounded) should go.

    units: of every block that may lose some.  fewest: of them that stay in every block, in steps of `multiple`.
    Raises PlanError if that rounds to none, or leaves less than the fewest.  share: of one unit.
    """
    have = sum(units.values())
    steps = round(remove / multiple)
    least = sum(min(fewest * multiple, count) for count in units.values())
    if steps < 1 or have - steps * multiple < least:
        most = (have - least) // multiple
        raise PlanError(
            f"{where}: removing {remove:.3g} of {have} units rounds to {steps * multiple}; from {multiple} to "
            f"{most * multiple} can go, in steps of {multiple}, which are ratios of the {share.of} of "
            f"{multiple * share.unit:.3g} to {most * multiple * share.unit:.3g}"
        )
    return have - steps * multiple


def global_widths(scores: Mapping[int, Tensor], total: int, multiple: int, fewest: int) -> dict[int, int]:
    """Units that each block keeps of scores[block] [units], `total` in all, by one ranking of the units of all blocks.

    Units go in steps of `multiple`, the lowest of a block first, so a step counts with its mean score. The `fewest`
    highest steps of a block stay whatever they are worth.
    """
    widths, steps = {}, list[tuple[float, int, int]]()
    for block, score in scores.items():
        best = score.sort(descending=True).values.split(multiple)
        widths[block] = sum(len(part) for part in best[:fewest])
        steps += [(float(part.mean()), block, len(part)) for part in best[fewest:]]
    for _, block, size in sorted(steps, key=lambda step: (-step[0], step[1])):
        if sum(widths.values()) + size <= total:
            widths[block] += size
        else:
            break
    return widths


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
            raise PlanError(f"{where}: a score is NaN or infinite; the weights or the calibration data are damaged")
