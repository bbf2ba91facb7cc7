"""L0: a random gate for every unit learns how often it is open, and the number of open gates is what costs. Louizos et
al. 2018, arXiv:1712.01312; held to a share by Lagrange multipliers as in Xia et al. 2022 (CoFi), arXiv:2204.00408, and
2023 (Sheared LLaMA), arXiv:2310.06694.

    z = clamp(s (ζ - γ) + γ, 0, 1)      s = sigmoid((log u - log(1 - u) + log α) / β)      u uniform in (0, 1)
    P(z > 0) = sigmoid(log α - β log(-γ / ζ))
    minimize over W and α, maximize over λ:   L(W, z) + λ g + ρ/2 g²      g = t - (1 - 1/N Σ P(z > 0))

with γ = -0.1, ζ = 1.1, β = 2/3: z is exactly 0 or 1 most of the time, and still has a gradient (hard concrete). N is
the number of gates of a kind; t, the share that is to be closed, rises to `ratio` in the first half of the time. The
papers let both factors of g climb; here λ alone climbs, by a fiftieth of ρ g at each step, as in an augmented
Lagrangian, since a factor of g² that never falls makes the penalty all there is; were λ faster than Adam, which
answers some steps late, the share would swing about t. Until its time begins all gates are open; noise is drawn once
for each step.

At the end all log α of a kind are shifted together until g is zero, so that what gates say is what was asked for to
the last digit, and the record tells how far they had come by themselves. The gates of each kind with the highest α in
all blocks stay, exactly the share that was asked for; from then on they are no longer random,

    z = clamp(sigmoid(log α) (ζ - γ) + γ, FLOOR, 1)

and after the last step they are multiplied into the weights, so that nothing of them is left in the model. Gates are
trained by the model's optimizer as log α = `speed` θ, which makes their steps so many times as large.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import log
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmcompress.lazy import Tensor, torch
from llmcompress.shelf import UNITS, Shelf
from llmcompress.training.schedule import ramp
from llmcompress.training.sparsity import best_of_all
from llmcompress.training.technique import Learner, Technique
from llmcompress.training.units import WHOLE, Fewer, Units, UnitTechnique, units_in

if TYPE_CHECKING:
    from torch import nn

LOW, HIGH, BETA = -0.1, 1.1, 2 / 3
OPEN = 2.0  # log α at first: a gate is open 97 times of 100
CLIMB = 0.02  # of λ, in ρ g
FLOOR = 0.05  # of a gate that stays: at zero it would have no gradient


class L0(Fewer):
    """Options of `train: l0`."""

    shelf: ClassVar[Shelf] = Shelf(
        "after training",
        "MLP channels, KV groups, heads",
        UNITS,
        "the share is exact in the end; what gates learn by themselves is near it, and nearer the longer they learn "
        "(a shift makes up for the rest); folding them changes no output",
    )

    kinds: ClassVar[tuple[str, ...]] = ("mlp_channel", "kv_group", "query_head", "attention", "mlp")

    speed: float = Field(100.0, gt=0, description="steps of a gate, in learning rates")
    pressure: float = Field(10.0, gt=0, description="ρ: how hard gates are held to the share that is to be closed")

    def check_units(self, model: Any) -> None:
        """Of whole sub-layers the share is of all blocks together, of other kinds too; some have to stay."""
        for kind, group in by_kind(units_in(model, self.unit_kinds)):
            total = sum(units.count for units in group)
            gone, fewest = round(self.ratio * total), 1 if kind in WHOLE else len(group)
            if not 0 < gone <= total - fewest:
                raise ValueError(
                    f"ratio: {self.ratio:g} takes {gone} of the {total} units ({kind}) of all blocks; from 1 to "
                    f"{total - fewest} can go"
                )

    def target(self, step: int) -> float:
        """Share of the gates that is to be closed at a step."""
        return self.ratio * ramp(2 * self.done(step))

    def technique(self) -> Technique:
        """Gates that learn."""
        return HardConcrete(self)


class HardConcrete(UnitTechnique):
    """Gates that learn."""

    options: Any

    def prepare(self, learner: Learner) -> None:
        """Give the model a gate for each unit."""
        super().prepare(learner)
        device = next(learner.model.parameters()).device
        self.multipliers = {kind: torch.zeros((), device=device) for kind in self.options.unit_kinds}
        self.acting = False  # once its time has begun
        self.noise: dict[str, Tensor] = {}  # u of each unit [units], of the step that is under way
        self.learned: dict[str, float] = {}  # expected share of closed gates of each kind, as they have learned it
        self.closed: dict[str, float] = {}  # the same after the shift, when they were chosen
        self.hooks = []
        for units in self.units:
            start = torch.full((units.count,), OPEN / self.options.speed, device=device)
            learner.model.register_parameter(gate_name(units), torch.nn.Parameter(start))
            self.hooks.append(units.gated(partial(self.gates, learner.model, units)))

    def begin_step(self, step: int, learner: Learner) -> None:
        """Draw the noise of the gates, if they act and it is not settled yet which units stay."""
        self.acting = step > self.options.first
        if self.gambling:
            device = next(learner.model.parameters()).device
            self.noise = {units.name: torch.rand(units.count, device=device) for units in self.units}

    @property
    def gambling(self) -> bool:
        """Whether gates are random."""
        return self.acting and not self.masks

    def gates(self, model: "nn.Module", units: Units) -> Tensor:
        """z of each unit, [units]: 1 at first, then random until it is settled which units stay."""
        log_alpha = self.log_alpha(model, units)
        if self.masks:
            return stretched(log_alpha.sigmoid()).clamp(FLOOR, 1)
        if not self.acting:
            return 1 + 0 * log_alpha  # several processes need every parameter in the graph
        return hard_concrete(log_alpha, self.noise[units.name])

    def log_alpha(self, model: "nn.Module", units: Units) -> Tensor:
        """log α of each unit, [units]."""
        return self.options.speed * model.get_parameter(gate_name(units))

    def penalty(self, step: int, learner: Learner) -> Tensor | None:
        """λ g + ρ/2 g² of every kind, while gates are random."""
        if not self.gambling:
            return None
        total = torch.zeros((), device=next(learner.model.parameters()).device)
        for kind, group in by_kind(self.units):
            gap = self.options.target(step) - self.expected(learner.model, group)
            total = total + self.multipliers[kind] * gap + self.options.pressure / 2 * gap.square()
        return total

    def expected(self, model: "nn.Module", group: list[Units]) -> Tensor:
        """The share of gates that is closed, on average, with its graph."""
        return 1 - torch.cat([open_share(self.log_alpha(model, units)) for units in group]).mean()

    def before_step(self, step: int, learner: Learner) -> bool:
        """The multipliers climb."""
        if self.gambling:
            with torch.no_grad():
                for kind, group in by_kind(self.units):
                    gap = self.options.target(step) - self.expected(learner.model, group)
                    self.multipliers[kind] += CLIMB * self.options.pressure * gap
        return True

    def after_step(self, step: int, learner: Learner) -> None:
        """At the end of its time, let the gates expect what was asked for, and settle which units stay."""
        if step != self.options.end:
            return
        with torch.no_grad():
            for kind, group in by_kind(self.units):
                self.learned[kind] = float(self.expected(learner.model, group))
                self.shift(learner.model, group)
                self.closed[kind] = float(self.expected(learner.model, group))
                stay = chosen({units.name: self.log_alpha(learner.model, units) for units in group}, self.options.ratio)
                for units in group:
                    units.mask(self.masks, stay[units.name])

    def shift(self, model: "nn.Module", group: list[Units]) -> None:
        """Add to log α of all gates of a kind what closes the share that was asked for, on average."""
        by = shift_to(torch.cat([self.log_alpha(model, units) for units in group]), 1 - self.options.ratio)
        for units in group:
            model.get_parameter(gate_name(units)).add_(by / self.options.speed)

    def finish(self, learner: Learner) -> None:
        """Multiply the gates into the weights, and take them out of the model."""
        for units, hook in zip(self.units, self.hooks, strict=True):
            units.scale_outputs(self.gates(learner.model, units).detach())
            hook.remove()
            delattr(learner.model, gate_name(units))

    def state(self) -> dict[str, Tensor]:
        """Also the multipliers, and what was expected; gates are parameters of the model."""
        mine = {f"multiplier.{kind}": value for kind, value in self.multipliers.items()}
        for name, shares in (("learned", self.learned), ("closed", self.closed)):
            mine |= {f"{name}.{kind}": torch.tensor(share, dtype=torch.float64) for kind, share in shares.items()}
        return super().state() | mine

    def load(self, state: Mapping[str, Tensor], learner: Learner) -> None:
        """Also these."""
        super().load(state, learner)
        for kind, value in self.multipliers.items():
            value.copy_(state[f"multiplier.{kind}"])
        settled = [kind for kind in self.multipliers if f"closed.{kind}" in state]
        self.learned, self.closed = (
            {kind: float(state[f"{name}.{kind}"]) for kind in settled} for name in ("learned", "closed")
        )

    def record(self) -> dict[str, Any]:
        """Also the expected share of closed gates, as they had learned it and when they were chosen."""
        return super().record() | {"learned_closed": self.learned, "expected_closed": self.closed}


def gate_name(units: Units) -> str:
    """Of the parameter."""
    return f"gate_{units.name}"


def stretched(s: Tensor) -> Tensor:
    """From (0, 1) to (γ, ζ)."""
    return s * (HIGH - LOW) + LOW


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    """z of log α and uniform u in (0, 1), of one shape."""
    u = u.clamp(1e-6, 1 - 1e-6)
    return stretched(((u.logit() + log_alpha) / BETA).sigmoid()).clamp(0, 1)


def shift_to(log_alpha: Tensor, share: float) -> float:
    """What to add to log α [gates] so that a `share` of them is open on average; by bisection, as it only grows."""
    low, high = -100.0, 100.0
    values = log_alpha.double()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(open_share(values + middle).mean()) < share else (low, middle)
    return (low + high) / 2


def open_share(log_alpha: Tensor) -> Tensor:
    """P(z > 0)."""
    return (log_alpha - BETA * log(-LOW / HIGH)).sigmoid()


def by_kind(units: list[Units]) -> "Iterator[tuple[str, list[Units]]]":
    """The units of each kind."""
    for kind in dict.fromkeys(each.kind for each in units):
        yield kind, [each for each in units if each.kind == kind]


def chosen(log_alpha: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Which units of each group [units] stay, bool, by one ranking; of a group with several the best stays anyway."""
    total = sum(map(len, log_alpha.values()))
    scores = {name: values.clone() for name, values in log_alpha.items()}
    for values in scores.values():
        if len(values) > 1:
            values[values.argmax()] = torch.inf
    return best_of_all(scores, total - round(ratio * total))
