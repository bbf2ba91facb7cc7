"""`sparse24_linear`: the layout comes back bit for bit, kernels are as exact as torch, torch's sparse form is right."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import relative_error
from kernel_checks import assert_any_strides, assert_fake_agrees, assert_opcheck, assert_refused
from llmcompress_kernels import from_sparse24, sparse24_linear, to_sparse24
from llmcompress_kernels.sparse24_linear.layout import PLANE, TILE, expand_reference
from llmcompress_kernels.sparse24_linear.library import (
    CUSPARSELT,
    CUTLASS,
    cutlass_form,
    cutlass_parts,
    form_elements,
    library_of,
    library_product,
    sparse24_form,
)
from sparse24_cases import stored_sparse24
from torch import Tensor

from llmcompress.formats.sparse24 import Sparse24
from llmcompress.weight import CompressedWeight

BF16, F16 = torch.bfloat16, torch.float16


def stored(rows: int = 24, columns: int = 96, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    return stored_sparse24(rows, columns, dtype, torch.Generator().manual_seed(rows * columns))


def arguments(
    tokens: int = 3, rows: int = 24, columns: int = 96, dtype: torch.dtype = BF16
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of `sparse24_linear` by name, and the weight that they hold."""
    kept, index, whole = stored(rows, columns, dtype)
    values, packed = from_sparse24(kept, index)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    return {"x": x, "values": values, "positions": packed, "bias": bias}, whole


# layout


@settings(max_examples=25)
@given(rows=st.integers(1, 40), eights=st.integers(1, 80), dtype=st.sampled_from([BF16, F16]))
def test_repacking_is_exact_in_both_directions(rows, eights, dtype):
    kept, index, whole = stored(rows, 8 * eights, dtype)
    weight = from_sparse24(kept, index)
    for old, new in zip((kept, index), to_sparse24(weight, 8 * eights), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(expand_reference(weight, 8 * eights), whole)


def test_tensors_of_the_format_are_taken():
    weight = stored()[2]
    tensors = Sparse24().pack(CompressedWeight(weight), False)
    taken = from_sparse24(tensors["weight"], tensors["weight_index"])
    assert torch.equal(expand_reference(taken, 96), weight)
    assert torch.equal(to_sparse24(taken, 96)[1], tensors["weight_index"])


def test_values_and_positions_lie_where_the_docstring_says():
    kept, index, whole = stored(5, 328)
    values, words = from_sparse24(kept, index)
    assert (values.shape, words.shape) == ((6, 5, 32), (2, 5, 16))
    assert values.is_contiguous()
    assert words.is_contiguous()
    made = torch.zeros(5, 328, dtype=BF16)
    for n, four in itertools.product(range(5), range(328 // 4)):
        column = 4 * four
        nibble = int(words[column // TILE, n, column % PLANE // 4]) >> (4 * (column % TILE // PLANE)) & 0xF
        pair = values[column // PLANE, n, column % PLANE // 2 :][:2]
        made[n, column + (nibble & 3)], made[n, column + (nibble >> 2)] = pair
    assert torch.equal(made, whole)


FALLING = torch.full((24, 12), 0b0001_0100, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(24, 48)}, "weight is torch.float32"),
        ({"weight": torch.zeros(24 * 48, dtype=BF16)}, r"weight is \[1152\], expected a matrix"),
        ({"weight": torch.zeros(24, 46, dtype=BF16)}, "weight is of 92 columns, expected a multiple of 8"),
        ({"weight": torch.zeros(24, 52, dtype=BF16)}, r"weight_index is \[24, 12\], expected \[24, 13\]"),
        ({"weight_index": torch.zeros(24, 12, dtype=torch.int8)}, "weight_index is torch.int8"),
        ({"weight_index": FALLING}, "weight_index is 1, 0 at row 0, columns 4 to 7, expected rising"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(change, message):
    kept, index, _ = stored()
    with pytest.raises(ValueError, match=f"from_sparse24: {message}"):
        from_sparse24(**{"weight": kept, "weight_index": index} | change)


# the form for torch's library


def dense_of(values: Tensor, order: Tensor) -> Tensor:
    """The weight again, by torch."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    return sparse_semi_structured_to_dense_cutlass(values, order)


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 576)])
def test_positions_are_in_the_order_of_torchs_kernel(rows, columns):
    kept, index, whole = stored(rows, columns)
    form = cutlass_form(from_sparse24(kept, index), columns)
    assert form.shape == (form_elements(rows, columns),)
    assert torch.equal(dense_of(*cutlass_parts(form, rows, columns)), whole)


@pytest.mark.parametrize(
    ("capability", "version", "name"),
    [
        ((8, 0), None, CUTLASS),
        ((8, 9), 602, CUTLASS),
        ((9, 0), 602, CUSPARSELT),
        ((9, 0), 502, None),
        ((9, 0), None, None),
        ((10, 0), 800, CUSPARSELT),
        ((10, 0), 602, None),
        ((12, 0), 800, None),
        ((7, 5), 800, None),
    ],
    ids=str,
)
def test_torchs_libraries_are_asked_only_where_they_exist(monkeypatch, capability, version, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    assert library_of(torch.device("cuda")) == name
    assert library_of(torch.device("cpu")) is None
    assert sparse24_form(from_sparse24(*stored(32, 64)[:2]), 64) is None


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens", [16, 70])
@pytest.mark.parametrize("name", [CUTLASS, CUSPARSELT])
def test_product_by_a_library(monkeypatch, name, tokens, with_bias):
    """With stand-ins for torch's operators, which need a GPU, that hold what these demand."""
    given_, whole = arguments(tokens, 32, 64)
    x, bias = given_["x"], given_["bias"] if with_bias else None

    def by_columns(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        assert columns.shape[1] % 8 == 0
        assert columns.stride(0) == 1
        return weight @ columns + (0 if bias is None else bias[:, None])

    def mm(values: Tensor, order: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
        return by_columns(dense_of(values, order), columns, bias)

    def cslt(form: Tensor, columns: Tensor, bias: Tensor | None, transpose_result: bool) -> Tensor:
        assert transpose_result
        return by_columns(form.view(32, 64), columns, bias).T.contiguous()

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda bias, *rest: mm(*rest, bias))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt)
    weight = from_sparse24(*stored(32, 64)[:2])
    form = cutlass_form(weight, 64) if name == CUTLASS else whole.flatten()
    y = library_product(x, form, 32, bias, name)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, whole, bias), rtol=2e-2, atol=2e-2)


def test_a_form_is_used_for_many_tokens(monkeypatch):
    pytest.importorskip("triton")
    from llmcompress_kernels.sparse24_linear import launch

    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(launch, "library_of", lambda device: CUTLASS)
    monkeypatch.setattr(launch, "library_product", lambda x, form, rows, bias, name: asked.append((len(x), True)) or x)
    monkeypatch.setattr(launch, "product", lambda x, *rest: asked.append((len(x), False)) or x)
    for tokens in (1, launch.LIBRARY_TOKENS, launch.LIBRARY_TOKENS + 1, 1000):
        given_, _ = arguments(tokens, 64, 64)
        weight = from_sparse24(*stored(64, 64)[:2])
        launch.sparse24_linear_triton(given_["x"], weight, None, 4, cutlass_form(weight, 64))
    assert asked == [(1, False), (64, False), (65, True), (1000, True)]


def test_rows_that_are_not_aligned_are_copied():
    from llmcompress_kernels.sparse24_linear.launch import aligned_rows

    x = torch.randn(6, 40).to(BF16)
    assert aligned_rows(x).data_ptr() == x.data_ptr()
    assert aligned_rows(x[:, 4:36]).data_ptr() == x[:, 4:].data_ptr()
    for other in (x[:, 1:33], x.view(8, 30)[:, :24], x[1:2, 2:34], x[:4].T):
        rows = aligned_rows(other)
        assert torch.equal(rows, other)
        assert rows.data_ptr() % 8 == 0
        assert rows.stride(1) == 1
        assert rows.stride(0) % 4 == 0 or len(rows) == 1


# the operator


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 576), (3, 96), (17, 264)])
def test_operator_on_cpu_is_as_exact_as_torch(tokens, columns, dtype):
    given_, weight = arguments(tokens, 70, columns, dtype)
    x, bias = given_["x"], given_["bias"]
    truth = x.double() @ weight.double().T + bias.double()
    torch_error = relative_error(torch.nn.functional.linear(x, weight, bias), truth)
    y = sparse24_linear(**given_)
    assert y.dtype == dtype
    assert relative_error(y, truth) <= 2 * torch_error


def test_any_strides_and_leading_dimensions():
    given_, _ = arguments(tokens=12)
    assert_any_strides(sparse24_linear, given_, 24)


def test_opcheck():
    given_, _ = arguments()
    assert_opcheck(
        torch.ops.llmcompress.sparse24_linear.default, tuple(given_.values()), (*list(given_.values())[:3], None)
    )


def test_fake_and_real_agree_on_every_shape():
    given_, _ = arguments()
    assert_fake_agrees(sparse24_linear, given_)


BAD: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(3, 96), "x is torch.float32"),
    ("x", torch.zeros((), dtype=BF16), "x is a scalar"),
    ("x", torch.zeros(3, 92, dtype=BF16), "x is of 92 columns, expected a multiple of 8"),
    ("x", torch.zeros(3, 0, dtype=BF16), "x is of 0 columns"),
    ("x", torch.zeros(3, 136, dtype=BF16), r"values is \[2, 24, 32\], expected \[3, 24, 32\]"),
    ("values", torch.zeros(2, 24, 32, dtype=F16), "values is torch.float16, expected torch.bfloat16"),
    ("values", torch.zeros(48, 32, dtype=BF16), "values is"),
    ("values", torch.zeros(2, 32, 24, dtype=BF16).mT, "values is strided"),
    ("values", torch.zeros(2, 24, 32, dtype=BF16, device="meta"), "values is on meta, expected on cpu"),
    ("positions", torch.zeros(1, 24, 16, dtype=torch.int32), "positions is torch.int32"),
    ("positions", torch.zeros(1, 25, 16, dtype=torch.int16), "positions is"),
    ("bias", torch.zeros(24), "bias is torch.float32"),
    ("bias", torch.zeros(3, dtype=BF16), "bias is"),
    ("form", torch.zeros(24 * 54), "form is torch.float32"),
    ("form", torch.zeros(24 * 48, dtype=BF16), r"form is \[1152\], expected \[1296\]"),
    ("form", torch.zeros(24 * 54, dtype=BF16, device="meta"), "form is on meta, expected on cpu"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_refused(argument, value, message):
    given_ = arguments()[0] | {argument: value}
    registered = torch.ops.llmcompress.sparse24_linear
    assert_refused(sparse24_linear, given_, registered, tuple(given_.values()), f"sparse24_linear: {message}")
