"""Integer grids: zero is on them, codes saturate, values are what the stored scale gives, and a search never loses."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress import grid as grid_module
from llmcompress.grid import FINER, SHRINK, IntGrid, affine, fit_range, group_error, row_chunks, snap

COLUMNS = 64
BITS = (2, 3, 4, 8)
GROUPS = (32, 64)  # 64 is the whole row
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PATTERNS = ("mixed", "positive", "negative", "zero", "outlier", "one zero group")
ids = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", True: "symmetric", False: "asymmetric"}.get
examples = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Case:
    """A weight and the kind of grid it gets."""

    w: Tensor
    bits: int
    group: int
    symmetric: bool
    dtype: torch.dtype

    def fit(self, **options: object) -> IntGrid:
        return fit_range(
            self.w, bits=self.bits, group=self.group, symmetric=self.symmetric, dtype=self.dtype, **options
        )

    def per_weight(self, per_group: Tensor) -> Tensor:
        return per_group.double().repeat_interleave(self.group, 1)


def weight(pattern: str, seed: int = 0, size: float = 1.0, rows: int = 3) -> Tensor:
    w = size * torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    if pattern == "outlier":
        w[:, ::31] *= 50
    if pattern == "one zero group":
        w[:, :32] = 0
    return {"positive": w.abs(), "negative": -w.abs(), "zero": torch.zeros_like(w)}.get(pattern, w)


cases = st.builds(
    lambda pattern, seed, exponent, *kind: Case(weight(pattern, seed, 10.0**exponent), *kind),
    st.sampled_from(PATTERNS),
    st.integers(0, 1000),
    st.integers(-3, 2),
    st.sampled_from(BITS),
    st.sampled_from(GROUPS),
    st.booleans(),
    st.sampled_from(DTYPES),
)


# what is on a grid


@pytest.mark.parametrize("symmetric", [True, False], ids=ids)
@pytest.mark.parametrize("bits", BITS, ids="{}bits".format)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zero_is_on_every_grid(pattern, bits, symmetric):
    for group, dtype in itertools.product(GROUPS, DTYPES):
        grid = Case(weight(pattern), bits, group, symmetric, dtype).fit()
        assert not grid.decode(grid.encode(torch.zeros(3, COLUMNS))).any()


@examples
@given(cases)
def test_scales_are_positive_and_stored_as_used(case):
    grid = case.fit()
    assert grid.scale.dtype == case.dtype
    assert grid.scale.shape == grid.zero.shape == (3, COLUMNS // case.group)
    assert bool((grid.scale > 0).all())
    assert grid.zero.dtype == torch.int32
    assert 0 <= int(grid.zero.min()) <= int(grid.zero.max()) < 2**case.bits
    if case.symmetric:
        assert bool((grid.zero == 2 ** (case.bits - 1)).all())


@examples
@given(cases)
def test_codes_are_in_range_and_survive_a_round_trip(case):
    grid = case.fit()
    codes = grid.encode(case.w)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**case.bits
    if case.bits < 8 or case.symmetric or case.dtype != torch.bfloat16:  # bfloat16 tells 128 steps apart, not 255
        assert torch.equal(grid.encode(grid.decode(codes)), codes)


@examples
@given(cases)
def test_minmax_error_is_half_a_step(case):
    """Beyond half a step there is only what rounding the scale and the value to the stored dtype costs."""
    grid = case.fit(search=False)
    eps, top = torch.finfo(case.dtype).eps, 2**case.bits
    # A scale below the smallest normal number is rounded to a fixed spacing instead of relative to its size.
    spacing = torch.finfo(case.dtype).smallest_normal * eps
    bound = case.per_weight(grid.scale) * (0.5 + 2 * top * eps) + top * spacing
    error = (grid.decode(grid.encode(case.w)).double() - case.w.double()).abs()
    assert bool((error <= bound).all())


@pytest.mark.parametrize("symmetric", [True, False], ids=ids)
@pytest.mark.parametrize("bits", BITS, ids="{}bits".format)
def test_encode_saturates(bits, symmetric):
    grid = Case(weight("mixed"), bits, 32, symmetric, torch.float32).fit()
    assert bool((grid.encode(torch.full((3, COLUMNS), 1e6)) == 2**bits - 1).all())
    assert bool((grid.encode(torch.full((3, COLUMNS), -1e6)) == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_decode_rounds_in_the_dtype_of_the_scale(dtype):
    """As stock engines do: code - zero and the scale as numbers of `dtype`, and their product rounded to it."""
    case = Case(weight("mixed"), 8, 32, False, dtype)
    grid = case.fit()
    codes = torch.arange(256).repeat(3)[: 3 * COLUMNS].reshape(3, COLUMNS).to(torch.uint8)
    exact = (codes.double() - case.per_weight(grid.zero)) * case.per_weight(grid.scale)
    values = grid.decode(codes)
    assert values.dtype == dtype
    assert torch.equal(values, exact.to(dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=ids)
def test_all_zero_group_gets_scale_one(symmetric):
    grid = Case(weight("one zero group"), 4, 32, symmetric, torch.bfloat16).fit()
    assert bool((grid.scale[:, 0] == 1).all())
    assert bool((grid.scale[:, 1] != 1).all())


def test_known_grid():
    """Exact cases: 2 bits, one group of four."""
    w = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    grid = fit_range(w, bits=2, group=4, symmetric=False, dtype=torch.float32, search=False)
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 1)
    assert grid.encode(w).tolist() == [[0, 1, 2, 3]]
    assert grid.decode(grid.encode(w)).tolist() == w.tolist()
    grid = fit_range(w, bits=2, group=4, symmetric=True, dtype=torch.float32, search=False)
    assert (grid.scale.item(), grid.zero.item()) == (2.0, 2)
    assert grid.encode(torch.tensor([[-9.0, -1.5, 1.5, 9.0]])).tolist() == [[0, 1, 3, 3]]


@pytest.mark.parametrize("size", [1e-30, 1e20], ids="{:g}".format)
@pytest.mark.parametrize("symmetric", [True, False], ids=ids)
def test_extreme_weights_keep_a_grid_that_holds_zero(size, symmetric):
    """Scales that underflow float16, errors whose square overflows float32: still a grid that can be stored."""
    dtype = torch.float16 if size < 1 else torch.bfloat16
    grid = Case(weight("mixed", size=size), 4, 32, symmetric, dtype).fit()
    assert bool(grid.scale.isfinite().all())
    assert bool((grid.scale > 0).all())
    assert not symmetric or bool((grid.zero == 8).all())


# the search


def importance_of(kind: str, group: int, seed: int) -> Tensor | None:
    """None, mean squares [in], or the groups' blocks [groups, group, group] of a Gram matrix."""
    x = torch.randn(80, COLUMNS, generator=torch.Generator().manual_seed(seed + 1)).double()
    x[:, ::7] *= 5
    x[:, 3] = 0
    gram = (x.T @ x / len(x)).float()
    blocks = [gram[i : i + group, i : i + group] for i in range(0, COLUMNS, group)]
    return {"weights": None, "diagonal": gram.diagonal(), "blocks": torch.stack(blocks)}[kind]


def weighted_error(case: Case, grid: IntGrid, importance: Tensor | None) -> Tensor:
    """Error of every group [rows, groups] in float64, written without the module's own function."""
    values = (grid.encode(case.w).double() - case.per_weight(grid.zero)) * case.per_weight(grid.scale)
    delta = (values - case.w.double()).reshape(3, -1, case.group)
    if importance is None:
        return delta.pow(4).sum(-1)
    if importance.ndim == 1:
        return (delta.square() * importance.double().reshape(-1, case.group)).sum(-1)
    return torch.einsum("rgi,gij,rgj->rg", delta, importance.double(), delta)


@pytest.mark.parametrize("kind", ["weights", "diagonal", "blocks"])
@examples
@given(case=cases, seed=st.integers(0, 1000))
def test_search_is_never_worse_than_minmax(kind, case, seed):
    importance = importance_of(kind, case.group, seed)
    searched = weighted_error(case, case.fit(importance=importance), importance)
    minmax = weighted_error(case, case.fit(search=False), importance)
    slack = COLUMNS * torch.finfo(torch.float32).eps  # both errors were compared as sums of float32
    assert bool((searched <= minmax * (1 + slack) + 1e-30).all())


def test_search_finds_the_best_candidate():
    """On a group with an outlier the search ends on the shrunken range with the least error of all candidates."""
    case = Case(weight("outlier"), 3, 32, True, torch.float32)
    groups = case.w.reshape(3, 2, 32)
    low, high = groups.amin(-1), groups.amax(-1)

    def error(shrink: Tensor) -> Tensor:
        scale, zero = affine(low * shrink, high * shrink, 3, True, torch.float32)
        return group_error(groups - snap(groups, scale, zero, 3), None)

    errors = torch.stack([error(torch.full_like(low, shrink)) for shrink in (1.0, *SHRINK)])
    coarse = torch.tensor((1.0, *SHRINK))[errors.argmin(0)]
    errors = torch.cat([errors, error(coarse + FINER)[None], error(coarse - FINER)[None]])
    best = errors.amin(0)
    torch.testing.assert_close(weighted_error(case, case.fit(), None).float(), best, rtol=1e-5, atol=0)
    assert bool((best < errors[0]).any())


def test_importance_moves_the_range():
    """With all weight on the small numbers, a large one is clipped away."""
    case = Case(torch.cat([torch.full((3, 63), 0.11), torch.ones(3, 1)], 1), 3, 64, True, torch.float32)
    small_only = torch.ones(64)
    small_only[-1] = 0
    assert bool((case.fit(importance=small_only).scale < case.fit(search=False).scale).all())


def test_ties_go_to_the_wider_range():
    """Where no input ever arrives every range is as good, and the widest clips nothing."""
    case = Case(weight("mixed"), 4, 32, False, torch.bfloat16)
    nothing = case.fit(importance=torch.zeros(COLUMNS))
    assert torch.equal(nothing.scale, case.fit(search=False).scale)
    assert torch.equal(nothing.zero, case.fit(search=False).zero)


# rows are independent


@examples
@given(cases)
def test_rows_are_fitted_alone(case):
    whole = case.fit()
    alone = [Case(case.w[i : i + 1], case.bits, case.group, case.symmetric, case.dtype).fit() for i in range(3)]
    assert torch.equal(whole.scale, torch.cat([grid.scale for grid in alone]))
    assert torch.equal(whole.zero, torch.cat([grid.zero for grid in alone]))


def test_chunks_of_rows_change_nothing(monkeypatch):
    case = Case(weight("mixed", rows=7), 4, 32, False, torch.bfloat16)
    whole = case.fit()
    monkeypatch.setattr(grid_module, "CHUNK", 2 * COLUMNS)
    assert [(part.start, part.stop) for part in row_chunks(case.w)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert torch.equal(whole.scale, case.fit().scale)
    assert torch.equal(whole.zero, case.fit().zero)
