"""What a structure step takes away: its plan's record, and the budget in parameters.

A budget is a share, a number of parameters or a number of bytes; of the whole model, of its decoder blocks or of what
the units themselves hold. All three shares are always told.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from llmcompress.arch import Module
from llmcompress.cost import Phase
from llmcompress.errors import PlanError
from llmcompress.layout import block_index, block_linears
from llmcompress.plan import Plan, PlannedLinear
from llmcompress.recipe import StructureStep
from llmcompress.source import ModelSource
from llmcompress.structure import Structure, Sublayer, Width
from llmcompress.structure.groups import Group
from llmcompress.structure.selection import Ranking, protected
from llmcompress.structure.step import Blockwise

WORDS = {"model": "the model", "decoder": "its decoder blocks", "group": "this kind of group"}


@dataclass(frozen=True, slots=True)
class StructurePlan(Plan):
    """A structure step that fits a model; no linear has a method."""

    step: StructureStep
    groups: dict[int, Group]  # what becomes narrower in which block; empty where whole blocks go
    widths: dict[int, int]  # units that each of these keeps; what a global ranking decides is spread evenly till then
    drop: int  # how many blocks go
    smaller: ModelSource  # as far as it is known: with `drop`, as if the last blocks went
    ranking: Ranking | None  # what decides the widths, if one ranking over all blocks does
    scoring: Phase  # what finding out which units go will take

    @property
    def needs_data(self) -> bool:
        """Whether anything is gathered from calibration data."""
        return needs_data(self.step.options)

    @property
    def advice(self) -> str:
        """How to need less memory."""
        words = "use fewer calibration samples or shorter ones"
        if self.scoring.disk:
            return f"{words}, a score without gradients"
        return f"{words}, `compensate: none`" if getattr(self.step.options, "compensate", "none") != "none" else words

    @property
    def result(self) -> ModelSource:
        """The smaller model."""
        return self.smaller

    @property
    def extent(self) -> tuple[int, int, int]:
        """What the budget counts, how much of it goes, and how much must go at once.

        Parameters where one ranking decides; else units of a block, or the blocks themselves.
        """
        if self.ranking:
            return self.ranking.parameters, self.ranking.remove, self.ranking.grain
        if not self.groups:
            return self.count, self.drop, 1
        first = min(unprotected(self, self.step) & set(self.groups))
        before = self.groups[first].units
        return before, before - self.widths[first], getattr(self.step.options, "multiple", 1)

    @property
    def counted(self) -> str:
        """What `extent` counts, in a word."""
        return "parameters" if self.ranking else "units"

    def plain(self) -> dict[str, Any]:
        """Also what scoring takes."""
        scoring = {"memory_bytes": int(self.scoring.memory), "seconds": self.scoring.seconds}
        return Plan.plain(self) | {"scoring": scoring | {"disk_bytes": int(self.scoring.disk)}}


def needs_data(options: Structure) -> bool:
    """Whether calibration text is read: for the score, or to make up for what goes."""
    if isinstance(options, Width | Sublayer):
        return options.score.walk != "weights" or options.compensate != "none"
    return bool(options.score.looks_at_data)


def unprotected(dense: Plan, step: StructureStep) -> set[int]:
    """Numbers of the blocks that may go."""
    options = step.options
    assert isinstance(options, Blockwise)
    free = set(range(dense.count)) - protected(dense.count, options.protect_first, options.protect_last)
    if not free:
        raise PlanError(f"{step.where}: protect_first and protect_last leave none of the {dense.count} blocks")
    return free


def parameters_to_remove(totals: Mapping[str, int], options: Structure, where: str, item: int) -> float:
    """How many parameters the budget takes away; totals: see `denominators`.  item: bytes of one parameter."""
    total = totals[options.of]
    if options.ratio is not None:
        return options.ratio * total
    stays = options.parameters if options.parameters is not None else (options.bytes or 0) / item
    if stays >= total:
        raise PlanError(f"{where}: the {options.of} has {total} parameters ({total * item} bytes) and is small enough")
    return total - stays


def denominators(model: Module, blocks: str, group: int) -> dict[str, int]:
    """Parameters of everything that a budget can be a share of; group: those of all units in the model.

    Counted in the model, as files may hold a tied table twice, and buffers such as the causal masks of old ones.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    decoder = sum(size for name, size in sizes.items() if name.startswith(f"{blocks}."))
    return {"model": sum(sizes.values()), "decoder": decoder, "group": group}


def resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """shape with another size of one dimension."""
    return (*shape[:dim], size, *shape[dim + 1 :])


def shares(totals: Mapping[str, int], gone: int) -> str:
    """How much goes, of every denominator, in words."""
    parts = [f"{gone / totals[key]:.1%} of {words}" for key, words in WORDS.items()]
    return f"{gone:,} parameters: {', '.join(parts)}"


def extended(
    dense: Plan,
    step: StructureStep,
    groups: Mapping[int, Group],
    widths: Mapping[int, int],
    drop: int,
    result: ModelSource,
    note: str,
) -> StructurePlan:
    """The dense plan with what the step does."""
    changes = {"notes": [note], "linears": list(planned_linears(dense, result))}
    values: dict[str, Any] = {name: getattr(dense, name) for name in Plan.__slots__} | changes
    values |= {"groups": dict(groups), "widths": dict(widths), "drop": drop, "smaller": result}
    return StructurePlan(**values, step=step, ranking=None, scoring=Phase())


def planned_linears(dense: Plan, result: ModelSource) -> Iterator[PlannedLinear]:
    """Every linear with its bytes before and after."""
    for name, shape in block_linears(dense.source, dense.blocks, dense.transposed).items():
        left = result.tensors.get(f"{name}.weight")
        sizes = (prod(s) * dense.itemsize for s in (shape, left.shape if left else (0,)))
        yield PlannedLinear(name, block_index(name, dense.blocks), shape, (), (), None, *sizes)
