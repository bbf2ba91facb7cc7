"""Masks: exact counts for every pattern, ties broken by position, and patterns that refuse what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import NumericalError
from llmcompress.mask import Pattern, first_of, follows, keep_best, kept

some = settings(max_examples=60, deadline=None)
sparsities = st.floats(0, 0.99)


@some
@given(rows=st.integers(1, 9), groups=st.integers(1, 7), m=st.integers(2, 8), sparsity=sparsities, data=st.data())
def test_counts_are_exact_however_many_scores_are_equal(rows, groups, m, sparsity, data):
    n = data.draw(st.integers(1, m - 1))
    score = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows * groups * m, max_size=rows * groups * m)))
    score = score.float().reshape(rows, groups * m)
    columns = groups * m
    masks = {
        text: keep_best(score, Pattern.parse(text), sparsity) for text in ("row", "layer", f"{n}:{m}", f"block:{m}")
    }
    assert masks["row"].sum(1).tolist() == [kept(columns, sparsity)] * rows
    assert int(masks["layer"].sum()) == kept(rows * columns, sparsity)
    assert masks[f"{n}:{m}"].reshape(-1, m).sum(1).tolist() == [n] * rows * groups
    assert masks[f"block:{m}"].sum(1).tolist() == [kept(groups, sparsity) * m] * rows
    for text, mask in masks.items():
        assert follows(mask, Pattern.parse(text))
        removed, stays = score[~mask], score[mask]
        if text == "layer" and len(removed) and len(stays):
            assert float(removed.max()) <= float(stays.min())


def test_of_equal_scores_the_first_stay():
    assert first_of(torch.tensor([[1.0, 1, 1, 1], [0, 2, 2, 2]]), 2).tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]


def test_two_of_four_keeps_two_and_one_of_four_keeps_one():
    score = torch.tensor([[1.0, 4, 3, 2, 8, 7, 6, 9]])
    assert keep_best(score, Pattern.parse("2:4"), 0.5).nonzero()[:, 1].tolist() == [1, 2, 4, 7]
    assert keep_best(score, Pattern.parse("1:4"), 0.75).nonzero()[:, 1].tolist() == [1, 7]


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2-4", "rows", "block:1", "block", ""])
def test_no_such_pattern(text):
    with pytest.raises(ValueError, match=r"n:m|unknown pattern"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["row", "layer", "2:4", "4:8", "block:16"])
def test_a_pattern_is_written_as_it_was_read(text):
    assert str(Pattern.parse(text)) == text


def test_rows_that_do_not_divide_and_scores_that_are_nan():
    with pytest.raises(ValueError, match="4 divides, found 6 input columns"):
        keep_best(torch.ones(2, 6), Pattern.parse("2:4"), 0.5)
    with pytest.raises(NumericalError, match="NaN"):
        keep_best(torch.tensor([[1.0, float("nan")]]), Pattern.parse("row"), 0.5)


@pytest.mark.parametrize(
    ("rows", "pattern", "fits"),
    [
        ([[1, 1, 0, 0]], "2:4", True),
        ([[1, 0, 0, 0]], "2:4", True),
        ([[1, 1, 1, 0]], "2:4", False),
        ([[1, 1, 0]], "2:4", False),
        ([[1, 1, 0, 0]], "block:2", True),
        ([[1, 0, 0, 0]], "block:2", False),
        ([[1, 0], [0, 1]], "row", True),
        ([[1, 0], [1, 1]], "row", False),
        ([[1, 0], [1, 1]], "layer", True),
    ],
)
def test_whether_a_mask_follows_a_pattern(rows, pattern, fits):
    assert follows(torch.tensor(rows, dtype=torch.bool), Pattern.parse(pattern)) is fits
