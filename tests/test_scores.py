"""Scores of units against sums written out by hand; selection and compensation against their definitions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import NumericalError, PlanError, RecipeError
from llmcompress.recipe import StructureStep, parse_step
from llmcompress.stats import GradientMoments, InputMoments
from llmcompress.structure.compensation import least_squares, mean_bias
from llmcompress.structure.groups import Group
from llmcompress.structure.scores import UNIT_SCORES, Seen
from llmcompress.structure.selection import Share, keep_highest, uniform_width

# Three units of two columns each; "up" has one row per unit and "v" two. The order is no one's natural order.
COLUMNS = torch.tensor([[4, 5], [0, 1], [2, 3]])
ROWS = {"up": torch.tensor([[2], [0], [1]]), "v": torch.tensor([[0, 3], [1, 4], [2, 5]])}
GROUP = Group("test", ROWS, "down", COLUMNS, ())
SHAPES = {"down": (5, 6), "up": (3, 4), "v": (6, 4)}


@pytest.fixture
def seen() -> Seen:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    inputs = {name: InputMoments(shape[1]) for name, shape in SHAPES.items()}
    gradients = {name: GradientMoments(torch.Size(shape)) for name, shape in SHAPES.items()}
    for _ in range(3):
        for name, shape in SHAPES.items():
            inputs[name].update(2.0 + torch.randn(7, shape[1], generator=generator))
            gradients[name].update(torch.randn(shape, generator=generator))
    return Seen(3, weights, inputs, gradients)


def by_hand(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over what goes with each unit, one number after another."""
    total = torch.zeros(3)
    for unit in range(3):
        total[unit] += sum(values["down"][:, column].sum() for column in COLUMNS[unit])
        for name, table in ROWS.items():
            total[unit] += sum(values[name][row].sum() for row in table[unit])
    return total


def test_scores_are_what_their_papers_say(seen):
    def score(name: str, **options: Any) -> torch.Tensor:
        return UNIT_SCORES[name](**options).score(GROUP, seen)

    w, mean, square = (
        seen.weights,
        *({name: getattr(seen.gradients[name], key) for name in SHAPES} for key in ("mean", "square")),
    )
    norm = {name: seen.inputs[name].square.sqrt() for name in SHAPES}
    expected = {
        ("magnitude", "l1"): by_hand({n: w[n].abs() for n in w}),
        ("magnitude", "l2"): by_hand({n: w[n] ** 2 for n in w}).sqrt(),
        ("wanda", ""): by_hand({n: w[n].abs() * norm[n] for n in w}),
        ("taylor", "first"): by_hand({n: (w[n] * mean[n]).abs() for n in w}),
        ("taylor", "second"): by_hand({n: w[n] ** 2 * square[n] / 2 for n in w}),
        ("taylor", "mixed"): by_hand({n: (w[n] * mean[n] - w[n] ** 2 * square[n] / 2).abs() for n in w}),
    }
    for (name, option), value in expected.items():
        key = {"magnitude": "norm", "taylor": "order"}.get(name)
        torch.testing.assert_close(score(name, **({key: option} if key else {})), value)
    down = seen.inputs["down"]
    torch.testing.assert_close(score("activation"), down.square[COLUMNS].sum(1).sqrt())
    each = down.variance * w["down"].square().sum(0)
    torch.testing.assert_close(score("fluctuation"), each[COLUMNS].sum(1))


def test_variance_survives_a_large_mean():
    moments = InputMoments(2)
    x = 1000.0 + torch.randn(4096, 2, generator=torch.Generator().manual_seed(1))
    for part in x.split(100):
        moments.update(part)
    torch.testing.assert_close(moments.variance, x.double().var(0, unbiased=False).float(), rtol=1e-5, atol=0)


def test_the_geometric_median_takes_duplicates_first():
    """Units 1, 4 and 6 are nearly alike: of small norm they are not, so a norm would keep them."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)
    middle_down, middle_up = down.mean(1), up.mean(0)
    for unit in (1, 4, 6):
        down[:, unit] = middle_down + 0.01 * torch.randn(8, generator=generator)
        up[unit] = middle_up + 0.01 * torch.randn(8, generator=generator)
    index = torch.arange(8)[:, None]
    score = UNIT_SCORES["geometric_median"]().score(
        Group("test", {"up": index}, "down", index, ()), Seen(0, {"down": down, "up": up})
    )
    assert set(score.argsort()[:3].tolist()) == {1, 4, 6}


def test_random_is_a_permutation_that_follows_seed_and_block(seen):
    score = UNIT_SCORES["random"]
    first = score(seed=0).score(GROUP, seen)
    assert sorted(first.floor().tolist()) == [0, 1, 2]
    assert torch.equal(first, score(seed=0).score(GROUP, seen))
    others = [score(seed=seed).score(GROUP, Seen(block, {})) for seed in range(4) for block in range(4)]
    assert len({tuple(x.tolist()) for x in others}) > 3


@settings(max_examples=50)
@given(units=st.integers(2, 64), kept=st.integers(1, 63), tied=st.booleans(), seed=st.integers(0, 99))
def test_the_highest_stay_in_order(units, kept, tied, seed):
    kept = min(kept, units)
    score = torch.ones(units) if tied else torch.randn(units, generator=torch.Generator().manual_seed(seed))
    found = keep_highest(score, kept)
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == kept
    gone = torch.ones(units, dtype=torch.bool).index_fill_(0, found, False)
    assert not gone.any() or score[gone].max() <= score[found].min()


@settings(max_examples=100)
@given(units=st.integers(2, 300), share=st.floats(0.01, 0.99), multiple=st.sampled_from([1, 2, 8, 64]))
def test_a_width_is_the_nearest_multiple_or_an_error(units, share, multiple):
    """All multiples are compared, that of keeping everything too; it is the error."""
    wanted = units - units * share
    whole = Share("group", 1 / units)
    distance = {width: abs(width - wanted) for width in [units, *range(multiple, units, multiple)]}
    nearest = {width for width in distance if distance[width] == min(distance.values())}
    if units in nearest or multiple >= units:
        with pytest.raises(PlanError, match=r"steps\[0\]"):
            uniform_width(units, units * share, multiple, "steps[0]", whole)
    else:
        assert uniform_width(units, units * share, multiple, "steps[0]", whole) in nearest


def test_three_groups_cannot_lose_a_fifth():
    with pytest.raises(PlanError, match=r"rounds to none; ratios of the group that exist: 0.333 \(keeps 2\), 0.667"):
        uniform_width(3, 0.4, 1, "steps[0]", Share("group", 1 / 3))


@pytest.mark.parametrize("kept", [[0, 2, 3, 5], [1], [0, 1, 2, 3, 4]])
def test_least_squares_is_the_best_that_the_kept_inputs_can_do(kept):
    """Against numpy's solver of the same ridge problem over the tokens themselves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight, keep = torch.randn(4, 6, generator=generator), torch.tensor(kept)
    gram = x.T @ x / len(x)
    found = least_squares(weight, gram, keep)
    lost = [i for i in range(6) if i not in kept]
    damping = 0.01 * gram.diagonal().mean()
    inner = gram[keep][:, keep] + damping * torch.eye(len(kept))
    change = torch.linalg.solve(inner.double(), (gram[keep][:, lost] @ weight[:, lost].T).double()).T
    torch.testing.assert_close(found[:, keep], weight[:, keep] + change.float(), rtol=1e-4, atol=1e-5)
    assert not found[:, lost].any()
    plain = weight.clone()
    plain[:, lost] = 0
    errors = [((w - weight) @ gram * (w - weight)).sum() for w in (found, plain)]
    assert errors[0] < errors[1]


def test_least_squares_refuses_what_cannot_be_factored():
    gram = torch.full((3, 3), float("nan"))
    with pytest.raises(NumericalError, match="positive definite"):
        least_squares(torch.ones(2, 3), gram, torch.tensor([0]))


def test_the_mean_bias_is_what_the_lost_columns_added():
    weight, mean = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([10.0, 20.0, 30.0])
    assert mean_bias(weight, mean, torch.tensor([1])).tolist() == [100.0]


GOOD = {"structure": "mlp_channel", "score": "taylor", "ratio": 0.2}


def test_a_structure_step_is_read():
    step = parse_step(GOOD | {"score": {"method": "taylor", "order": "mixed"}, "multiple": 64}, "steps[2]")
    assert isinstance(step, StructureStep)
    assert (step.name, step.where, step.options.score.order) == ("mlp_channel", "steps[2]", "mixed")
    assert parse_step({"structure": "block", "score": "greedy", "bytes": "1MiB"}, "steps[0]").options.bytes == 2**20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "mlp_chanel"}, "did you mean 'mlp_channel'"),
        ({"score": "tailor"}, "did you mean 'taylor'"),
        ({"score": "greedy"}, r"unknown score 'greedy' \(known: taylor"),
        ({"score": {"method": "taylor", "ordr": "first"}}, "ordr: unknown option; did you mean 'order'"),
        ({"ratio": 0}, "greater than 0"),
        ({"ratio": 1.0}, "less than 1"),
        ({"parameters": 5}, "expected one of ratio, parameters, bytes and zeros, found ratio and parameters"),
        ({"ratio": None}, "found none"),
        ({"multiple": 0}, "greater than or equal to 1"),
        ({"compensate": "yes"}, "least_squares"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"method": "rtn"}, "both `method` and `structure`"),
        ({"targets": ["*"]}, "targets: unknown option"),
    ],
)
def test_a_bad_structure_step_is_one_message(changes, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse_step(GOOD | changes, "steps[1]")
    assert str(caught.value).startswith("steps[1]")
