"""Budgets: golden densities of SmolLM2-135M, and totals that come out as asked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.budget import erk_densities

SMOLLM = {
    "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
    "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
}  # fmt: skip


@pytest.mark.parametrize(
    ("sparsity", "square", "narrow", "wide"),
    [(0.5, 0.62222, 1.0, 0.42778), (0.8, 0.24151, 0.48302, 0.16604), (0.9, 0.12075, 0.24151, 0.08302)],
)
def test_golden_densities(sparsity, square, narrow, wide):
    """Solved by hand; at 0.5 the narrow matrices would pass 1, stay dense, and the others are solved anew."""
    density = erk_densities(SMOLLM, sparsity)
    expected = {"q": square, "k": narrow, "v": narrow, "o": square, "gate": wide, "up": wide, "down": wide}
    assert density == pytest.approx(expected, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.99),
)
def test_the_total_is_as_asked_and_no_density_passes_one(shapes, sparsity):
    named = {str(i): shape for i, shape in enumerate(shapes)}
    density = erk_densities(named, sparsity)
    total = sum(rows * columns for rows, columns in shapes)
    assert sum(density[n] * r * c for n, (r, c) in named.items()) == pytest.approx((1 - sparsity) * total, rel=1e-9)
    assert all(0 <= value <= 1 for value in density.values())
