"""Pruning methods: scores against a plain reference, exact counts, and masks that every later step keeps."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.mask import Pattern, follows, kept
from llmcompress.methods import METHODS, IntMethod, Method, Pruner, sparsegpt
from llmcompress.methods.base import ScoreMethod
from llmcompress.methods.sparsegpt import column_order
from llmcompress.methods.sweep import reversed_factor
from llmcompress.stats import GradientMean, GradientSquare, InputSquares

PRUNERS = [name for name, cls in METHODS.items() if issubclass(cls, Pruner)]
QUANTIZERS = [name for name, cls in METHODS.items() if issubclass(cls, IntMethod)]
SCORES = [name for name, cls in METHODS.items() if issubclass(cls, ScoreMethod)]
PATTERNS = [("row", 0.5), ("row", 0.37), ("layer", 0.6), ("2:4", None), ("1:4", None), ("4:8", None), ("block:8", 0.5)]
BF16, FP32 = torch.bfloat16, torch.float32
patterns = pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=lambda value: str(value))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_matrix(features: int, seed: int = 0) -> Tensor:
    """Second moment of correlated inputs with loud channels."""
    x = normal(6 * features, features, seed=seed)
    x = x + 0.3 * x @ normal(features, features, seed=seed + 1)
    x[:, :: max(1, features // 8)] *= 4
    return x.T @ x / len(x)


def statistics(name: str, weight: Tensor, seed: int = 0) -> Tensor:
    """What a method needs for this weight: a Gram matrix of its inputs, or a gradient of its shape."""
    if METHODS[name].needs in (GradientMean, GradientSquare):
        return normal(*weight.shape, seed=seed + 7).square()
    gram = gram_matrix(weight.shape[1], seed)
    return gram.diagonal() if METHODS[name].needs is InputSquares else gram


def make(name: str, **options: Any) -> Method:
    return METHODS[name].parse({key: value for key, value in options.items() if value is not None}, name)


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    delta = values.double() - weight.double()
    return float((delta @ gram.double() * delta).sum())


@patterns
@pytest.mark.parametrize("name", PRUNERS)
def test_contract(name, pattern, sparsity):
    """Exact counts in the asked pattern; zeros where the mask says so; same bytes again; arguments unchanged."""
    method = make(name, pattern=pattern, sparsity=sparsity)
    weight = normal(6, 160)
    gram = statistics(name, weight)
    before = weight.clone(), gram.clone()
    result = method.compress(weight, gram, BF16)
    mask, shape = result.mask, Pattern.parse(pattern)
    assert mask.dtype == torch.bool
    assert follows(mask, shape)
    share = 1 - shape.n / shape.m if sparsity is None else sparsity
    assert int(mask.sum()) == method.kind.pattern.stay(6, 160, share)
    if pattern == "layer":
        assert int(mask.sum()) == kept(weight.numel(), share)
    elif shape.kind == "n:m":
        assert bool((mask.reshape(-1, shape.m).sum(1) == shape.n).all())
    else:
        assert mask.sum(1).tolist() == [kept(160 // shape.m, share) * shape.m] * 6
    assert result.values.dtype == BF16
    assert not result.values[~mask].any()
    assert result.lost_zeros() == 0
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert torch.equal(result.values, method.compress(weight, gram, BF16).values)
    if method.stacks and name != "random":  # its numbers depend on the whole stack
        shared = gram.shape[-1] == 160 and gram.shape[0] == 160
        split = [gram, gram] if shared else gram.split([2, 4])
        rows = zip(weight.split([2, 4]), split, strict=True)
        parts = [method.compress(part, found, BF16).values for part, found in rows]
        assert torch.equal(result.values, torch.cat(parts))


@pytest.mark.parametrize("name", SCORES)
def test_scores_change_no_weight_that_stays(name):
    weight = normal(6, 64)
    result = make(name, pattern="2:4").compress(weight, statistics(name, weight), FP32)
    assert torch.equal(result.values[result.mask], weight[result.mask])


def test_scores_are_their_equations():
    """On a hand-made 4 x 8 matrix, against numpy in float64."""
    weight, gram, gradient = normal(4, 8), gram_matrix(8), normal(4, 8, seed=3).abs()
    damped = 0.01 * np.diag(gram.double().numpy()).mean() * np.eye(8)
    w, norm = np.abs(weight.double().numpy()), np.sqrt(np.diag(gram.double().numpy()))
    expected = {
        "magnitude": w,
        "wanda": w * norm,
        "ria": (w / w.sum(0, keepdims=True) + w / w.sum(1, keepdims=True)) * norm**0.5,
        "snip": w * np.abs(gradient.double().numpy()),
        "taylor": w**2 * np.abs(gradient.double().numpy()),
        "sparsegpt": w**2 / np.diag(np.linalg.inv(gram.double().numpy() + damped)),
    }
    for name, score in expected.items():
        method = make(name, pattern="2:4")
        assert isinstance(method, Pruner)
        found = {"snip": gradient, "taylor": gradient, "wanda": gram.diagonal(), "ria": gram.diagonal()}.get(name, gram)
        np.testing.assert_allclose(method.score(weight, found).numpy(), score, rtol=2e-5)


def test_random_depends_on_seed_and_weight():
    weight, other = normal(4, 32), normal(4, 32, seed=1)

    def mask(weight: Tensor, seed: int) -> Tensor:
        return make("random", sparsity=0.5, seed=seed).compress(weight, None, FP32).mask

    assert torch.equal(mask(weight, 0), mask(weight, 0))
    assert not torch.equal(mask(weight, 0), mask(weight, 1))
    assert not torch.equal(mask(weight, 0), mask(other, 0))


# sparsegpt


def reference(weight: Tensor, gram: Tensor, n: int, m: int, damp: float) -> tuple[Tensor, Tensor]:
    """Values and mask of algorithm 1 for n:m in float64, one column after another eliminated from the whole inverse."""
    w, g = weight.double().clone(), gram.double()
    inverse = torch.linalg.inv(g + damp * g.diagonal().mean() * torch.eye(len(g)))
    mask = torch.ones_like(w, dtype=torch.bool)
    conditional = []
    left = inverse.clone()
    for j in range(len(g)):  # [inverse of what is left]_jj, which the score needs before column j is reached
        conditional.append(float(left[j, j]))
        left = left - left[:, j : j + 1] @ left[j : j + 1] / left[j, j]
    for j in range(len(g)):
        if j % m == 0:
            score = w[:, j : j + m] ** 2 / torch.tensor(conditional[j : j + m])
            order = score.argsort(dim=1, descending=True, stable=True)[:, :n]
            mask[:, j : j + m] = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
        error = torch.where(mask[:, j], 0.0, w[:, j] / inverse[j, j])
        w -= error[:, None] * inverse[j]
        w[:, j] = torch.where(mask[:, j], w[:, j], 0.0)
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return w, mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_sparsegpt_follows_the_paper(n, m):
    weight, gram = normal(7, 96), gram_matrix(96)
    result = make("sparsegpt", pattern=f"{n}:{m}").compress(weight, gram, FP32)
    values, mask = reference(weight, gram, n, m, 0.01)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.values.double(), values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("act_order", [True, False])
@patterns
def test_sparsegpt_beats_its_own_mask_without_the_update(pattern, sparsity, act_order):
    weight, gram = normal(8, 160), gram_matrix(160)
    result = make("sparsegpt", pattern=pattern, sparsity=sparsity, act_order=act_order).compress(weight, gram, FP32)
    cut = weight.masked_fill(~result.mask, 0)
    assert output_error(weight, result.values, gram) < output_error(weight, cut, gram)


def test_sparsegpt_row_chunks_are_only_for_speed(monkeypatch):
    weight, gram = normal(10, 64), gram_matrix(64)
    method = make("sparsegpt", pattern="2:4")
    whole = method.compress(weight, gram, FP32)
    monkeypatch.setattr(sparsegpt, "SWEPT", 3 * 64)
    again = method.compress(weight, gram, FP32)
    torch.testing.assert_close(again.values, whole.values)
    assert torch.equal(again.mask, whole.mask)


def test_columns_that_belong_together_stay_neighbours():
    order = column_order(torch.tensor([1.0, 1, 9, 1, 5, 5, 0, 0]), 2, by_size=True)
    assert order.tolist() == [2, 3, 4, 5, 0, 1, 6, 7]
    assert column_order(torch.rand(6), 2, by_size=False).tolist() == list(range(6))


# masks and later steps


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    pruning=st.sampled_from(PATTERNS),
    pruner=st.sampled_from(["magnitude", "sparsegpt"]),
    quantizer=st.sampled_from(QUANTIZERS),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, "row"]),
    symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
)
def test_every_quantizer_keeps_every_mask(rows, groups, pruning, pruner, quantizer, bits, group_size, symmetric, shift):
    """Also where all weights of a group have one sign, so that zero is at the end of the range."""
    weight, gram = normal(rows, 32 * groups) + shift, gram_matrix(32 * groups)
    pruned = make(pruner, pattern=pruning[0], sparsity=pruning[1]).compress(weight, gram, BF16)
    method = make(quantizer, bits=bits, group_size=group_size, symmetric=symmetric)
    result = method.compress(pruned.values.float(), gram, BF16, pruned.mask)
    assert torch.equal(result.mask, pruned.mask)
    assert result.lost_zeros() == 0
    assert torch.equal(result.values, result.grid.decode(result.codes))


@pytest.mark.parametrize("name", ["magnitude", "sparsegpt"])
def test_blocks_are_judged_by_what_is_in_them_not_by_what_is_gone(name):
    """The one loud block stays, although some of its weights are zero already."""
    weight = torch.full((4, 64), 0.01)
    weight[:, :8] = 1.0
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, :3] = False
    method = make(name, pattern="block:8", sparsity=0.5)
    result = method.compress(weight * mask, torch.eye(64), FP32, mask)
    assert bool(result.mask[:, 3:8].all())
    assert not result.mask[:, :3].any()


@pytest.mark.parametrize("features", [128, 256])
def test_gptq_moves_errors_on_through_masked_weights(features):
    """Less output error than where updates skip masked weights, as some do, and what they would carry is lost."""
    weight, gram = normal(32, features), gram_matrix(features)
    pruned = make("wanda", pattern="2:4").compress(weight, gram.diagonal(), BF16)
    method, start, mask = make("gptq", group_size=32, act_order=False), pruned.values.float(), pruned.mask
    result = method.compress(start, gram, BF16, mask)
    u = reversed_factor(gram, torch.arange(features), 0.01).flip(0, 1)
    scale, _ = result.grid.columns()
    w, skipping = start.clone(), torch.zeros_like(start)
    for j in range(features):
        rounded = (w[:, j] / scale[:, j]).round().clamp(-8, 7) * scale[:, j]
        skipping[:, j] = torch.where(mask[:, j], rounded, 0.0)
        error = (w[:, j] - skipping[:, j]) / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :] * mask[:, j + 1 :]
    assert output_error(start, result.values, gram) < 0.95 * output_error(start, skipping, gram)


def test_masked_weights_do_not_move_the_zero_of_hqq():
    """The grid of a half-masked group is the one that its weights have without the masked ones."""
    weight = normal(8, 64, seed=4).abs() + 0.2  # one sign: the zero is at an end, and zeros would pull at it
    mask = torch.arange(64) % 2 == 0
    method = make("hqq", bits=4, group_size="row", symmetric=False)
    masked = method.compress(weight * mask, None, FP32, mask.expand(8, 64))
    alone = method.compress(weight[:, mask], None, FP32)
    torch.testing.assert_close(masked.grid.scale, alone.grid.scale)
    assert torch.equal(masked.grid.zero, alone.grid.zero)


@patterns
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_joint_sweep_prunes_and_rounds(pattern, sparsity, symmetric):
    weight, gram = normal(8, 160), gram_matrix(160)
    options = {"pattern": pattern, "sparsity": sparsity, "group_size": 32, "symmetric": symmetric}
    result = make("gptq", **options).compress(weight, gram, BF16)
    assert follows(result.mask, Pattern.parse(pattern))
    assert result.lost_zeros() == 0
    assert torch.equal(result.values, result.grid.decode(result.codes))
    wanda = make("wanda", pattern=pattern, sparsity=sparsity).compress(weight, gram.diagonal(), BF16)
    rtn = make("rtn", group_size=32, symmetric=symmetric).compress(wanda.values.float(), None, BF16, wanda.mask)
    assert output_error(weight, result.values, gram) < output_error(weight, rtn.values, gram)


@pytest.mark.parametrize("pattern", ["row", "layer"])
def test_the_joint_sweep_over_many_blocks_beats_one_after_the_other(pattern):
    """With loud and quiet inputs over several blocks of columns, which keep equal shares each."""
    weight, gram = normal(16, 640), gram_matrix(640)
    options = {"pattern": pattern, "sparsity": 0.5}
    joint = make("gptq", group_size=64, **options).compress(weight, gram, BF16)
    pruned = make("sparsegpt", **options).compress(weight, gram, BF16)
    apart = make("rtn", group_size=64).compress(pruned.values.float(), None, BF16, pruned.mask)
    assert output_error(weight, joint.values, gram) < output_error(weight, apart.values, gram)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "row", "sparsity": 1.0}, "sparsity"),
        ({"pattern": "row", "sparsity": -0.1}, "sparsity"),
        ({"pattern": "row"}, "needs `sparsity`"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"removes 0\.5 of the weights"),
        ({"pattern": "3-4"}, "unknown pattern"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["wanda", "gptq"])
def test_options_that_do_not_fit(name, options, message):
    with pytest.raises(RecipeError, match=message):
        METHODS[name].parse(options, "steps[0]")


def test_gptq_takes_no_sparsity_without_a_pattern():
    with pytest.raises(RecipeError, match="set `pattern` too"):
        METHODS["gptq"].parse({"sparsity": 0.5}, "steps[0]")


def test_a_fixed_pattern_takes_no_budget():
    with pytest.raises(RecipeError, match="has one sparsity for all"):
        METHODS["wanda"].parse({"pattern": "2:4", "budget": "erk"}, "steps[0]")
