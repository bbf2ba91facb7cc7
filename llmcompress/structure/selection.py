"""How many units stay, and which: budgets, rounding, and the choice by score.

A budget is a share, a number of parameters or a number of bytes, of the whole model, of its decoder blocks or of what
the group itself holds. Every block keeps the same number of units, so that stock engines load the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.errors import PlanError


def uniform_width(units: int, remove: float, multiple: int, where: str) -> int:
    """Units that stay of `units`, when `remove` of them (not rounded) should go; a multiple of `multiple`.

    The nearest multiple, the larger of two equally near. Raises PlanError if keeping all of them is nearer, or none.
    """
    wanted = units - remove
    possible = list(range(multiple, units, multiple))
    if not possible:
        raise PlanError(f"{where}.multiple: {multiple} leaves no smaller width of the {units} units there are")
    best = min([units, *reversed(possible)], key=lambda width: abs(width - wanted))
    if best == units or wanted <= 0:
        shares = ", ".join(f"{1 - width / units:.3g} (keeps {width})" for width in possible[-4:][::-1])
        raise PlanError(
            f"{where}: removing {remove:.3g} of {units} units rounds to {'none' if best == units else 'all'}; "
            + (f"shares of the group that exist: {shares}" if possible else "there is nothing smaller")
        )
    return best


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
