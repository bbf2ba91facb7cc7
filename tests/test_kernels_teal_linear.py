"""`teal_linear`: the columns of small inputs are not read, and the product is the masked one."""

from typing import Any

import pytest
import torch
from kernel_cases import relative_error
from kernel_checks import assert_any_strides, assert_fake_agrees, assert_opcheck, assert_refused
from llmcompress_kernels import teal_linear
from llmcompress_kernels.teal_linear import teal_linear_reference
from torch import Tensor

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
dtypes = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)


def arguments(tokens: int = 1, columns: int = 96, rows: int = 40, dtype: torch.dtype = BF16) -> dict[str, Any]:
    """Arguments of `teal_linear` by name; about half of the inputs are small."""
    generator = torch.Generator().manual_seed(tokens + columns + rows)
    x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    weight = torch.randn(columns, rows, generator=generator) / columns**0.5
    return {"x": x.to(dtype), "columns": weight.to(dtype), "threshold": 0.625, "bias": bias.to(dtype)}


def exact(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    """In float64."""
    masked = x.masked_fill(x.float().abs() <= threshold, 0).double()
    return masked @ columns.double() + (0 if bias is None else bias.double())


@dtypes
@pytest.mark.parametrize(("columns", "rows"), [(96, 40), (576, 1536), (1000, 7), (3, 33)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_operator_on_cpu_is_as_exact_as_torch(tokens, columns, rows, dtype):
    given = arguments(tokens, columns, rows, dtype)
    truth = exact(**given)
    y = teal_linear(**given)
    assert (y.dtype, y.shape) == (dtype, (tokens, rows))
    assert (
        relative_error(y, truth) <= 2 * relative_error(teal_linear_reference(**given), truth) + torch.finfo(dtype).eps
    )


@dtypes
@pytest.mark.parametrize("threads", [1, 2])
def test_columns_of_small_inputs_are_not_read(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = arguments(dtype=dtype)
        truth = exact(**given)
        given["columns"][given["x"][0].float().abs() <= 0.625] = torch.nan
        y = teal_linear(**given)
    finally:
        torch.set_num_threads(before)
    assert relative_error(y, truth) < 8 * torch.finfo(dtype).eps


def test_nothing_left_out_and_all_left_out():
    given = arguments(dtype=F32)
    everything = teal_linear(**(given | {"threshold": 0.0}))
    torch.testing.assert_close(everything, torch.nn.functional.linear(given["x"], given["columns"].T, given["bias"]))
    assert torch.equal(teal_linear(**(given | {"threshold": 100.0})), given["bias"][None])
    assert torch.equal(teal_linear(**(given | {"threshold": 100.0, "bias": None})), torch.zeros(1, 40))


def test_a_nan_stays_one():
    for tokens in (1, 2):
        given = arguments(tokens)
        given["x"][0, 5] = torch.nan
        assert teal_linear(**given)[0].isnan().all()


def test_any_strides_and_leading_dimensions():
    given = arguments(12)
    assert_any_strides(teal_linear, given, 40)


@pytest.mark.parametrize("tokens", [1, 3])
def test_opcheck(tokens):
    given = arguments(tokens)
    assert_opcheck(torch.ops.llmcompress.teal_linear.default, tuple(given.values()), (*list(given.values())[:3], None))


def test_fake_and_real_agree_on_every_shape():
    given = arguments()
    assert_fake_agrees(teal_linear, given)


BAD: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(1, 96, dtype=torch.int32), "x is torch.int32"),
    ("x", torch.zeros(1, 95, dtype=BF16), r"columns is \[96, 40\], expected \[95, 40\]"),
    ("x", torch.zeros((), dtype=BF16), "x is a scalar"),
    ("columns", torch.zeros(96, 40), "columns is torch.float32, expected torch.bfloat16"),
    ("columns", torch.zeros(96, dtype=BF16), "columns is"),
    ("columns", torch.zeros(40, 96, dtype=BF16).T, "columns is strided"),
    ("columns", torch.zeros(96, 40, dtype=BF16, device="meta"), "columns is on meta"),
    ("threshold", -0.5, "threshold is -0.5"),
    ("threshold", float("nan"), "threshold is nan"),
    ("threshold", float("inf"), "threshold is inf"),
    ("bias", torch.zeros(40), "bias is torch.float32"),
    ("bias", torch.zeros(39, dtype=BF16), "bias is"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_refused(argument, value, message):
    given = arguments() | {argument: value}
    registered = torch.ops.llmcompress.teal_linear
    assert_refused(teal_linear, given, registered, tuple(given.values()), f"teal_linear: .*{message}")
