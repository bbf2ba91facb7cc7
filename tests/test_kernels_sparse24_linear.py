"""`sparse24_linear`: the layout comes back bit for bit, kernels are as exact as torch, torch's sparse form is right."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assert_exact, case, interpreted, relative_error
from llmcompress_kernels import from_sparse24, sparse24_linear, to_sparse24
from llmcompress_kernels.sparse24_linear.layout import PLANE, TILE, expand_reference
from llmcompress_kernels.sparse24_linear.library import cutlass_form, takes
from sparse24_cases import stored_sparse24
from torch import Tensor

from llmcompress.formats.sparse24 import Sparse24
from llmcompress.weight import CompressedWeight

NAME = "sparse24_linear"
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
        ({"weight_index": FALLING}, "weight_index is not rising somewhere"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(change, message):
    kept, index, _ = stored()
    with pytest.raises(ValueError, match=f"from_sparse24: {message}"):
        from_sparse24(**{"weight": kept, "weight_index": index} | change)


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 576)])
def test_positions_are_in_the_order_of_torchs_kernel(rows, columns):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    kept, index, whole = stored(rows, columns)
    assert torch.equal(
        sparse_semi_structured_to_dense_cutlass(*cutlass_form(from_sparse24(kept, index), columns)), whole
    )


def test_torchs_kernel_is_asked_only_where_it_exists():
    assert not takes(torch.zeros(512, 64), 32)  # on CPU


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
    x = given_["x"]
    for other in (x.view(2, 6, 96).transpose(0, 1), x.T.contiguous().T, x[::5], x[0], x[:0]):
        found = sparse24_linear(**given_ | {"x": other})
        rows = sparse24_linear(**given_ | {"x": other.reshape(-1, 96).contiguous()})
        assert found.shape == (*other.shape[:-1], 24)
        assert found.is_contiguous()
        assert torch.equal(found.reshape(-1, 24), rows)


def test_opcheck():
    given_, _ = arguments()
    operator = torch.ops.llmcompress.sparse24_linear.default
    torch.library.opcheck(operator, tuple(given_.values()))
    shuffled = given_["x"].expand(2, 3, 96).transpose(0, 1)
    torch.library.opcheck(operator, (shuffled, *list(given_.values())[1:3], None))


def test_fake_and_real_agree_on_every_shape():
    given_, _ = arguments()
    meta = {name: tensor.to("meta") for name, tensor in given_.items()}
    for shape in ((96,), (0, 96), (2, 3, 96)):
        real, fake = (sparse24_linear(**a | {"x": a["x"].new_zeros(shape)}) for a in (given_, meta))
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


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
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_refused(argument, value, message):
    """By the function and by the registered operator, which others may call."""
    given_ = arguments()[0] | {argument: value}
    with pytest.raises(ValueError, match=f"sparse24_linear: {message}"):
        sparse24_linear(**given_)
    if value.is_meta:
        return  # torch itself sends such a call to the operator for meta tensors
    with pytest.raises(ValueError, match=f"sparse24_linear: {message}"):
        torch.ops.llmcompress.sparse24_linear(*given_.values())


# the Triton kernels, in Triton's interpreter


CASES = {
    "one token, two splits, last plane of 8 columns": case(NAME, 1, 20, 2056, 8),
    "one token, float16": case(NAME, 1, 70, 576, 8, "float16", bias=False),
    "three tokens": case(NAME, 3, 70, 576, 8),
    "17 tokens, two splits": case(NAME, 17, 33, 2056, 8, "float16"),
    "17 tokens, transposed": case(NAME, 17, 33, 264, 8, transposed=True, bias=False),
    "two programs of tokens": case(NAME, 70, 40, 192, 8, bias=False),
    "expanded for the BLAS": case(NAME, 257, 40, 168, 8, "float16"),
    "no tokens": case(NAME, 0, 40, 160, 8),
}
GRID = [
    case(NAME, tokens, rows, columns, 8, dtype, bias=bias)
    for (tokens, rows), columns, dtype, bias in itertools.product(
        [(1, 130), (3, 65), (17, 129), (33, 64), (65, 20)], (8, 576, 680), ("bfloat16", "float16"), (True, False)
    )
]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return dict(zip(CASES, interpreted(list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_torch(name, results):
    assert_exact(results[name], CASES[name])


@pytest.mark.slow
def test_kernels_are_as_exact_as_torch_on_all_grids():
    for found, asked in zip(interpreted(GRID), GRID, strict=True):
        assert_exact(found, asked)
