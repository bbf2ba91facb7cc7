"""What a technique's class says of itself for docs/techniques.md: when it prunes, what goes, whom that helps.

Paper, equation and recipe are not said here: they are in the docstring of the technique's module and in `recipes/`,
from which the page is made (`python evals/shelf.py`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Shelf:
    """A technique's place in the taxonomy of Cheng, Zhang and Shi 2023, arXiv:2308.06767."""

    when: Literal["before training", "during training", "after training", "at run time"]
    removes: str  # the smallest thing that goes
    helps: str  # what becomes smaller or faster by that, and where
    holds: str  # what tests assert


WEIGHTS = "files at once; speed where kernels skip single zeros"
HALVES = "files, and memory and speed with 2:4 kernels"
UNITS = "everything, on any hardware: what is left is a smaller dense model"
