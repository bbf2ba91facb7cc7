"""`int4_lora_linear`: as exact as torch on a CPU; what it refuses. The kernels: test_kernels_numerics.py."""

from typing import Any

import pytest
import torch
from kernel_cases import int4_weight, relative_error
from kernel_checks import assert_any_strides, assert_fake_agrees, assert_opcheck, assert_refused
from llmcompress_kernels import int4_linear, int4_lora_linear
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from llmcompress_kernels.int4_lora_linear.reference import Adapter, int4_lora_linear_reference
from torch.nn.functional import linear

BF16, F16 = torch.bfloat16, torch.float16
Arguments = dict[str, Any]


def arguments(
    tokens: int = 3, rows: int = 24, columns: int = 96, group: int = 32, symmetric: bool = False,
    dtype: torch.dtype = BF16, rank: int = 8,
) -> Arguments:  # fmt: skip
    """Arguments of the operator by name."""
    generator = torch.Generator().manual_seed(tokens + rows + columns)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "x": random(tokens, columns),
        "weight": int4_weight(rows, columns, group, symmetric, dtype, generator),
        "lora_a": random(rank, columns) / columns**0.5,
        "lora_b": random(rows, rank) / rank**0.5,
        "scaling": 1.5,
        "bias": random(rows),
    }


def flat(given: Arguments) -> tuple[Any, ...]:
    """Arguments of the registered operator."""
    return (given["x"], *given["weight"], given["bias"], given["lora_a"], given["lora_b"], given["scaling"])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("tokens", "columns", "group", "rank"), [(1, 576, 64, 8), (3, 96, 32, 64), (17, 256, 128, 1)])
def test_operator_on_cpu_is_as_exact_as_torch(tokens, columns, group, rank, symmetric, dtype):
    given = arguments(tokens, 70, columns, group, symmetric, dtype, rank)
    x, weight, a, b, scaling, bias = given.values()
    truth = int4_lora_linear_reference(x, weight, bias, Adapter(a, b, scaling), torch.float64)
    by_torch = linear(x, dequantize_reference(weight, columns).to(dtype), bias) + scaling * linear(linear(x, a), b)
    y = int4_lora_linear(**given)
    assert y.dtype == dtype
    assert relative_error(y, truth) <= 2 * relative_error(by_torch, truth)


def test_without_an_update_it_is_int4_linear():
    given = arguments()
    base = int4_linear(given["x"], *given["weight"], given["bias"])
    assert torch.equal(int4_lora_linear(**given | {"scaling": 0.0}), base)
    assert torch.equal(int4_lora_linear(**given | {"lora_b": torch.zeros_like(given["lora_b"])}), base)
    assert not torch.equal(int4_lora_linear(**given), base)


def test_any_strides_and_leading_dimensions():
    given = arguments(tokens=12)
    assert_any_strides(int4_lora_linear, given, 24)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric):
    given = arguments(symmetric=symmetric)
    assert_opcheck(torch.ops.llmcompress.int4_lora_linear.default, flat(given), flat(given | {"bias": None}))


def test_fake_and_real_agree_on_every_shape():
    given = arguments()
    assert_fake_agrees(int4_lora_linear, given)


WEIGHT = arguments()["weight"]
BAD: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(3, 96), "x is torch.float32"),
    ("x", torch.zeros(3, 64, dtype=BF16), "scale is 3 groups of 64 columns"),
    ("weight", WEIGHT._replace(words=torch.zeros(1, 24, 16, dtype=torch.int64)), "words is torch.int64"),
    ("weight", WEIGHT._replace(zero=torch.zeros(2, 24, dtype=torch.uint8)), r"zero is \[2, 24\], expected \[3, 24\]"),
    ("lora_a", torch.zeros(8, 96), "lora_a is torch.float32, expected torch.bfloat16"),
    ("lora_a", torch.zeros(65, 96, dtype=BF16), r"lora_a is \[65, 96\], expected a matrix .* of rank 1 to 64"),
    ("lora_a", torch.zeros(0, 96, dtype=BF16), r"lora_a is \[0, 96\]"),
    ("lora_a", torch.zeros(96, dtype=BF16), r"lora_a is \[96\]"),
    ("lora_a", torch.zeros(8, 64, dtype=BF16), r"lora_a is \[8, 64\], expected \[8, 96\]"),
    ("lora_a", torch.zeros(96, 8, dtype=BF16).T, "lora_a is strided"),
    ("lora_b", torch.zeros(24, 8, dtype=F16), "lora_b is torch.float16"),
    ("lora_b", torch.zeros(24, 9, dtype=BF16), r"lora_b is \[24, 9\], expected \[24, 8\]"),
    ("lora_b", torch.zeros(8, 24, dtype=BF16), r"lora_b is \[8, 24\], expected \[24, 8\]"),
    ("scaling", float("nan"), "scaling is nan, expected a finite number"),
    ("bias", torch.zeros(3, dtype=BF16), r"bias is \[3\], expected \[24\]"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_refused(argument, value, message):
    given = arguments() | {argument: value}
    registered = torch.ops.llmcompress.int4_lora_linear
    assert_refused(int4_lora_linear, given, registered, flat(given), f"int4_lora_linear: {message}")
