"""Budgets: golden densities of SmolLM2-135M, and totals that come out as asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.budget import erk_densities, global_counts, owl_sparsities, score_histogram

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


def test_owl_on_three_blocks():
    """By hand: shares 1, 2, 5 are stretched to densities 0, 0.04, 0.16 around a mean of 1/15."""
    found = owl_sparsities({0: 1.0, 1: 2.0, 2: 5.0}, {0: 10, 1: 10, 2: 10}, 0.6, 0.08)
    assert found == pytest.approx({0: 0.6 + 1 / 15, 1: 0.6 + 1 / 15 - 0.04, 2: 0.6 + 1 / 15 - 0.16})


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=9),
    sparsity=st.floats(0.2, 0.8),
)
def test_owl_keeps_the_total_and_its_range(blocks, sparsity):
    shares, sizes = ({i: block[k] for i, block in enumerate(blocks)} for k in (0, 1))
    found = owl_sparsities(shares, sizes, sparsity, 0.08)
    total = sum(sizes.values())
    assert sum(found[i] * sizes[i] for i in found) / total == pytest.approx(sparsity)
    assert max(found.values()) - min(found.values()) <= 0.16 + 1e-9
    assert all((found[i] <= found[j]) for i in found for j in found if shares[i] > shares[j])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
    tied=st.booleans(),
)
def test_global_counts_are_exact(sizes, share, seed, tied):
    """The sum is as asked whatever ties; with scores that bfloat16 tells apart, the same as sorting everything."""
    generator = torch.Generator().manual_seed(seed)
    everything = torch.randperm(200 * 6, generator=generator)[: sum(sizes)]
    scores = torch.ones(sum(sizes)) if tied else 1.01 ** everything.float()
    parts = {str(i): part for i, part in enumerate(scores.split(sizes))}
    keep = len(scores) - round(len(scores) * share)
    counts = global_counts({name: score_histogram(part) for name, part in parts.items()}, keep)
    assert sum(counts.values()) == keep
    assert all(0 <= counts[name] <= len(part) for name, part in parts.items())
    if not tied and keep:
        limit = scores.sort(descending=True).values[keep - 1]
        assert counts == {name: int((part >= limit).sum()) for name, part in parts.items()}
