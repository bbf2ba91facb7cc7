"""The record between methods and formats: stacking, splitting, and the relative error of a layer's output."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress import weight as weight_module
from llmcompress.grid import fit_range
from llmcompress.weight import CompressedWeight, relative_error


def compressed(rows: int, *, symmetric: bool = False, seed: int = 0) -> CompressedWeight:
    w = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    grid = fit_range(w, bits=4, group=32, symmetric=symmetric, dtype=torch.bfloat16, search=False)
    return CompressedWeight.on_grid(grid.encode(w), grid)


def same(one: CompressedWeight, other: CompressedWeight) -> bool:
    """Equal in every tensor and in the kind of grid."""
    a, b = one.grid, other.grid
    assert a is not None
    assert b is not None
    tensors = [(one.values, other.values), (one.codes, other.codes), (a.scale, b.scale), (a.zero, b.zero)]
    kinds = [(g.bits, g.group, g.symmetric) for g in (a, b)]
    return kinds[0] == kinds[1] and all(torch.equal(x, y) for x, y in tensors)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=4), symmetric=st.booleans())
def test_split_undoes_stacking(rows, symmetric):
    parts = [compressed(count, symmetric=symmetric, seed=i) for i, count in enumerate(rows)]
    back = CompressedWeight.join(parts).split(rows)
    assert all(same(part, found) for part, found in zip(parts, back, strict=True))


def test_split_of_plain_values():
    """A method without a grid has values alone."""
    values = torch.arange(12.0).reshape(6, 2)
    parts = CompressedWeight(values).split([1, 5])
    assert [part.values.tolist() for part in parts] == [values[:1].tolist(), values[1:].tolist()]
    assert all(part.codes is None and part.grid is None for part in parts)


def test_values_are_decoded_codes():
    weight = compressed(5)
    assert torch.equal(weight.values, weight.grid.decode(weight.codes))
    assert weight.values.dtype == torch.bfloat16


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [7, 20], V close to it, and correlated inputs X [50, 20], in float64."""
    generator = torch.Generator().manual_seed(seed)
    w, noise, x, mix = (torch.randn(*s, generator=generator).double() for s in [(7, 20), (7, 20), (50, 20), (20, 20)])
    return w, w + 0.1 * noise, x @ mix


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_relative_error_is_that_of_the_outputs(seed):
    w, v, x = layer(seed)
    outputs = ((w - v) @ x.T).norm() / (w @ x.T).norm()
    found = relative_error(w.float(), v.float(), (x.T @ x / len(x)).float())
    assert found == pytest.approx(float(outputs), rel=1e-4)


def test_relative_error_without_data_is_that_of_the_weight():
    w, v, _ = layer(0)
    expected = pytest.approx(float((w - v).norm() / w.norm()), rel=1e-5)
    assert relative_error(w.float(), v.float()) == expected
    assert relative_error(w.float(), v.float(), torch.eye(20)) == expected


def test_relative_error_of_the_same_weight_is_zero():
    w, _, x = layer(0)
    assert relative_error(w.float(), w.float(), (x.T @ x).float()) == 0.0


@pytest.mark.parametrize("gram", [None, torch.zeros(4, 4)], ids=["zero weight", "dead inputs"])
def test_relative_error_of_a_layer_that_outputs_nothing_is_zero(gram):
    weight = torch.zeros(3, 4) if gram is None else torch.ones(3, 4)
    assert relative_error(weight, weight + 1, gram) == 0.0


def test_relative_error_compares_stored_values_with_a_float32_weight():
    w, v, x = layer(1)
    half = v.to(torch.bfloat16)
    expected = ((w - half.double()) @ x.T).norm() / (w @ x.T).norm()
    assert relative_error(w.float(), half, (x.T @ x).float()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("panel", [5, 64, 4096])
def test_relative_error_does_not_depend_on_how_its_products_are_cut(panel, monkeypatch):
    monkeypatch.setattr(weight_module, "PANEL", panel)
    monkeypatch.setattr(weight_module, "PRODUCT", 7 * 64)
    w, values, x = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (20, 20, 300))
    gram = x.T @ x / 300
    exact = ((values - w).double() @ x.T.double()).norm() / (w.double() @ x.T.double()).norm()
    assert relative_error(w, values, gram) == pytest.approx(float(exact), rel=4 * torch.finfo(torch.bfloat16).eps)
