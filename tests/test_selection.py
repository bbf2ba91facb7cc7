"""One ranking of the units of several blocks: against its definition, for units of one cost and of unlike costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import CalibrationError, PlanError
from llmcompress.structure.scores import UNIT_SCORES
from llmcompress.structure.selection import Ranking, Share, check_scores, comparable, ranking_of, standardized

ONE = Share("group", 1 / 1000)


def ranking(units: dict[int, int], costs: dict[int, int], remove: int, multiple: int = 1, fewest: int = 0) -> Ranking:
    return Ranking(units, costs, multiple, fewest, remove)


def gone(found: Ranking, widths: dict[int, int]) -> int:
    return sum((found.units[block] - widths[block]) * found.costs[block] for block in widths)


@settings(max_examples=100)
@given(
    steps=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    multiple=st.sampled_from([1, 2, 8]),
    fewest=st.integers(0, 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_of_units_that_cost_the_same_exactly_the_lowest_steps_go(steps, multiple, fewest, share, seed):
    """Whatever a unit costs; and the highest `fewest` of a block stay."""
    generator, cost = torch.Generator().manual_seed(seed), 7
    units = {block: count * multiple for block, count in enumerate(steps)}
    values = {block: torch.rand(count, generator=generator) for block, count in units.items()}
    means = {
        (block, place): float(part.mean())
        for block, value in values.items()
        for place, part in enumerate(value.sort(descending=True).values.split(multiple))
    }
    able = sorted((mean, key) for key, mean in means.items() if key[1] >= fewest)
    count = round(share * len(able))
    found = ranking(units, dict.fromkeys(units, cost), count * multiple * cost, multiple, fewest).widths(values)
    lost = [block for _, (block, _) in able[:count]]
    assert found == {block: units[block] - multiple * lost.count(block) for block in units}


@settings(max_examples=100)
@given(
    costs=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    units=st.integers(1, 4),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_no_step_that_is_left_would_bring_it_nearer_to_the_budget(costs, units, share, seed):
    generator = torch.Generator().manual_seed(seed)
    total = units * sum(costs)
    made = ranking(dict.fromkeys(range(len(costs)), units), dict(enumerate(costs)), round(share * total))
    widths = made.widths({block: torch.rand(units, generator=generator) for block in range(len(costs))})
    distance = abs(gone(made, widths) - made.remove)
    left = [cost for block, cost in enumerate(costs) if widths[block]]
    assert all(abs(gone(made, widths) + cost - made.remove) >= distance for cost in left)


def test_units_of_unlike_cost_go_by_what_a_parameter_is_worth():
    """By the scores alone, and a budget counted in units of mean cost, the two small ones would go: 200 parameters."""
    costs, scores = {0: 100, 1: 300, 2: 100}, {0: 1.0, 1: 2.0, 2: 1.5}
    values = {
        block: comparable(torch.tensor([score]), costs[block], across=True, per_parameter=True)
        for block, score in scores.items()
    }
    made = ranking(dict.fromkeys(costs, 1), costs, 300)
    assert made.widths(values) == {0: 1, 1: 0, 2: 1}


def test_what_is_too_large_stays_and_smaller_units_go():
    values = {0: torch.tensor([0.0]), 1: torch.tensor([1.0]), 2: torch.tensor([2.0])}
    made = ranking(dict.fromkeys(values, 1), {0: 1000, 1: 10, 2: 10}, 20)
    assert made.widths(values) == {0: 1, 1: 0, 2: 0}


def test_a_block_that_is_left_as_it_is_loses_no_higher_units():
    """Units go lowest first: what is above one that stays cannot go without it."""
    values = {0: torch.tensor([0.5, 0.1]), 1: torch.tensor([0.9, 0.8])}
    made = ranking({0: 2, 1: 2}, {0: 100, 1: 10}, 20)
    assert made.widths(values) == {0: 2, 1: 0}


def test_before_anything_is_known_every_block_loses_about_the_same_share():
    assert ranking({0: 160, 1: 160, 2: 80}, {0: 3, 1: 3, 2: 3}, 300).spread() == {0: 120, 1: 120, 2: 60}
    assert ranking({0: 3, 1: 3}, {0: 5, 1: 5}, 10, fewest=1).spread() == {0: 2, 1: 2}


def test_a_budget_is_rounded_to_steps_of_units_that_cost_the_same():
    units, costs = {0: 16, 1: 16}, {0: 5, 1: 5, 7: 1}  # the last one is of a protected block
    assert ranking_of(units, costs, 33.0, 4, 1, "steps[0]", ONE).remove == 40
    assert ranking_of(units, {0: 5, 1: 6}, 33.4, 4, 1, "steps[0]", ONE).remove == 33


@pytest.mark.parametrize(
    ("costs", "remove", "message"),
    [
        (
            {0: 5, 1: 5},
            9.0,
            r"removing 1.8 of 32 units rounds to 0; from 4 to 24 can go, in steps .* 0.02 to 0.12",
        ),
        ({0: 5, 1: 5}, 140.0, r"removing 28 of 32 units rounds to 28; from 4 to 24 can go"),
        ({0: 5, 1: 50}, 9.0, r"removing 9 of 880 parameters rounds to 0; from 20 to 660 can go, .* 0.02 to 0.66"),
        ({0: 5, 1: 50}, 661.0, r"removing 661 of 880 parameters rounds to 661; from 20 to 660 can go"),
    ],
)
def test_a_budget_that_no_ranking_can_meet_is_a_plan_error(costs, remove, message):
    with pytest.raises(PlanError, match=message):
        ranking_of({0: 16, 1: 16}, costs, remove, 4, 1, "steps[0]", ONE)


def test_scores_that_mean_the_same_everywhere_count_per_parameter_and_others_within_their_block():
    score = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(comparable(score, 2.0, across=True, per_parameter=True), score / 2)
    assert comparable(score, 2.0, across=True, per_parameter=False) is score
    within = comparable(score, 2.0, across=False, per_parameter=True)
    assert torch.equal(within, standardized(score))
    torch.testing.assert_close(torch.stack([within.mean(), within.std()]), torch.tensor([0.0, 1.0]))
    one = torch.tensor([6.0])
    assert float(comparable(one, 2.0, across=False, per_parameter=True)) == 3.0  # of a sub-layer, which is alone


def test_chance_does_not_look_at_sizes():
    assert [name for name, score in UNIT_SCORES.items() if not score.per_parameter] == ["random"]


def test_a_score_that_is_no_number_is_an_error_of_the_data():
    with pytest.raises(CalibrationError, match=r"steps\[0\]: a score is NaN"):
        check_scores([torch.ones(2), torch.tensor([float("nan")])], "steps[0]")
