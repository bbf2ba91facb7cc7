"""Units of a model that learns: rows and columns that go together, so that a smaller model is left without them.

What they are is found by observing a tiny copy of the model (`arch/`, `structure/groups.py`). A technique that lets
units go leaves zeros in their place and holds them there with masks; the structure step

    - structure: mlp_channel
      zeros: true

then cuts out exactly these. The smaller model computes the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.lazy import Tensor, torch
from llmcompress.training.schedule import Scheduled
from llmcompress.training.technique import Learner, Technique, mask_sha256

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from llmcompress.structure.groups import Group, Member

Kind = Literal["mlp_channel", "kv_group", "query_head", "attention", "mlp"]
WHOLE = ("attention", "mlp")  # of which a block has one


class UnitLearn(Scheduled):
    """What techniques have that let units go."""

    kinds: ClassVar[tuple[str, ...]] = ("mlp_channel", "kv_group", "query_head")  # that the technique is for

    units: list[Kind] = Field(["mlp_channel"], min_length=1, description="kinds of units that may go, see `structure`")

    @model_validator(mode="after")
    def _kinds(self) -> Self:
        if bad := [kind for kind in self.units if kind not in self.kinds]:
            raise ValueError(f"units: {bad[0]} is not for this technique, which takes {', '.join(self.kinds)}")
        if len(set(self.units)) < len(self.units):
            raise ValueError(f"units: {', '.join(self.units)} names one kind twice")
        if {"kv_group", "query_head"} <= set(self.units):
            raise ValueError("units: kv_group and query_head share rows, so that one cannot go without parts of others")
        return self

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """As `units` says."""
        return tuple(self.units)


class Fewer(UnitLearn):
    """What techniques have that take a share of the units away."""

    ratio: float = Field(gt=0, lt=1, description="share of the units of each kind that goes")

    def check_units(self, model: Any) -> None:
        """Raise ValueError if the share of a block's units rounds to none or all of them."""
        for units in units_in(model, self.unit_kinds):
            gone, count = round(self.ratio * units.count), units.count
            if not 0 < gone < count:
                shares = f"{1 / count:.3g} to {(count - 1) / count:.3g}" if count > 1 else "none, it is the only one"
                raise ValueError(
                    f"ratio: {self.ratio:g} takes {gone} of the {count} units ({units.kind}) of a block, and some have "
                    f"to go and some to stay; shares that exist: {shares}"
                )


@dataclass(frozen=True, slots=True)
class Units:
    """The units of one kind in one block of a model that is in memory."""

    block: int
    path: str  # of the block's module
    module: Any  # the block
    group: "Group"

    @property
    def kind(self) -> str:
        """What they are."""
        return self.group.kind

    @property
    def count(self) -> int:
        """How many there are."""
        return self.group.units

    @property
    def name(self) -> str:
        """Of the kind and the block, without dots."""
        return f"{self.kind}_{self.block}"

    @property
    def size(self) -> int:
        """Parameters of one unit."""
        return self.group.parameters_per_unit({name: tuple(p.shape) for name, p in self.module.named_parameters()})

    def parts(self) -> "Iterator[tuple[nn.Parameter, Member]]":
        """Every parameter that holds a share of each unit, and which."""
        for member in self.group.members:
            yield self.module.get_parameter(member.parameter), member

    def weights(self) -> dict[str, Tensor]:
        """Linear -> its weight [out, in], without its graph."""
        linears = {name: self.module.get_submodule(name) for name in self.group.linears}
        return {name: as_matrix(linear, linear.weight.detach()) for name, linear in linears.items()}

    def sums(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over everything that goes with a unit of a function of single numbers, such as squares; [units]."""
        total: Any = 0
        for parameter, member in self.parts():
            values = of(parameter.detach()).movedim(member.dim, 0).reshape(parameter.shape[member.dim], -1).sum(1)
            total = total + values[member.index.to(values.device)].sum(1)
        return total

    def norms(self) -> Tensor:
        """Root of the sum of squares of each unit, [units]."""
        return self.sums(torch.square).sqrt()

    def scale(self, factors: Tensor) -> None:
        """Multiply everything of each unit with its factor [units], in place."""
        with torch.no_grad():
            for parameter, member in self.parts():
                parameter.mul_(along(parameter, member.dim, member.index, factors))

    def scale_outputs(self, factors: Tensor) -> None:
        """Multiply what each unit gives to the rest of the model with its factor [units], in place."""
        linear = self.module.get_submodule(self.group.consumer)
        with torch.no_grad():
            weight = as_matrix(linear, linear.weight)
            weight.mul_(along(weight, 1, self.group.columns, factors))

    def gated(self, factors: Callable[[], Tensor]) -> "RemovableHandle":
        """Let forward passes multiply what each unit gives to the rest of the model with its factor [units]."""
        consumer, columns = self.module.get_submodule(self.group.consumer), self.group.columns
        place = torch.empty(columns.numel(), dtype=torch.int64)
        place[columns.flatten()] = torch.arange(self.count).repeat_interleave(columns.shape[1])
        place = place.to(consumer.weight.device)

        def multiply(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = inputs
            return (x * factors()[place].to(x.dtype), *rest)

        handle: RemovableHandle = consumer.register_forward_pre_hook(multiply)
        return handle

    def mask(self, masks: dict[str, Tensor], stay: Tensor) -> None:
        """Add to masks, by parameter name, that only the units `stay` [units] bool do."""
        for parameter, member in self.parts():
            name = f"{self.path}.{member.parameter}"
            fresh = along(parameter, member.dim, member.index, stay).expand_as(parameter)
            masks[name] = masks[name] & fresh if name in masks else fresh.clone()

    def zero(self) -> Tensor:
        """Which units are zero, [units] bool."""
        from llmcompress.structure.groups import zero_units

        return zero_units(self.module, self.group)


class UnitTechnique(Technique):
    """The base of techniques that let units go."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Find them."""
        self.units = units_in(learner.model, self.options.unit_kinds)

    def record(self) -> dict[str, Any]:
        """How many of each kind are zero."""
        kinds: dict[str, dict[str, int]] = {kind: {"zero": 0, "of": 0} for kind in self.options.unit_kinds}
        for units in self.units:
            kinds[units.kind]["zero"] += int(units.zero().sum())
            kinds[units.kind]["of"] += units.count
        return {"units": kinds} | ({"mask_sha256": mask_sha256(self.masks)} if self.masks else {})


def units_in(model: Any, kinds: tuple[str, ...]) -> list[Units]:
    """All units of these kinds, block by block; small ones before those that hold them."""
    from llmcompress.arch import discover
    from llmcompress.structure.groups import all_groups

    architecture = discover(model)
    found = all_groups(model, architecture)
    units = [
        Units(index, architecture.block(index), model.get_submodule(architecture.block(index)), group)
        for kind in kinds
        for index, group in found.get(kind, {}).items()
    ]
    return sorted(units, key=lambda each: (each.kind in WHOLE, each.block, kinds.index(each.kind)))


def as_matrix(linear: Any, weight: Tensor) -> Tensor:
    """A linear's weight, or what has its shape, as [out, in]; a view."""
    from llmcompress.arch import is_transposed

    return weight.T if is_transposed(linear) else weight


def along(parameter: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """values [units] at their positions index [units, n] along a dimension of a parameter, to be multiplied with it;
    1 or True elsewhere. Of as many dimensions as the parameter, all others of size 1."""
    line = torch.ones(parameter.shape[dim], dtype=values.dtype, device=parameter.device)
    line[index.flatten().to(line.device)] = values.to(line.device).repeat_interleave(index.shape[1])
    return line.reshape([-1 if d == dim else 1 for d in range(parameter.ndim)])


def lowest(scores: Tensor, count: int) -> Tensor:
    """Which units stay when the `count` lowest of scores [units] go, bool; of equal ones the last go."""
    stay = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    stay[scores.argsort(descending=True, stable=True)[: len(scores) - count]] = True
    return stay
