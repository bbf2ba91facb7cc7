"""What is said of a technique in docs/techniques.md: when it comes, what goes, whom that helps.

Most techniques say so in their class (`shelf`); `PLACES` has those whose class serves several, or that are no step of a
recipe. Paper, equation and recipe are not said here: they are in the docstring of the technique's module and in
`recipes/`, from which the page is made (`python evals/shelf.py`).
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
BITS = "files at once; memory, and speed of decoding, with packed kernels"
MEMORY = "memory of long texts, and time of attention, on any hardware"

SAME = "the smaller model computes what the masked one does; budgets are met to the unit"
GRID = "every value is on its grid; packing and unpacking give the same bits"
KEPT = "budgets hold; a prompt within the budget is treated as by an ordinary cache, to the bit"

PLACES: dict[tuple[str, str], Shelf] = {
    ("train", "recover"): Shelf("after training", "nothing", "the quality of what others left", "zeros stay zero"),
    ("method", "rtn"): Shelf("after training", "8 to 14 of 16 bits of a weight", BITS, GRID),
    ("method", "hqq"): Shelf("after training", "8 to 14 of 16 bits of a weight", BITS, GRID),
    ("method", "awq"): Shelf("after training", "8 to 14 of 16 bits of a weight", BITS, GRID),
    ("method", "gptq"): Shelf("after training", "8 to 14 of 16 bits of a weight", BITS, GRID),
    ("structure", "mlp_channel"): Shelf("after training", "MLP channels", UNITS, SAME),
    ("structure", "kv_group"): Shelf("after training", "key-value heads with their query heads", UNITS, SAME),
    ("structure", "query_head"): Shelf("after training", "a query head of every key-value head", UNITS, SAME),
    ("structure", "attention"): Shelf("after training", "whole attentions", UNITS, SAME),
    ("structure", "mlp"): Shelf("after training", "whole MLPs", UNITS, SAME),
    ("structure", "block"): Shelf("after training", "whole decoder blocks", UNITS, SAME),
    ("structure", "hidden"): Shelf("after training", "channels of the residual stream", UNITS, SAME),
    ("cache", "knorm"): Shelf("at run time", "keys and values of tokens with large keys", MEMORY, KEPT),
    ("cache", "snapkv"): Shelf("at run time", "those that the newest queries attend to least", MEMORY, KEPT),
    ("cache", "streaming"): Shelf("at run time", "those between the first tokens and the newest", MEMORY, KEPT),
}
