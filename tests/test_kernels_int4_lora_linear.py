"""`int4_lora_linear`: as exact as torch, on a CPU and in the kernels; what it refuses."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import assert_exact, case, int4_weight, interpreted, relative_error
from llmcompress_kernels import Int4Weight, int4_linear, int4_lora_linear
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from llmcompress_kernels.int4_lora_linear.reference import Adapter, int4_lora_linear_reference
from torch.nn.functional import linear

NAME = "int4_lora_linear"
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
    x = given["x"]
    for other in (x.view(2, 6, 96).transpose(0, 1), x.T.contiguous().T, x[::5], x[0], x[:0]):
        found = int4_lora_linear(**given | {"x": other})
        rows = int4_lora_linear(**given | {"x": other.reshape(-1, 96).contiguous()})
        assert found.shape == (*other.shape[:-1], 24)
        assert found.is_contiguous()
        assert torch.equal(found.reshape(-1, 24), rows)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric):
    given = arguments(symmetric=symmetric)
    operator = torch.ops.llmcompress.int4_lora_linear.default
    torch.library.opcheck(operator, flat(given))
    shuffled = given["x"].expand(2, 3, 96).transpose(0, 1)
    torch.library.opcheck(operator, flat(given | {"x": shuffled, "bias": None}))


def test_fake_and_real_agree_on_every_shape():
    given = arguments()
    meta = {name: on_meta(value) for name, value in given.items()}
    for shape in ((96,), (0, 96), (2, 3, 96)):
        real, fake = (int4_lora_linear(**a | {"x": a["x"].new_zeros(shape)}) for a in (given, meta))
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def on_meta(value: Any) -> Any:
    if isinstance(value, Int4Weight):
        return Int4Weight(*(on_meta(tensor) for tensor in value))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


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
    """By the function and by the registered operator, which others may call."""
    given = arguments() | {argument: value}
    with pytest.raises(ValueError, match=f"int4_lora_linear: {message}"):
        int4_lora_linear(**given)
    with pytest.raises(ValueError, match=f"int4_lora_linear: {message}"):
        torch.ops.llmcompress.int4_lora_linear(*flat(given))


CASES = {
    "one token, two splits, last tile of 32 columns": case(NAME, 1, 40, 1056, 32, rank=8),
    "one token, symmetric": case(NAME, 1, 70, 576, 64, "float16", rank=33, zero=False, bias=False),
    "three tokens, highest rank": case(NAME, 3, 70, 576, 64, rank=64),
    "17 tokens, two splits": case(NAME, 17, 40, 1056, 32, "float16", rank=16),
    "17 tokens, transposed, symmetric": case(NAME, 17, 33, 256, 128, rank=1, zero=False, transposed=True),
    "two programs of tokens": case(NAME, 70, 40, 192, 64, rank=17, bias=False),
    "unpacked for the BLAS": case(NAME, 257, 40, 160, 32, rank=8),
    "no tokens": case(NAME, 0, 40, 160, 32, rank=8),
}
GRID = [
    case(NAME, tokens, rows, 640 if group == 128 else 576, group, dtype, zero=zero, bias=zero, rank=rank)
    for (tokens, rows, rank), group, dtype, zero in itertools.product(
        [(1, 130, 8), (3, 65, 16), (17, 129, 20), (33, 64, 64), (65, 20, 4)],
        (32, 64, 128),
        ("bfloat16", "float16"),
        (True, False),
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
