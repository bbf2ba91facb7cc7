"""Methods: what all of them promise, and each one's own arithmetic against a plain reference in float64."""

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.errors import NumericalError
from llmcompress.grid import IntGrid, fit_range
from llmcompress.methods import METHODS, IntMethod, sparsegpt, sweep
from llmcompress.methods.awq import AWQ, diagonal_blocks, normalized, per_row
from llmcompress.methods.gptq import GPTQ
from llmcompress.methods.hqq import HQQ
from llmcompress.methods.rtn import RTN
from llmcompress.methods.sweep import reversed_factor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUANTIZERS = [name for name, cls in METHODS.items() if issubclass(cls, IntMethod)]
IN = 128
BITS = (2, 3, 4, 8)
kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
all_bits = pytest.mark.parametrize("bits", BITS, ids="{}bits".format)
orders = pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "natural order"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_matrix(features: int = IN, seed: int = 0, mix: float = 0.3) -> Tensor:
    """Second moment of correlated inputs with loud channels; well conditioned, with eight tokens per feature."""
    x = normal(8 * features, features, seed=seed).double()
    x += mix * x @ normal(features, features, seed=seed + 1).double()
    x[:, :: features // 8] *= 4
    gram = x.T @ x / len(x)
    return ((gram + gram.T) / 2).float()


def make(name: str, **options: Any) -> IntMethod:
    method = METHODS[name].parse(options, name)
    assert isinstance(method, IntMethod)
    return method


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    delta = values.double() - weight.double()
    return float((delta @ gram.double() * delta).sum())


# what every method promises


@kinds
@pytest.mark.parametrize("group_size", [32, "row"], ids="g{}".format)
@all_bits
@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract(name, bits, group_size, symmetric):
    """Values are decoded codes on a grid of the asked kind; same bytes again; arguments unchanged; rows independent."""
    method = make(name, bits=bits, group_size=group_size, symmetric=symmetric)
    weight, gram = normal(6, 96), gram_matrix(96) if method.needs else None
    before = weight.clone(), None if gram is None else gram.clone()
    result = method.compress(weight, gram, FP16)
    grid, codes = result.grid, result.codes
    assert (grid.bits, grid.symmetric, grid.group) == (bits, symmetric, 96 if group_size == "row" else group_size)
    assert grid.scale.dtype == result.values.dtype == FP16
    assert result.values.shape == codes.shape == weight.shape
    assert int(codes.max()) < 2**bits
    assert torch.equal(result.values, grid.decode(codes))
    assert torch.equal(grid.encode(result.values), codes)
    assert torch.equal(weight, before[0])
    assert gram is None or torch.equal(gram, before[1])
    assert torch.equal(result.values, method.compress(weight, gram, FP16).values)
    parts = [method.compress(rows, gram, FP16).values for rows in weight.split([2, 4])]
    assert torch.equal(result.values, torch.cat(parts))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_are_in_the_dtype_of_the_checkpoint(name, dtype):
    result = make(name).compress(normal(4, IN), gram_matrix(), dtype)
    assert result.values.dtype == result.grid.scale.dtype == dtype


@kinds
@pytest.mark.parametrize("name", QUANTIZERS)
def test_zero_weights_stay_zero(name, symmetric):
    """A whole matrix of zeros, and a group of zeros between others."""
    method, gram = make(name, symmetric=symmetric, act_order=False) if name == "gptq" else make(name), gram_matrix()
    assert not method.compress(torch.zeros(3, IN), gram, BF16).values.any()
    weight = normal(3, IN)
    weight[:, 64:] = 0
    if name == "gptq":
        gram = torch.eye(IN)  # so that no error moves into the zeros
    assert not method.compress(weight, gram, BF16).values[:, 64:].any()


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if METHODS[name].needs])
def test_methods_that_need_data_say_so(name):
    with pytest.raises(ValueError, match=f"{name} needs statistics: InputGram"):
        make(name).compress(normal(2, IN), None, BF16)


# rtn


@kinds
@pytest.mark.parametrize("search", ["minmax", "search"])
def test_rtn_takes_the_nearest_point(search, symmetric):
    weight = normal(4, IN)
    result = RTN(bits=3, range=search, symmetric=symmetric).compress(weight, None, FP32)
    scale, zero = (t.double()[..., None] for t in (result.grid.scale, result.grid.zero))
    points = (torch.arange(8) - zero) * scale  # [out, groups, 8]
    distance = (weight.double().reshape(4, -1, 64, 1) - points[:, :, None]).abs()  # [out, groups, 64, 8]
    chosen = distance.gather(-1, result.codes.long().reshape(4, -1, 64, 1))[..., 0]
    assert bool((chosen <= distance.amin(-1) + 1e-6).all())


def test_rtn_search_lowers_the_error():
    weight = normal(16, IN) ** 3
    errors = {
        search: output_error(weight, RTN(bits=3, range=search).compress(weight, None, FP32).values, torch.eye(IN))
        for search in ("minmax", "search")
    }
    assert errors["search"] < errors["minmax"]


# gptq


def positions(weight: Tensor, gram: Tensor, codes: Tensor, grid: IntGrid, damp: float, act_order: bool) -> Tensor:
    """Where each weight stood on the grid when its turn came, given the codes of the columns before it.

    Optimal Brain Quantization on the whole inverse, one column at a time in float64, with no Cholesky factor and no
    blocks: after column j is fixed, row and column j are eliminated from the inverse.
    """
    g, w = gram.double(), weight.double().clone()
    dead = g.diagonal() == 0
    mean = g.diagonal().mean()
    inverse = torch.linalg.inv(g + torch.diag(dead * mean) + damp * mean * torch.eye(len(g)))
    w[:, dead] = 0
    scale, zero = (t.double().repeat_interleave(grid.group, 1) for t in (grid.scale, grid.zero))
    at = torch.empty_like(w)
    for j in g.diagonal().argsort(descending=True, stable=True) if act_order else range(len(g)):
        at[:, j] = w[:, j] / scale[:, j] + zero[:, j]
        error = (w[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse -= inverse[:, j, None] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1  # never used again; its row is zero otherwise
    return at


@orders
@pytest.mark.parametrize("group_size", [32, "row"], ids="g{}".format)
@kinds
@pytest.mark.parametrize("bits", [2, 4, 8], ids="{}bits".format)
def test_gptq_follows_the_paper(bits, symmetric, group_size, act_order):
    """Every code is the nearest to where exact elimination puts the weight, up to a thousandth of a step."""
    method = GPTQ(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    weight, gram = normal(5, 96), gram_matrix(96)
    result = method.compress(weight, gram, FP32)
    at = positions(weight, gram, result.codes, result.grid, method.damp, act_order)
    assert bool(((at.clamp(0, 2**bits - 1) - result.codes).abs() <= 0.5 + 1e-3).all())
    assert bool((at.round().clamp(0, 2**bits - 1) == result.codes).double().mean() > 0.99)


@pytest.mark.parametrize("search", ["minmax", "search"])
def test_gptq_fixes_its_grid_from_the_original_weights(search):
    weight, gram = normal(5, IN), gram_matrix()
    grid = GPTQ(range=search).compress(weight, gram, BF16).grid
    expected = fit_range(
        weight, bits=4, group=64, symmetric=True, dtype=BF16, search=search == "search", importance=gram.diagonal()
    )
    assert torch.equal(grid.scale, expected.scale)
    assert torch.equal(grid.zero, expected.zero)


@orders
@kinds
@all_bits
def test_gptq_beats_rounding_on_its_own_grid(bits, symmetric, act_order):
    for seed in range(2):
        weight, gram = normal(8, IN, seed=seed), gram_matrix(seed=seed, mix=1.0)
        result = GPTQ(bits=bits, symmetric=symmetric, act_order=act_order).compress(weight, gram, FP32)
        rounded = result.grid.decode(result.grid.encode(weight))
        assert output_error(weight, result.values, gram) < output_error(weight, rounded, gram)


@orders
@kinds
def test_gptq_without_correlation_is_rounding(symmetric, act_order):
    """With the identity as Gram matrix no column can absorb another's error."""
    weight = normal(8, IN)
    result = GPTQ(symmetric=symmetric, act_order=act_order).compress(weight, torch.eye(IN), BF16)
    assert torch.equal(result.codes, result.grid.encode(weight))


def test_gptq_keeps_nothing_alive():
    """Matrices must go when the call returns, not when the garbage collector comes: they are most of a run's memory."""
    weight, gram = normal(10, IN), gram_matrix()

    def tensors() -> int:
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        GPTQ().compress(weight, gram, FP32)
        assert tensors() == before
    finally:
        gc.enable()


def test_gptq_blocks_and_row_chunks_are_only_for_speed(monkeypatch):
    weight, gram = normal(10, IN), gram_matrix()
    method = GPTQ(group_size="row")
    whole = method.compress(weight, gram, FP32).values
    monkeypatch.setattr(sparsegpt, "SWEPT", 3 * IN)
    monkeypatch.setattr(sweep, "LEAF", 7)
    monkeypatch.setattr(sweep, "SMALL", 5)
    torch.testing.assert_close(method.compress(weight, gram, FP32).values, whole)


@orders
def test_gptq_dead_inputs_get_zero_and_disturb_nothing(act_order):
    """What stands in columns whose input was always zero does not matter to any value, range or code."""
    gram, weight, dead = gram_matrix(), normal(5, IN), torch.zeros(IN, dtype=torch.bool)
    dead[[0, 5, 17, 64]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    method = GPTQ(act_order=act_order)
    result = method.compress(weight, gram, BF16)
    assert not result.values[:, dead].any()
    assert result.values[:, ~dead].any(0).all()
    assert torch.equal(result.values, method.compress(weight + 100 * dead, gram, BF16).values)


def test_gptq_of_a_layer_that_saw_only_zeros_is_zero():
    assert not GPTQ().compress(normal(5, IN), torch.zeros(IN, IN), BF16).values.any()


def test_gptq_singular_gram_of_few_tokens():
    """Ten tokens for 128 inputs: damping makes the matrix definite, and the few outputs are kept well."""
    x = normal(10, IN)
    weight, gram = normal(5, IN), x.T @ x / 10
    result = GPTQ().compress(weight, gram, FP32)
    rounded = result.grid.decode(result.grid.encode(weight))
    assert output_error(weight, result.values, gram) < 0.1 * output_error(weight, rounded, gram)


def indefinite(smallest: float) -> Tensor:
    """A Gram matrix with mean diagonal near 1 and one eigenvalue at `smallest`."""
    q = torch.linalg.qr(normal(IN, IN).double()).Q
    values = torch.linspace(0.5, 1.5, IN).double()
    values[0] = smallest
    return (q * values @ q.T).float()


@pytest.mark.parametrize("smallest", [-0.05, -0.5, -5.0], ids="eigenvalue {}".format)
def test_gptq_raises_the_damping_until_it_works(smallest):
    gram, order = indefinite(smallest), torch.arange(IN)
    u = reversed_factor(gram, order, 0.01).flip(0, 1).double()
    assert bool(u.isfinite().all())
    assert torch.equal(u, u.triu())
    added = torch.linalg.inv(u.T @ u) - gram.double()
    shift = float(added.diagonal().mean())
    assert shift > -smallest
    torch.testing.assert_close(added, shift * torch.eye(IN).double(), rtol=0, atol=1e-2 * shift)
    assert bool(GPTQ().compress(normal(5, IN), gram, BF16).values.isfinite().all())


def test_gptq_uses_the_damping_asked_for_where_that_is_enough():
    gram, order = gram_matrix(), gram_matrix().diagonal().argsort(descending=True)
    u = reversed_factor(gram, order, 0.02).flip(0, 1).double()
    damped = gram.double()[order[:, None], order] + 0.02 * gram.double().diagonal().mean() * torch.eye(IN)
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(IN).double(), rtol=0, atol=1e-4)


HOPELESS = {
    "nan": torch.full((IN, IN), torch.nan),
    "one nan": gram_matrix().index_put((torch.tensor([3]), torch.tensor([3])), torch.tensor(torch.nan)),
    "infinite": torch.full((IN, IN), torch.inf),
    "negative definite": -gram_matrix(),
    "far from definite": indefinite(-100.0),
}


@pytest.mark.parametrize("gram", HOPELESS.values(), ids=HOPELESS)
def test_gptq_never_falls_back_silently(gram):
    with pytest.raises(NumericalError, match=r"128 inputs is not positive definite.*raise `damp`.*`keep`"):
        GPTQ().compress(normal(5, IN), gram, BF16)


# awq


def scaled_rounding_error(w: Tensor, gram: Tensor, s: Tensor, method: AWQ) -> float:
    """Output error of min-max rounding w diag(s) on a bf16 scale and undoing s, in float64."""
    scaled = w * s
    grid = fit_range(
        scaled, bits=method.bits, group=method.group(IN), symmetric=method.symmetric, dtype=BF16, search=False
    )
    scale, zero = (t.double().repeat_interleave(grid.group, 1) for t in (grid.scale, grid.zero))
    return output_error(w, (grid.encode(scaled) - zero) * scale / s.double(), gram)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.sampled_from(BITS), symmetric=st.booleans(), duo=st.booleans())
def test_awq_scale_is_never_worse_than_none(seed, bits, symmetric, duo):
    method = AWQ(bits=bits, symmetric=symmetric, duo=duo, grid_points=8)
    weights, gram = [normal(4, IN, seed=seed), normal(6, IN, seed=seed + 1)], gram_matrix(seed=seed)
    index = torch.arange(IN)
    scale = method.link_scale(weights, gram, index, BF16)
    assert bool((scale > 0).all())
    found, none = (scaled_rounding_error(torch.cat(weights), gram, s, method) for s in (scale, torch.ones(IN)))
    assert found <= none * (1 + 1e-4)


def test_awq_scale_protects_loud_channels():
    weights, gram = [normal(16, IN)], gram_matrix()
    gram[7] *= 30
    gram[:, 7] *= 30
    method = AWQ(bits=3)
    scale = method.link_scale(weights, gram, torch.arange(IN), BF16)
    found, none = (scaled_rounding_error(weights[0], gram, s, method) for s in (scale, torch.ones(IN)))
    assert found < 0.8 * none
    assert int(scale.argmax()) == 7


def test_awq_returns_the_best_of_its_candidates():
    method, w, gram, index = AWQ(bits=3, grid_points=5), normal(8, IN), gram_matrix(), torch.arange(IN)
    x = gram.diagonal().sqrt()
    groups = w.abs().reshape(8, 2, 64)
    size = (groups / groups.amax(-1, keepdim=True)).reshape(8, IN).mean(0)
    candidates = [torch.ones(IN)]
    for r in (0.2, 0.4, 0.6, 0.8, 1.0):
        candidates += [normalized(x**r)] + [normalized(x**r / size ** (1 - r))] * (r < 1)
    best = min(scaled_rounding_error(w, gram, s, method) for s in candidates)
    found = scaled_rounding_error(w, gram, method.link_scale([w], gram, index, BF16), method)
    assert found == pytest.approx(best, rel=1e-4)


def test_awq_columns_of_one_row_share_a_factor():
    """Three query heads of 16 for each of two value heads, and value rows that start at 10."""
    heads = torch.arange(6)[:, None] // 3 * 16 + torch.arange(16)
    index, method = 10 + heads.flatten(), AWQ(bits=3, group_size=32)
    gram = gram_matrix(96)
    w = normal(8, 96)
    scale = method.link_scale([w], gram, index, BF16)
    assert scale.shape == (42,)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    spread = scale[index].reshape(2, 3, 16)
    assert bool((spread == spread[:, :1]).all())
    assert scale[10:].unique().numel() > 1


def test_per_row_is_the_mean_over_a_rows_columns():
    found = per_row(torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([1, 3, 1, 3]), 4)
    assert found.tolist() == [0, 2, 0, 6]


@pytest.mark.parametrize("dead", [[3], list(range(64)), list(range(IN))], ids=["one", "a group", "all"])
def test_awq_dead_channels_keep_scales_finite(dead):
    gram, w = gram_matrix(), normal(8, IN)
    gram[dead] = 0
    gram[:, dead] = 0
    method = AWQ(bits=3)
    scale = method.link_scale([w], gram, torch.arange(IN), BF16)
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    assert float(scale.max() / scale.min()) < 1e6
    assert bool(method.compress(w * scale, gram / scale / scale[:, None], BF16).values.isfinite().all())


def test_awq_zero_columns_keep_scales_finite():
    w = normal(8, IN)
    w[:, :70] = 0
    scale = AWQ().link_scale([w], gram_matrix(), torch.arange(IN), BF16)
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())


def test_awq_clip_lowers_the_error_of_each_group():
    w, gram = normal(8, IN) ** 3, gram_matrix()
    values = {clip: AWQ(bits=3, clip=clip).compress(w, gram, FP32).values for clip in (True, False)}
    for i in (0, 64):
        here = slice(i, i + 64)
        error = [output_error(w[:, here], values[clip][:, here], gram[here, here]) for clip in (True, False)]
        assert error[0] < error[1]


def test_diagonal_blocks():
    gram = torch.arange(36.0).reshape(6, 6)
    assert torch.equal(diagonal_blocks(gram, 2), torch.stack([gram[i : i + 2, i : i + 2] for i in (0, 2, 4)]))


# hqq


def p_errors(w: Tensor, grid: IntGrid, p: float) -> Tensor:
    """sum |w - value|^p of every group [out, groups], in float64."""
    scale, zero = (t.double().repeat_interleave(grid.group, 1) for t in (grid.scale, grid.zero))
    delta = w.double() - (grid.encode(w) - zero) * scale
    return delta.abs().pow(p).reshape(len(w), -1, grid.group).sum(-1)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    power=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, "row"]),
)
def test_hqq_is_never_worse_than_its_start(seed, bits, symmetric, power, group_size):
    w = normal(4, IN, seed=seed) ** power
    method = HQQ(bits=bits, symmetric=symmetric, group_size=group_size)
    grid = method.compress(w, None, BF16).grid
    start = fit_range(w, bits=bits, group=grid.group, symmetric=symmetric, dtype=BF16)
    assert bool((p_errors(w, grid, method.p) <= p_errors(w, start, method.p) * (1 + 1e-4)).all())


@kinds
def test_hqq_improves_heavy_tails(symmetric):
    w = normal(16, IN) ** 3
    grid = HQQ(symmetric=symmetric).compress(w, None, BF16).grid
    start = fit_range(w, bits=4, group=64, symmetric=symmetric, dtype=BF16)
    assert float(p_errors(w, grid, 0.7).sum()) < float(p_errors(w, start, 0.7).sum())


def test_hqq_one_iteration_is_rounding_with_searched_ranges():
    w = normal(4, IN)
    one = HQQ(iterations=1).compress(w, None, BF16)
    assert torch.equal(one.values, RTN(range="search").compress(w, None, BF16).values)


# dtype extremes


@kinds
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("size", [1e-9, 3e4], ids="{:g}".format)
def test_fp16_extremes_stay_finite(size, name, symmetric):
    """Scales that underflow half precision, and weights of half its largest number."""
    w = normal(4, IN).clamp(-1, 1) * size
    result = make(name, symmetric=symmetric).compress(w, gram_matrix(), FP16)
    assert bool(result.values.isfinite().all())
    assert bool((result.grid.scale > 0).all())
    assert not symmetric or bool((result.grid.zero == 8).all())
