"""DSA: each block learns how many of its units it keeps, under a budget for all together. Differentiable sparsity
allocation, Ning et al. 2020, arXiv:2004.02164.

    p_i = 1 / (1 + (β1 / b_i)^β2)        β1 such that mean p_i = α        m_i ~ Bernoulli(p_i)
    minimize L(W, m) over W and α, subject to F(α) <= B

b_i: importance of unit i of a block, the norm of everything that goes with it; its logarithms are standardized, so
that β2 means the same in every block. β2 grows, which makes p a step: the α U most important of U units. α gets its
gradient through the masks (straight-through) and through β1, which is a function of α: dp_i/dα = U softmax(log p'_i).
F is linear, the cost of a unit times how many there are. The constraint is held by the augmented Lagrangian of an
inequality, which pulls ratios down while they are above the budget (by μ, also just below it) and never up,

    (max(0, μ + ρ g)² - μ²) / 2ρ      g = F(α) / B_t - 1      μ <- max(0, μ + ρ g)

with B_t falling from everything to the budget B in the first half of the time, before which nothing is masked; masks
are drawn once for each step. At the end ratios become counts: the α
are shifted together until the counts, rounded down, just fit, and what is left of the budget is filled up by the
largest remainders. The most important units of each block stay. α = sigmoid(`speed` θ), trained by the model's
optimizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, floor, log
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import UNITS, Shelf
from llmcompress.training.schedule import ramp
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import UnitLearn, Units, UnitTechnique, lowest, units_in

if TYPE_CHECKING:
    from torch import nn

PARAMETER = "kept_shares"  # its name in the model: θ, one number for the units of a kind in a block
START = 0.98  # α at first
SLACK = 0.005  # share of the budget that rounding may leave unused
SHARPEST = 10.0  # β2 at the end, in standard deviations of log b; at first 1


class DSA(UnitLearn):
    """Options of `train: dsa`."""

    shelf: ClassVar[Shelf] = Shelf(
        "during training",
        "MLP channels, KV groups, heads",
        UNITS,
        "within half a percent of the budget, and never above it; the smaller model computes the same",
    )

    keep: float = Field(gt=0, lt=1, description="budget: share of what all decoder blocks cost")
    of: Literal["parameters", "flops"] = Field("parameters", description="what is counted; flops are of one token")
    context: int = Field(256, ge=1, description="flops: tokens that a token attends to")
    speed: float = Field(50.0, gt=0, description="steps of a ratio's logit, in learning rates")
    pressure: float = Field(1.0, gt=0, description="ρ: how hard ratios are held to the budget")

    def check_units(self, model: Any) -> None:
        """Raise ValueError if the budget is not to be met, or not to within `SLACK` of it."""
        ledger = ledger_of(units_in(model, counted(self)), self)
        least = ledger.cost([1] * len(ledger.counts))
        if ledger.budget < least:
            raise ValueError(
                f"keep: {self.keep:g} is {ledger.budget:,.0f} of {ledger.total:,} {self.of} of the decoder blocks, and "
                f"one unit of each kind in each block, with all that does not go, takes {least:,}; use at least "
                f"{least / ledger.total:.3f}"
            )
        grain = min(ledger.prices)
        if grain > SLACK * ledger.budget:
            raise ValueError(
                f"keep: no rounding meets {ledger.budget:,.0f} {self.of} to {SLACK:.1%}, as the smallest unit takes "
                f"{grain:,}, {grain / ledger.budget:.1%} of it; let mlp_channel go too"
            )

    def technique(self) -> Technique:
        """Ratios that learn."""
        return Allocation(self)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What units cost."""

    prices: list[int]  # of one unit, of a kind in a block
    counts: list[int]  # how many there are
    fixed: int  # what no unit can save
    total: int
    budget: float

    def cost(self, kept: Sequence[int]) -> int:
        """With so many units."""
        return self.fixed + sum(price * count for price, count in zip(self.prices, kept, strict=True))

    def rounded(self, shares: Sequence[float]) -> list[int]:
        """How many units stay when these shares in (0, 1) are wished: at least one, and never above the budget."""
        logits = [log(share / (1 - share)) for share in shares]
        low, high = -60.0, 60.0  # at the lowest, one unit stays everywhere
        for _ in range(80):
            middle = (low + high) / 2
            counts = [max(1, floor(wish)) for wish in self.wishes(logits, middle)]
            low, high = (middle, high) if self.cost(counts) <= self.budget else (low, middle)
        wishes = self.wishes(logits, low)
        counts = [max(1, floor(wish)) for wish in wishes]
        while True:
            missing = [i for i, count in enumerate(counts) if count < self.counts[i]]
            fitting = [i for i in missing if self.prices[i] <= self.left(counts)]
            if not fitting and self.left(counts) <= SLACK * self.budget:
                return counts
            most = max(fitting or missing, key=lambda i: wishes[i] - counts[i])
            if not fitting and not self.make_room(counts, wishes, self.prices[most]):
                return counts
            counts[most] += 1

    def left(self, kept: Sequence[int]) -> float:
        """Of the budget, with so many units."""
        return self.budget - self.cost(kept)

    def make_room(self, counts: list[int], wishes: Sequence[float], room: int) -> bool:
        """Give up the cheapest units, in place, until so much of the budget is left; whether there are enough."""
        price = min(self.prices)
        cheap = [i for i, each in enumerate(self.prices) if each == price]
        if sum(counts[i] - 1 for i in cheap) * price < room - self.left(counts):
            return False
        while self.left(counts) < room:
            counts[max((i for i in cheap if counts[i] > 1), key=lambda i: counts[i] - wishes[i])] -= 1
        return True

    def wishes(self, logits: Sequence[float], shift: float) -> list[float]:
        """Units, not rounded, after all logits were shifted."""
        return [count / (1 + exp(-logit - shift)) for logit, count in zip(logits, self.counts, strict=True)]


class Allocation(UnitTechnique):
    """Ratios that learn."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Give the model a ratio for the units of each kind in each block."""
        found = units_in(learner.model, counted(self.options))
        self.units = [units for units in found if units.kind in self.options.units]
        self.ledger = ledger_of(found, self.options)
        device = next(learner.model.parameters()).device
        start = torch.full((len(self.units),), log(START / (1 - START)) / self.options.speed, device=device)
        learner.model.register_parameter(PARAMETER, torch.nn.Parameter(start))
        self.multiplier = torch.zeros((), device=device)
        self.sharpness = 1.0
        self.acting = False  # once its time has begun
        self.noise: list[Tensor] = []  # uniform numbers [units] of the step that is under way
        self.stay: dict[str, Tensor] = {}  # once it is settled
        self.settled = torch.zeros(len(self.units), device=device)  # α then
        self.hooks = [each.gated(partial(self.mask, learner.model, i)) for i, each in enumerate(self.units)]

    def shares(self, model: "nn.Module") -> Tensor:
        """α of the units of each kind in each block."""
        return (self.options.speed * model.get_parameter(PARAMETER)).sigmoid()

    def begin_step(self, step: int, learner: Learner) -> None:
        """Sharper masks, and what they are drawn with."""
        self.acting = step > self.options.first
        self.sharpness = 1 + (SHARPEST - 1) * self.options.done(step)
        if self.gambling:
            device = self.multiplier.device
            self.noise = [torch.rand(units.count, device=device) for units in self.units]

    @property
    def gambling(self) -> bool:
        """Whether masks are random."""
        return self.acting and not self.stay

    def mask(self, model: "nn.Module", place: int) -> Tensor:
        """m [units]: 1 at first, then drawn, with the gradient of p; once it is settled, what stays."""
        units, share = self.units[place], self.shares(model)[place]
        if not self.gambling:
            stay = self.stay[units.name] if self.stay else torch.ones(units.count, device=share.device)
            return stay.to(share.dtype) + 0 * share  # several processes need every parameter in the graph
        p = probabilities(units.norms(), share, self.sharpness)
        drawn = (self.noise[place] < p).to(p.dtype)
        return drawn + (p - p.detach())

    def penalty(self, step: int, learner: Learner) -> Tensor | None:
        """(max(0, μ + ρ g)² - μ²) / 2ρ, while masks are random."""
        if not self.gambling:
            return None
        pull = (self.multiplier + self.options.pressure * self.gap(step, learner.model)).clamp(min=0)
        return (pull.square() - self.multiplier.square()) / (2 * self.options.pressure)

    def gap(self, step: int, model: "nn.Module") -> Tensor:
        """g: how far the ratios are above the budget of a step, with its graph."""
        prices = [price * count for price, count in zip(self.ledger.prices, self.ledger.counts, strict=True)]
        shares = self.shares(model)
        cost = self.ledger.fixed + (shares * torch.tensor(prices, dtype=shares.dtype, device=shares.device)).sum()
        part = ramp(2 * self.options.done(step))
        return cost / (self.ledger.total + part * (self.ledger.budget - self.ledger.total)) - 1

    def before_step(self, step: int, learner: Learner) -> bool:
        """The multiplier moves."""
        if self.gambling:
            with torch.no_grad():
                gap = self.gap(step, learner.model)
                self.multiplier = (self.multiplier + self.options.pressure * gap).clamp(min=0)
        return True

    def after_step(self, step: int, learner: Learner) -> None:
        """At the end of its time, settle what stays."""
        if step != self.options.end:
            return
        self.settled = self.shares(learner.model).detach().clamp(1e-6, 1 - 1e-6)
        kept = self.ledger.rounded(self.settled.double().tolist())
        for units, count in zip(self.units, kept, strict=True):
            self.stay[units.name] = lowest(units.norms(), units.count - count)
            units.mask(self.masks, self.stay[units.name])

    def finish(self, learner: Learner) -> None:
        """Take masks and ratios out of the model."""
        for hook in self.hooks:
            hook.remove()
        delattr(learner.model, PARAMETER)

    def state(self) -> dict[str, Tensor]:
        """Also the multiplier, and what stays; ratios are a parameter of the model."""
        mine = {"multiplier": self.multiplier, "settled": self.settled}
        return super().state() | mine | {f"stay.{name}": stay for name, stay in self.stay.items()}

    def load(self, state: Mapping[str, Tensor], learner: Learner) -> None:
        """Also these."""
        super().load(state, learner)
        device = self.multiplier.device
        self.multiplier = state["multiplier"].to(device)
        self.settled = state["settled"].to(device)
        names = [units.name for units in self.units if f"stay.{units.name}" in state]
        self.stay = {name: state[f"stay.{name}"].to(device) for name in names}

    def record(self) -> dict[str, Any]:
        """Also the ratios, what stays of every block, and what it costs."""
        if not self.stay:
            return super().record()
        kept = [int(self.stay[units.name].sum()) for units in self.units]
        names = [units.name for units in self.units]
        chosen: dict[str, Any] = {"shares": dict(zip(names, self.settled.tolist(), strict=True))}
        chosen["kept"] = dict(zip(names, kept, strict=True))
        costs = {"of": self.options.of, "budget": floor(self.ledger.budget), "used": self.ledger.cost(kept)}
        return super().record() | chosen | {"costs": costs | {"before": self.ledger.total}}


def probabilities(importance: Tensor, share: Tensor, sharpness: float) -> Tensor:
    """p [units] of their importance [units] > 0, with mean `share`, and with the gradient of that.

    β1 is found by bisection, without a graph; one step of Newton's method, which changes its value by nothing and has
    the share in it, then gives it the derivative of the implicit function.
    """
    b = importance.detach().clamp(min=torch.finfo(importance.dtype).tiny).log()
    b = (b - b.mean()) / b.std(correction=0).clamp(min=1e-6)
    low, high = b.min() - 40, b.max() + 40
    with torch.no_grad():
        for _ in range(40):
            middle = (low + high) / 2
            above = (sharpness * (b - middle)).sigmoid().mean() > share
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        beta = (low + high) / 2
        p = (sharpness * (b - beta)).sigmoid()
        slope = (sharpness * p * (1 - p)).mean().clamp(min=1e-6)
    beta = beta + (share.detach() - share) / slope
    return (sharpness * (b - beta)).sigmoid()


def counted(options: DSA) -> tuple[str, ...]:
    """Kinds of units that have to be known: those that go, and those that say what a block costs."""
    return tuple(dict.fromkeys((*options.unit_kinds, "mlp_channel", "kv_group")))


def ledger_of(found: list[Units], options: DSA) -> Ledger:
    """What units cost, and all of the decoder blocks; found: all that are `counted`."""
    flops = options.of == "flops"
    blocks = {units.path: units.module for units in found}
    numbers = sum(p.numel() for block in blocks.values() for p in block.parameters() if p.ndim > 1 or not flops)
    heads = sum(units.count * attended(units, options) for units in found if units.kind == "kv_group")
    total = 2 * numbers + heads if flops else numbers
    mine = [units for units in found if units.kind in options.units]
    prices, counts = [price(units, options) for units in mine], [units.count for units in mine]
    saved = sum(price * count for price, count in zip(prices, counts, strict=True))
    return Ledger(prices, counts, total - saved, total, options.keep * total)


def price(units: Units, options: DSA) -> int:
    """What one unit costs."""
    if options.of == "parameters":
        return units.size
    shares = (m.index.shape[1] * p.numel() // p.shape[m.dim] for p, m in units.parts() if p.ndim > 1)
    return 2 * sum(shares) + attended(units, options)


def attended(units: Units, options: DSA) -> int:
    """Operations of a unit's attention: scores, and sums of values, over the context."""
    return 0 if units.kind == "mlp_channel" else 4 * options.context * units.group.columns.shape[1]
