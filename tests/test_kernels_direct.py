"""Calls without torch's dispatcher: only where nobody would miss them, with the same results, and checked once."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import int4_weight
from llmcompress_kernels import (
    direct,
    from_sparse24,
    from_sparse24_int4,
    int4_gated_mlp,
    int4_linear,
    int4_lora_linear,
    sparse24_int4_linear,
    sparse24_linear,
    teal_linear,
)
from llmcompress_kernels.direct import may_call_directly
from sparse24_cases import stored_sparse24, stored_sparse24_int4
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BF16 = torch.bfloat16
GENERATOR = torch.Generator().manual_seed(0)
GATE, UP = (int4_weight(24, 96, 32, True, BF16, GENERATOR) for _ in range(2))
A, B, COLUMNS = (torch.randn(*shape, generator=GENERATOR).to(BF16) for shape in ((4, 96), (24, 4), (96, 24)))
SPARSE = from_sparse24(*stored_sparse24(24, 96, BF16, GENERATOR)[:2])
SPARSE_INT4 = from_sparse24_int4(*stored_sparse24_int4(24, 96, 32, BF16, GENERATOR)[:3])
X = torch.randn(2, 96, generator=GENERATOR).to(BF16)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "int4_linear": lambda x: int4_linear(x, *GATE),
    "int4_gated_mlp": lambda x: int4_gated_mlp(x, GATE, UP),
    "int4_lora_linear": lambda x: int4_lora_linear(x, GATE, A, B, 0.5),
    "sparse24_linear": lambda x: sparse24_linear(x, *SPARSE),
    "sparse24_int4_linear": lambda x: sparse24_int4_linear(x, *SPARSE_INT4),
    "teal_linear": lambda x: teal_linear(x, COLUMNS, 0.5),
}
operators = pytest.mark.parametrize("name", CALLS)


class Seen(TorchDispatchMode):
    """Names of the operators that torch has dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_this_torch_says_who_watches():
    """If it no longer does, calls take longer: find out how it is asked now."""
    assert direct.watchers() is not None
    assert may_call_directly(X)


@operators
def test_a_mode_sees_the_operator(name):
    expected = CALLS[name](X)
    with Seen() as seen:
        assert not may_call_directly(X)
        found = CALLS[name](X)
    assert f"llmcompress::{name}" in seen.names
    assert torch.equal(found, expected)


@operators
def test_a_torch_that_does_not_say_takes_the_long_way(name, monkeypatch):
    """And what it computes is the same."""
    calls: list[Tensor] = []
    module = importlib.import_module(f"llmcompress_kernels.{name}")
    operator = getattr(module, f"_{name}")

    def counted(*args: Any) -> Tensor:
        calls.append(args[0])
        return operator(*args)

    expected = CALLS[name](X)
    monkeypatch.setattr(module, f"_{name}", counted)
    CALLS[name](X)
    assert not calls
    monkeypatch.setattr(direct, "torch", SimpleNamespace(**vars(torch) | {"_C": SimpleNamespace()}))
    direct.watchers.cache_clear()
    try:
        assert direct.watchers() is None
        assert torch.equal(CALLS[name](X), expected)
        assert len(calls) == 1
    finally:
        direct.watchers.cache_clear()


def test_what_wants_the_dispatcher():
    seen: list[bool] = []

    def note(x: Tensor) -> Tensor:
        seen.append(may_call_directly(x))
        return x

    torch.vmap(note)(torch.zeros(2, 3))
    note(X.to("meta"))
    note(torch.nn.Parameter(X))
    assert seen == [False] * 3
    weight = COLUMNS.clone().requires_grad_()
    assert not may_call_directly(X, weight)
    with torch.no_grad():
        assert may_call_directly(X, weight, None)


@operators
def test_a_gradient_is_refused_not_left_out(name):
    """The first parameter of a model wants one as a rule, so that alone is no error."""
    x = X.clone().requires_grad_()
    y = CALLS[name](x)
    assert torch.equal(y, CALLS[name](X))
    with pytest.raises(RuntimeError, match=f"llmcompress::{name}: a backward pass came to it, and it has no gradient"):
        y.float().sum().backward()


@pytest.mark.parametrize(("name", "weights"), [("int4_gated_mlp", 2), ("int4_lora_linear", 1)])
def test_arguments_are_checked_once(name, weights, monkeypatch):
    """By the quick check, and by no other when they fit."""
    module = importlib.import_module(f"llmcompress_kernels.{name}")
    calls: list[Tensor] = []

    def counted(x: Tensor, *rest: Any) -> bool:
        calls.append(x)
        return fits(x, *rest)

    fits = module.fits
    linear = importlib.import_module("llmcompress_kernels.int4_linear")
    for each in (module, linear):
        monkeypatch.setattr(each, "fits", counted)
    for each in (module, linear):
        monkeypatch.setattr(each, "check_place", None)
    CALLS[name](X)
    assert len(calls) == weights
