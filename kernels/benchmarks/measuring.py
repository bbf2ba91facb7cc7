"""Correctness and time of operators, case by case, within a time budget; gpu.py makes the report of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cases import OPERATORS, Operator
from layers import GROUP, TOKENS, Shape
from peers import Implementation
from timing import Run, copies, medians, rounds, size
from torch import Tensor

WRONG = 2.0  # times the error of torch in bfloat16, above which an operator is wrong
WRONG_BASELINE = 10.0  # the same for baselines, whose scales and sums may be rounded more often


@dataclass(frozen=True)
class Check:
    """Weights on which results are compared with float64. Baselines take only symmetric groups of GROUP."""

    rows: int
    columns: int
    group: int
    symmetric: bool

    def has_baselines(self) -> bool:
        return self.group == GROUP and self.symmetric


@dataclass(frozen=True)
class Plan:
    """How much is measured; `shapes` None: those of each operator."""

    device: torch.device
    cache_bytes: int  # of the last level of cache
    samples: int = 7
    copy_bytes: int = 1 << 30
    tokens: tuple[int, ...] = TOKENS
    checks: tuple[Check, ...] = (Check(70, 1056, 32, False), Check(66, 576, 64, True), Check(2048, 2048, GROUP, True))
    checked_tokens: tuple[int, ...] = (1, 3, 17, 64, 256, 300)  # each kernel, full tiles and others
    shapes: tuple[Shape, ...] | None = None


class Clock:
    """The time that is left, and whether a next case fits: it may take twice as long as the slowest of late."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()
        self.lately: list[float] = []

    def used(self) -> float:
        return time.monotonic() - self.start

    def has_room(self) -> bool:
        return self.used() + 2 * max(self.lately, default=0.0) < self.seconds

    def note(self, seconds: float) -> None:
        """A case took so long."""
        self.lately = [*self.lately[-7:], seconds]


@dataclass(frozen=True)
class Failure:
    """What went wrong in an implementation; others are measured all the same, and the report says it."""

    why: str


@dataclass
class Findings:
    """What becomes of the cases."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)


def attempt(action: Callable[[], Any]) -> Any:
    """What `action` returns, or the Failure that it is."""
    try:
        return action()
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")


def check(operator: Operator, what: Plan) -> Iterator[dict[str, Any]]:
    """Errors of an operator and its baselines against float64. The first baseline, in bfloat16, sets the limit."""
    dense = operator.baselines[0]
    for case in what.checks:
        generator = torch.Generator(what.device).manual_seed(case.rows)
        symmetric = case.symmetric or not operator.zeros
        weights = operator.make(case.rows, case.columns, case.group, symmetric, generator)
        others = operator.baselines if case.has_baselines() else (dense,)
        ready = {made: attempt(partial(made.prepare, weights)) for made in usable((operator.ours, *others), what)}
        for tokens in what.checked_tokens:
            x = torch.randn(tokens, case.columns, generator=generator, device=what.device).to(torch.bfloat16)
            truth = operator.truth(x, weights)
            limit = error(dense, x, ready[dense], truth)
            for made, prepared in ready.items():
                found = attempt(partial(error, made, x, prepared, truth))
                allowed = (WRONG if made is operator.ours else WRONG_BASELINE) * limit
                row = {"operator": operator.name, "name": made.name, "rows": case.rows, "columns": case.columns,
                       "group": case.group, "symmetric": symmetric, "tokens": tokens}  # fmt: skip
                if isinstance(found, Failure):
                    yield row | {"failed": found.why, "right": False}
                else:
                    yield row | {"error": found, "torch_error": limit, "right": found <= allowed}


def prepared_copies(made: Implementation, weights: Any, cache_bytes: int) -> list[Any]:
    """What an implementation makes of the weights, as often as its time is measured on."""
    return copies(made.prepare(weights), cache_bytes)


def usable(wanted: Sequence[Implementation], what: Plan) -> list[Implementation]:
    """Those which can run on the device."""
    return [made for made in wanted if not made.missing(what.device)]


def error(made: Implementation, x: Tensor, prepared: Any, truth: Tensor) -> float:
    """Root mean square of the difference from the truth over that of the truth; NaN if anything is NaN."""
    if isinstance(prepared, Failure):
        raise RuntimeError(prepared.why)
    y = made.call(x.to(made.dtype), prepared).double()
    return float((y - truth).norm() / truth.norm())


def wrong(checks: Sequence[dict[str, Any]]) -> set[tuple[str, str]]:
    """Operator and name of the implementations that were wrong anywhere."""
    return {(row["operator"], row["name"]) for row in checks if not row["right"]}


def units(what: Plan) -> Iterator[tuple[Operator, Shape]]:
    """Operators on shapes in order of importance: large layers first, all operators on one before the next."""
    for shape in what.shapes or [shape for operator in OPERATORS[:1] for shape in operator.shapes()]:
        for operator in OPERATORS:
            if shape.parts in operator.parts:
                yield operator, shape


def measure(what: Plan, clock: Clock, copied: float, bad: set[tuple[str, str]]) -> Findings:
    """All cases that the time allows. copied: bytes per second of a copy; bad: what is not timed, from `wrong`."""
    findings = Findings()
    for operator, shape in units(what):
        if (operator.name, operator.name) in bad:
            continue
        wanted = [m for m in usable((operator.ours, *operator.baselines), what) if (operator.name, m.name) not in bad]
        unit = Unit(operator, shape, wanted, what, copied)
        unit.measure(clock, findings)
        if what.device.type == "cuda":
            torch.cuda.empty_cache()
    return findings


@dataclass
class Unit:
    """One operator on one layer, for all M."""

    operator: Operator
    shape: Shape
    wanted: list[Implementation]
    what: Plan
    copied: float

    def measure(self, clock: Clock, findings: Findings) -> None:
        """Weights are prepared once for all M."""
        ready: dict[Implementation, list[Any]] = {}
        for tokens in self.what.tokens:
            if not clock.has_room():
                findings.left_out.append(self.case(tokens))
                continue
            start = clock.used()
            if not ready:
                ready = self.prepare(findings)
            self.time(tokens, ready, findings)
            clock.note(clock.used() - start)

    def case(self, tokens: int) -> dict[str, Any]:
        shape = self.shape
        return {"operator": self.operator.name, "model": shape.model, "parts": shape.parts, "rows": shape.rows,
                "columns": shape.columns, "tokens": tokens}  # fmt: skip

    def prepare(self, findings: Findings) -> dict[Implementation, list[Any]]:
        """Copies of what each implementation makes of the weights."""
        generator = torch.Generator(self.what.device).manual_seed(1)
        weights = self.operator.make(self.shape.rows, self.shape.columns, GROUP, True, generator)
        ready = {}
        for made in self.wanted:
            got = attempt(partial(prepared_copies, made, weights, self.what.cache_bytes))
            if isinstance(got, Failure):
                findings.failures.append(self.case(0) | {"name": made.name, "why": got.why})
            else:
                ready[made] = got
        return ready

    def time(self, tokens: int, ready: dict[Implementation, list[Any]], findings: Findings) -> None:
        """Adds a result, if the operator itself runs."""
        device = self.what.device
        x = torch.randn(tokens, self.shape.columns, device=device).to(torch.bfloat16)
        runs: dict[str, Run] = {}
        for made, instances in ready.items():
            calls = [partial(made.call, x.to(made.dtype), instance) for instance in instances]
            got = attempt(partial(rounds, calls, device))
            if isinstance(got, Failure):
                findings.failures.append(self.case(tokens) | {"name": made.name, "why": got.why})
            else:
                runs[made.name] = got
        seconds = medians(runs, device, self.what.samples)
        each = {made.name: seconds[made.name] / len(i) for made, i in ready.items() if made.name in seconds}
        if (ours := each.pop(self.operator.name, None)) is not None:
            packed = ready[self.operator.ours][0]
            moved = size((packed, x, self.operator.ours.call(x, packed)))
            findings.results.append(
                self.case(tokens)
                | {"packed_bytes": size(packed), "bytes": moved, "copies": len(ready[self.operator.ours])}
                | {"seconds": ours, "share_of_copy": moved / ours / self.copied}
                | {"peers": {name: {"seconds": s, "ratio": s / ours} for name, s in each.items()}}
            )
