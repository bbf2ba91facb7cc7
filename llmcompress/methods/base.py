"""What every method is: frozen options, the statistics it needs, and a pure function from weight to result."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmcompress.grid import IntGrid, fit_range
from llmcompress.lazy import Tensor, torch
from llmcompress.mask import Pattern, keep_best
from llmcompress.options import Options
from llmcompress.stats import GradientMean, Statistics
from llmcompress.weight import CompressedWeight, Kind

Survey = Literal["weights", "inputs", "gradients"]  # of every linear of the dense model


class Method(Options):
    """Base of every method; subclasses add their options as fields.

    A method knows one weight: no model, no names, no files.
    """

    needs: ClassVar[Statistics | None] = None  # gathered for `compress`; None for data-free methods
    passes: ClassVar[float] = 30.0  # over the weights, about: for predictions of time
    rescales: ClassVar[bool] = False  # True: `link_scale` is asked before `compress`, for every link

    def compress(
        self, weight: Tensor, statistics: Tensor | None, dtype: "torch.dtype", mask: Tensor | None = None
    ) -> CompressedWeight:
        """The weight as a checkpoint of `dtype` holds it.

        weight: [out, in] float32.  statistics: the float32 mean of what the method `needs`: [in, in] of InputGram,
        [in] of InputSquares, [out, in] of gradients, or None.  mask: [out, in] bool from an earlier step, True where a
        weight stays; others are zero in `weight` and must be zero in the result.
        """
        raise NotImplementedError(f"{type(self).__name__}.compress")

    @property
    def products(self) -> float:
        """Multiplications per weight and input column, about: for predictions of time."""
        return 0.0

    @property
    def prunes(self) -> Pattern | None:
        """The pattern of the mask that this method makes; None if it makes none."""
        return None

    @property
    def share(self) -> float:
        """Of the weights that the mask removes."""
        return 0.0

    @property
    def kind(self) -> Kind:
        """What its results are."""
        return Kind(pattern=self.prunes, sparsity=self.share)

    @property
    def stacks(self) -> bool:
        """Whether output rows are independent, so that weights that share an input can be stacked."""
        return True

    @property
    def survey(self) -> frozenset[Survey]:
        """What must be gathered of the dense model before its first block is compressed."""
        return frozenset()

    def link_scale(self, weights: list[Tensor], gram: Tensor, index: Tensor, dtype: "torch.dtype") -> Tensor:
        """Factors to move from consumers to their producer before `compress`; see `methods/awq.py`."""
        raise NotImplementedError(f"{type(self).__name__}.link_scale")


class Budgeted(Method):
    """A method that makes masks: how much goes, and how that is spread over the linears of a step."""

    sparsity: float | None = Field(None, ge=0, lt=1, description="share removed; n:m has its own")
    budget: Literal["uniform", "erk", "owl", "global"] = Field("uniform", description="how the sparsity is spread")
    overrides: dict[str, float] = Field({}, description="other sparsities, by globs on module names; outside `budget`")
    outlier_factor: float = Field(5.0, gt=1, description="owl: a score above so many means is an outlier")
    outlier_range: float = Field(0.08, gt=0, lt=0.5, description="owl: blocks differ by twice this at most")

    @model_validator(mode="before")
    @classmethod
    def _global(cls, values: Any) -> Any:
        """`pattern: global` is short for counts by matrix that a ranking over all matrices decides."""
        if isinstance(values, dict) and values.get("pattern") == "global":
            if values.get("budget", "global") != "global":
                raise ValueError(f"pattern global has the budget global; for {values['budget']} use row or layer")
            return values | {"pattern": "layer", "budget": "global"}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pattern = self.prunes
        if pattern is None:
            if self.sparsity is not None or self.budget != "uniform" or self.overrides:
                raise ValueError("sparsity, budget and overrides are for pruning; set `pattern` too, such as row")
            return self
        if pattern.kind == "n:m":
            own = 1 - pattern.n / pattern.m
            if self.sparsity is not None and self.sparsity != own:
                raise ValueError(f"pattern {pattern} removes {own:g} of the weights; leave `sparsity` out")
            if self.budget != "uniform" or self.overrides:
                raise ValueError(
                    f"pattern {pattern} has one sparsity for all; leave `budget` and `overrides` out, or use layer"
                )
            return self
        if self.sparsity is None:
            raise ValueError(f"pattern {pattern} needs `sparsity`, the share to remove, such as 0.5")
        for glob, sparsity in self.overrides.items():
            if not 0 <= sparsity < 1:
                raise ValueError(f"overrides: {glob!r} is {sparsity}, expected a share from 0 to below 1")
        room = min(self.share, 1 - self.share)
        if self.budget == "owl" and 2 * self.outlier_range > room:
            raise ValueError(
                f"budget owl moves a block's sparsity by up to {2 * self.outlier_range:g}, and {self.share:g} leaves "
                f"{room:g}; set outlier_range to at most {room / 2:.3g}"
            )
        return self

    @property
    def survey(self) -> frozenset[Survey]:
        """Gradients for scores that need them, and whatever the budget looks at."""
        found: set[Survey] = set()
        if self.needs and issubclass(self.needs, GradientMean):
            found.add("gradients")
        if self.budget == "owl" or (self.budget == "global" and self.needs and not found):
            found.add("inputs")
        if self.budget == "global" and not found:
            found.add("weights")
        return frozenset(found)

    def score(self, weight: Tensor, statistics: Tensor | None) -> Tensor:
        """How much each weight of [out, in] matters in the dense model, same shape, >= 0, higher is better."""
        raise NotImplementedError(f"{type(self).__name__}.score")

    @property
    def share(self) -> float:
        """Of the weights that go."""
        pattern = self.prunes
        return 1 - pattern.n / pattern.m if pattern and self.sparsity is None else self.sparsity or 0.0

    @property
    def stacks(self) -> bool:
        """A count over a whole matrix is over that matrix alone."""
        return self.prunes is None or self.prunes.kind != "layer"


class Pruner(Budgeted):
    """A method whose result is a mask, and the weights that stay."""

    pattern: str = Field("row", description="row, layer, global, n:m such as 2:4, or block:n")

    @property
    def prunes(self) -> Pattern:
        """The pattern."""
        return Pattern.parse(self.pattern)


class ScoreMethod(Pruner):
    """A pruner that keeps the weights of the highest score and changes none of them."""

    def compress(
        self, weight: Tensor, statistics: Tensor | None, dtype: "torch.dtype", mask: Tensor | None = None
    ) -> CompressedWeight:
        """The weight with the lowest scores set to zero; what was masked before goes first."""
        score = self.score(weight, statistics)
        if mask is None:
            keep = keep_best(score, self.prunes, self.share)
        else:  # below every score, but nothing in the sum of a block
            gone = 0 if self.prunes.kind == "block" else -1
            keep = keep_best(score.masked_fill(~mask, gone), self.prunes, self.share).logical_and_(mask)
        return CompressedWeight(values=weight.masked_fill(~keep, 0).to(dtype), mask=keep)


class IntMethod(Method):
    """A method whose result lies on an integer grid."""

    passes: ClassVar[float] = 250.0
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | Literal["row"] = Field(64, description="input columns per scale, or 'row' for whole rows")
    symmetric: bool = True

    @field_validator("group_size")
    @classmethod
    def _known_group(cls, value: Any) -> Any:
        if value not in (32, 64, 128, "row"):
            raise ValueError("group_size must be 32, 64, 128 or 'row' (one scale per output row)")
        return value

    @property
    def kind(self) -> Kind:
        """A grid of these options."""
        return Kind(self.bits, self.group_size, self.symmetric, self.prunes, self.share)

    def group(self, columns: int) -> int:
        """Columns per scale for a weight of `columns` input features."""
        return self.kind.group(columns)

    def fit(
        self, weight: Tensor, dtype: "torch.dtype", *, search: bool = True, importance: Tensor | None = None
    ) -> IntGrid:
        """The grid of these options for weight [out, in]; see `grid.fit_range`."""
        return fit_range(
            weight,
            bits=self.bits,
            group=self.group(weight.shape[1]),
            symmetric=self.symmetric,
            dtype=dtype,
            search=search,
            importance=importance,
        )


def required(method: Method, statistics: Tensor | None) -> Tensor:
    """The statistics, which a method with `needs` always gets."""
    if statistics is None:
        raise ValueError(f"{type(method).__name__.lower()} needs statistics: {getattr(method.needs, '__name__', None)}")
    return statistics
