"""The Gram matrix of a layer's inputs: what it is, and that parts of the data add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress import stats
from llmcompress.errors import CalibrationError
from llmcompress.stats import SAMPLE, InputGram, InputGramMean, Inputs, InputSquares

few = settings(max_examples=15, deadline=None)


def samples(tokens: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))


def gram_of(*batches: Tensor) -> InputGram:
    gram = InputGram(batches[0].shape[-1])
    for batch in batches:
        gram.update(batch)
    return gram


@pytest.fixture(params=[1, 5, 16, 512], ids="panel{}".format)
def panel(request, monkeypatch):
    monkeypatch.setattr(stats, "PANEL", request.param)


@pytest.mark.usefixtures("panel")
@pytest.mark.parametrize("features", [1, 13, 16, 33, 48])
def test_mean_is_the_second_moment(features):
    x = samples(100, features)
    truth = x.double().T @ x.double() / 100
    mean = gram_of(x[:30], x[30:]).mean
    # A sum of n products errs by about sqrt(n) roundings, relative to the sum of their sizes.
    bound = 10 * torch.finfo(torch.float32).eps * (x.double().abs().T @ x.double().abs() / 100)
    assert mean.dtype == torch.float32
    assert bool(((mean.double() - truth).abs() <= bound).all())
    assert torch.equal(mean, mean.T)


def test_wider_than_a_panel():
    x = samples(40, stats.PANEL + 77)
    mean = gram_of(x).mean
    torch.testing.assert_close(mean, x.T @ x / 40, rtol=1e-4, atol=1e-5)
    assert torch.equal(mean, mean.T)


def test_leading_dimensions_are_tokens():
    x = samples(24, 8)
    gram = gram_of(x.reshape(2, 3, 4, 8))
    assert gram.tokens == 24
    assert torch.equal(gram.total, gram_of(x).total)


def test_half_precision_inputs_are_summed_in_float32():
    x = samples(300, 8).to(torch.bfloat16)
    torch.testing.assert_close(gram_of(x).mean.double(), x.double().T @ x.double() / 300, rtol=1e-5, atol=1e-5)


@few
@given(cut=st.lists(st.integers(1, 20), min_size=2, max_size=5), features=st.integers(1, 20))
def test_shards_add_up(cut, features):
    """Whole numbers have exact sums: merging shards in any split is the same as seeing everything in one place."""
    shards = [samples(count, features, seed).mul(4).round() for seed, count in enumerate(cut)]
    merged = gram_of(shards[0])
    for shard in shards[1:]:
        merged.merge(gram_of(shard))
    whole = gram_of(torch.cat(shards))
    assert merged.tokens == whole.tokens == sum(cut)
    assert torch.equal(merged.mean, whole.mean)


def test_merge_adds_sums_and_counts():
    one, other = gram_of(samples(7, 5, 1)), gram_of(samples(11, 5, 2))
    total = one.total + other.total
    one.merge(other)
    assert torch.equal(one.total, total)
    assert (one.tokens, other.tokens) == (18, 11)


def test_mean_is_a_new_matrix():
    gram = gram_of(samples(9, 6))
    gram.mean.zero_()
    assert bool(gram.mean.diagonal().ne(0).all())


@pytest.mark.parametrize("updates", [0, 1], ids=["never called", "called with nothing"])
def test_no_tokens_is_an_error_with_a_remedy(updates):
    gram = InputGram(4)
    for _ in range(updates):
        gram.update(torch.empty(0, 4))
    with pytest.raises(CalibrationError, match=r"no tokens reached this layer.*`keep`"):
        _ = gram.mean


def test_bfloat16_inputs_lose_nothing():
    """Products of bfloat16 numbers are exact in float32, whatever unit multiplies them."""
    x = (torch.randn(64, 96) * 3).to(torch.bfloat16)
    gram = InputGram(96)
    gram.update(x)
    exact = x.double().T @ x.double() / 64
    assert float((gram.mean.double() - exact).norm() / exact.norm()) < 64 * torch.finfo(torch.float32).eps
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


def test_squares_are_the_diagonal_and_a_sample_is_kept():
    x = samples(SAMPLE + 500, 12)
    squares = InputSquares(12)
    for part in x.split(3000):
        squares.update(part)
    found, whole = Inputs.of(squares), Inputs.of(gram_of(x))
    torch.testing.assert_close(found.squares, whole.squares)
    torch.testing.assert_close(found.gram, gram_of(x[:SAMPLE]).mean)
    assert squares.tokens == SAMPLE + 500
    assert torch.equal(whole.squares, whole.gram.diagonal())
    assert found.needed_by(InputSquares).shape == (12,)
    assert found.needed_by(InputGram).shape == (12, 12)


def test_squares_of_parts_add_up():
    x = samples(400, 12)
    first, second, both = InputSquares(12), InputSquares(12), InputSquares(12)
    first.update(x[:100])
    second.update(x[100:])
    both.update(x)
    first.merge(second)
    torch.testing.assert_close(first.mean, both.mean)
    torch.testing.assert_close(first.sample.mean, both.sample.mean)
    with pytest.raises(CalibrationError, match="no tokens reached this layer"):
        _ = InputSquares(12).mean


def test_the_mean_that_goes_with_a_gram_matrix_changes_nothing_of_it():
    x = 100.0 + torch.randn(3, 40, 7, generator=torch.Generator().manual_seed(0))
    alone, first, second = InputGram(7), InputGramMean(7), InputGramMean(7)
    alone.update(x)
    first.update(x[:2])
    second.update(x[2])
    torch.testing.assert_close(first.average, x[:2].double().mean((0, 1)).float(), rtol=1e-6, atol=0)
    first.merge(second)
    torch.testing.assert_close(first.average, x.double().mean((0, 1)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(first.mean, alone.mean)
    with pytest.raises(CalibrationError, match="no tokens"):
        InputGramMean(7).average  # noqa: B018
