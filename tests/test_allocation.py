"""Histograms give quantiles, and the greedy search spreads a share as trying everything would."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.at_runtime.allocation import HIGHEST, LARGEST_RAISE, greedy, raised, uniform, weights_left_out
from llmcompress.errors import CalibrationError, PlanError
from llmcompress.histogram import InputHistogram

SIZES = {"q": 96, "k": 32, "o": 96, "up": 240, "down": 240}


# histograms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sparsity", [0.05, 0.25, 0.5, 0.9])
def test_a_threshold_leaves_out_the_share_that_it_is_for(dtype, sparsity):
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    histogram = InputHistogram()
    histogram.update(x.view(4, 100, 100))
    threshold = histogram.threshold(sparsity)
    exact = float((x.abs().float() <= threshold).float().mean())
    assert exact == pytest.approx(sparsity, abs=0.005)
    assert histogram.share(threshold) == pytest.approx(exact, abs=1e-6 if dtype == torch.bfloat16 else 0.005)


def test_inputs_that_are_zero_anyway_need_no_threshold():
    """As after a ReLU; and those of one size have no threshold between."""
    histogram = InputHistogram()
    histogram.update(torch.tensor([0.0, -0.0, 0.0, 5.0]))
    assert histogram.threshold(0.5) == 0.0
    assert histogram.share(0.0) == 0.75
    histogram = InputHistogram()
    histogram.update(torch.full((10,), 2.0))
    assert histogram.threshold(0.2) < 2.0
    assert histogram.threshold(0.8) == 2.0


def test_batches_add_up():
    x, whole = torch.randn(2, 50), InputHistogram()
    whole.update(x)
    first, second = InputHistogram(), InputHistogram()
    first.update(x[0])
    second.update(x[1])
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_are_refused(bad):
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        InputHistogram().update(torch.tensor([1.0, bad]))
    with pytest.raises(CalibrationError, match="no tokens"):
        InputHistogram().threshold(0.5)


# allocation


def separable(weights):
    """An error whose parts are convex and add up, as in a block whose linears do not interact."""
    return lambda levels: sum(weights[name] * level**2 * SIZES[name] for name, level in levels.items())


@given(st.floats(0.01, 0.9), st.lists(st.floats(0.1, 10), min_size=5, max_size=5), st.floats(0.005, 0.2))
def test_the_target_is_met_exactly_and_no_linear_exceeds_its_bound(target, weights, step):
    levels = greedy(SIZES, target, step, separable(dict(zip(SIZES, weights, strict=True))))
    assert weights_left_out(levels, SIZES) == pytest.approx(target * sum(SIZES.values()), rel=1e-6)
    assert all(0 <= level <= HIGHEST + 1e-9 for level in levels.values())


def by_trying_all(target, step, error):
    """The greedy search without its shortcut."""
    levels, total = dict.fromkeys(SIZES, 0.0), sum(SIZES.values())
    while (left := target * total - weights_left_out(levels, SIZES)) > 1e-9 * total:
        costs = {}
        for name in SIZES:
            rise = raised(SIZES, name, levels[name], step, left)
            if rise > 1e-9:
                higher = levels | {name: levels[name] + rise}
                costs[name] = (error(higher) - error(levels)) / (rise * SIZES[name]), higher
        levels = min(costs.values(), key=lambda found: found[0])[1]
    return levels


@pytest.mark.parametrize("target", [0.1, 0.4, 0.7])
def test_looking_only_at_the_cheapest_gives_what_trying_all_gives(target):
    weights = {"q": 1.0, "k": 0.3, "o": 2.5, "up": 0.7, "down": 5.0}
    calls = []

    def counted(levels):
        calls.append(levels)
        return separable(weights)(levels)

    found = greedy(SIZES, target, 0.02, counted)
    tries = len(calls)
    assert found == pytest.approx(by_trying_all(target, 0.02, counted))
    assert tries < 0.3 * (len(calls) - tries)


def test_what_matters_less_gives_up_more():
    weights = {"q": 1.0, "k": 1.0, "o": 1.0, "up": 0.1, "down": 10.0}
    levels = greedy(SIZES, 0.4, 0.02, separable(weights))
    assert levels["up"] > levels["q"] > levels["down"]
    even = uniform(SIZES, 0.4)
    assert separable(weights)(levels) < separable(weights)(even)
    assert weights_left_out(even, SIZES) == pytest.approx(0.4 * sum(SIZES.values()))


def test_raises_are_bounded():
    assert raised(SIZES, "k", 0.0, 0.2, 1000) == LARGEST_RAISE
    assert raised(SIZES, "up", 0.0, 0.02, 1000) == pytest.approx(0.02 * 704 / 240)
    assert raised(SIZES, "up", 0.0, 0.02, 2.4) == pytest.approx(0.01)
    assert raised(SIZES, "up", HIGHEST, 0.02, 1000) == 0
    with pytest.raises(PlanError, match="can give up"):
        greedy(SIZES, 0.96, 0.02, separable(dict.fromkeys(SIZES, 1.0)))
