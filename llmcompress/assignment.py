"""Which steps of a recipe a linear gets, whether they compose and fit its shape, and its share of their budgets."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

from llmcompress.budget import erk_densities
from llmcompress.errors import PlanError
from llmcompress.mask import Pattern
from llmcompress.methods import Budgeted, IntMethod, Method
from llmcompress.recipe import Step, matches
from llmcompress.weight import Kind

GROUPS = (128, 64, 32)


def assign(names: Iterable[str], steps: list[Step], keep: list[str]) -> dict[str, tuple[int, ...]]:
    """Linear -> indices of its steps. Every target must match something, and the steps of a linear must compose."""
    assigned: dict[str, tuple[int, ...]] = {}
    for name in names:
        mine = tuple(i for i, step in enumerate(steps) if step.matches(name) and not matches(name, keep))
        check_sequence(name, mine, steps)
        assigned[name] = mine
    for i, step in enumerate(steps):
        for target in step.targets:
            if not any(matches(name, [target]) for name in assigned):
                some = ", ".join(list(assigned)[:3])
                raise PlanError(
                    f"{step.where}.targets: {target!r} matches no linear of the decoder blocks (such as {some})"
                )
        if not any(i in mine for mine in assigned.values()):
            raise PlanError(f"{step.where}: `keep` {keep} leaves nothing for this step to do")
    return assigned


def check_sequence(name: str, mine: tuple[int, ...], steps: list[Step]) -> None:
    """A linear is pruned once at most, then quantized once at most."""
    for i, j in pairwise(mine):
        first, second = (f"{steps[k].where} ({steps[k].name})" for k in (i, j))
        quantized, prunes = isinstance(steps[i].method, IntMethod), steps[j].method.prunes
        if quantized and not isinstance(steps[j].method, IntMethod):
            raise PlanError(f"{name}: {second} would prune what {first} has quantized; put the pruning step first")
        if quantized:
            raise PlanError(f"{name}: {first} and {second} both quantize it; give them `targets` that do not overlap")
        if prunes:
            raise PlanError(
                f"{name}: {first} has pruned it to pattern {steps[i].method.prunes}, and {second} would prune it to "
                f"{prunes}; give them `targets` that do not overlap"
            )


def methods_by_linear(
    steps: list[Step], assigned: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Method, ...]]:
    """The methods of every linear that has any, with what is known now of its share of a budget."""
    budgets = [
        spread_budget(step, {name: shapes[name] for name in shapes if i in assigned[name]})
        for i, step in enumerate(steps)
    ]
    found = {}
    for name, mine in assigned.items():
        for i in mine:
            check_shape(name, shapes[name][1], steps[i].method, steps[i].where)
        if mine:
            found[name] = tuple(budgets[i].get(name, steps[i].method) for i in mine)
    return found


def earlier_patterns(
    said: Mapping[str, tuple[str, float]], steps: list[Step], assigned: Mapping[str, tuple[int, ...]]
) -> dict[str, Kind]:
    """Pattern and sparsity of every linear that an earlier run has pruned; said: by its manifest.

    Raises PlanError if a step would prune one to another pattern.
    """
    found = {}
    for name in said.keys() & assigned.keys():
        try:
            before = Pattern.parse(said[name][0])
        except ValueError:  # of a version that knows more patterns: its zeros are kept all the same
            continue
        found[name] = Kind(pattern=before, sparsity=said[name][1])
        for i in assigned[name]:
            asked = steps[i].method.prunes
            if asked and asked != before:
                raise PlanError(
                    f"{name}: an earlier run has pruned it to pattern {before}, and {steps[i].where} ({steps[i].name}) "
                    f"would prune it to {asked}; start from the dense model, or set pattern: {str(before)!r}"
                )
    return found


def kind_after(methods: tuple[Method, ...], before: Kind | None = None) -> Kind:
    """Of a linear after these methods; before: what an earlier run has made of it."""
    return Kind.after([before or Kind(), *(method.kind for method in methods)])


def check_shape(name: str, columns: int, method: Method, where: str) -> None:
    """Groups and patterns must divide the row."""
    pattern = method.prunes
    if pattern and columns % pattern.m:
        fitting = [f"{max(1, m // 2)}:{m}" for m in (16, 8, 4, 2) if columns % m == 0]
        raise PlanError(
            f"{name}: {columns} input columns are not divisible by the {pattern.m} of {where}.pattern "
            f"{str(pattern)!r}; try {' or '.join(['row', *fitting])}, or add the tensor to `keep`"
        )
    if isinstance(method, IntMethod) and columns % method.group(columns):
        fitting = [str(size) for size in GROUPS if columns % size == 0] + ["row"]
        raise PlanError(
            f"{name}: {columns} input columns are not divisible by {where}.group_size {method.group_size}; "
            f"try group_size: {' or '.join(fitting)}, or add the tensor to `keep`"
        )


def needs_data(method: Method) -> bool:
    """Whether a method, or its budget, gathers anything from calibration data."""
    return method.needs is not None or bool(method.survey - {"weights"})


def spread_budget(step: Step, shapes: dict[str, tuple[int, int]]) -> dict[str, Method]:
    """The step's method for each linear that has its own sparsity already now: by `overrides`, or by shape."""
    method = step.method
    if not isinstance(method, Budgeted):
        return {}
    shares: dict[str, float] = {}
    for glob, share in method.overrides.items():
        found = [name for name in shapes if matches(name, [glob])]
        if not found:
            raise PlanError(f"{step.where}.overrides: {glob!r} matches no linear of this step")
        shares |= dict.fromkeys(found, share)
    if method.budget == "erk":
        density = erk_densities({name: shape for name, shape in shapes.items() if name not in shares}, method.share)
        shares |= {name: max(0.0, 1.0 - found) for name, found in density.items()}
    return {name: method.model_copy(update={"sparsity": share}) for name, share in shares.items()}
