"""`sparse24_linear` and `sparse24_int4_linear` on the CPU: every way to compute them is as exact as torch."""

from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import relative_error
from llmcompress_kernels import from_sparse24, from_sparse24_int4, native, sparse24_int4_linear, sparse24_linear
from llmcompress_kernels.sparse24_int4_linear import cpu as cpu_int4
from llmcompress_kernels.sparse24_int4_linear.layout import dequantize_reference
from llmcompress_kernels.sparse24_linear import cpu
from llmcompress_kernels.sparse24_linear.layout import expand_reference
from test_kernels_cpu import older_library
from torch import Tensor

BF16, F16 = torch.bfloat16, torch.float16
WAYS = {"rows": BF16, "rows, float16": F16, "many": BF16, "panels": BF16, "panels, float16": F16}
SHAPES = [(1, 96, 71), (3, 576, 33), (17, 256, 70), (70, 1056, 40), (5, 8, 3), (20, 1000, 16)]  # tokens, columns, rows
INT4_SHAPES = [(1, 96, 71, 32), (3, 576, 33, 64), (17, 384, 70, 128), (70, 1056, 40, 32), (2, 64, 3, 64)]  # and group


class Inputs(NamedTuple):
    """x with NaN around it in memory, a weight in the kernels' layout, its values in float64, a bias."""

    x: Tensor
    weight: Any
    exact: Tensor
    bias: Tensor


def inputs(tokens: int, columns: int, rows: int, dtype: torch.dtype, group: int = 0) -> Inputs:
    """Random weights at random positions; 4-bit codes if there is a group."""
    generator = torch.Generator().manual_seed(tokens + columns + rows)
    pairs = torch.tensor([first | second << 2 for second in range(4) for first in range(second)])
    nibbles = pairs[torch.randint(0, 6, (rows, columns // 4), generator=generator)]
    index = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    around = torch.full((tokens + 2, columns + 64), torch.nan, dtype=dtype)
    x = around[1:-1, 32:-32]
    x.copy_(torch.randn(tokens, columns, generator=generator))
    bias = torch.randn(rows, generator=generator).to(dtype)
    if group:
        codes = torch.randint(0, 256, (rows, columns // 4), generator=generator, dtype=torch.uint8)
        scale = ((torch.rand(rows, columns // group, generator=generator) + 0.5) / (8 * columns**0.5)).to(dtype)
        packed = from_sparse24_int4(codes, index, scale)
        return Inputs(x, packed, dequantize_reference(packed, columns, torch.float64), bias)
    kept = torch.randn(rows, columns // 2, generator=generator) / columns**0.5
    weight = from_sparse24(kept.to(dtype), index)
    return Inputs(x, weight, expand_reference(weight, columns).double(), bias)


def check(kernels: Any, name: str, given: Inputs) -> None:
    """At most twice the error of torch in the same dtype; uninitialized memory is NaN."""
    if kernels is None:
        pytest.skip("no such code on this machine")
    way = kernels.by_panels if "panels" in name else kernels.of_many if name == "many" else kernels.by_rows
    torch.use_deterministic_algorithms(True)
    try:
        for bias in (given.bias, None):
            y = way(given.x, given.weight, bias)
            truth = torch.nn.functional.linear(given.x.double(), given.exact, None if bias is None else bias.double())
            by_torch = torch.nn.functional.linear(given.x.contiguous(), given.exact.to(given.x.dtype), bias)
            assert relative_error(y, truth) <= 2 * relative_error(by_torch, truth)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_sparse24_is_as_exact_as_torch(name, tokens, columns, rows):
    check(cpu.native(), name, inputs(tokens, columns, rows, WAYS[name]))


@pytest.mark.parametrize(("tokens", "columns", "rows", "group"), INT4_SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_sparse24_int4_is_as_exact_as_torch(name, tokens, columns, rows, group):
    check(cpu_int4.native(), name, inputs(tokens, columns, rows, WAYS[name], group))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "many"])
def test_more_shapes(name):
    for tokens, columns, rows in [(n, 320, 48) for n in range(1, 36)] + [(5, 512, n) for n in (1, 15, 17, 257, 300)]:
        check(cpu.native(), name, inputs(tokens, columns, rows, BF16))
        for group in (32, 64):
            check(cpu_int4.native(), name, inputs(tokens, columns, rows, BF16, group))


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["AVX2", "AVX512-VNNI"])
def test_code_for_older_processors(processor):
    """Few tokens in float32 where no instruction expands weights."""
    if cpu.native() is None:
        pytest.skip("no such code on this machine")
    dense = cpu.Kernels(older_library(native.SOURCES / "sparse24_linear.cpp", processor))
    coded = cpu_int4.Kernels(older_library(native.SOURCES / "sparse24_int4_linear.cpp", processor))
    for name, dtype in WAYS.items():
        for tokens, columns, rows in SHAPES:
            check(dense, name, inputs(tokens, columns, rows, dtype))
        for tokens, columns, rows, group in INT4_SHAPES:
            check(coded, name, inputs(tokens, columns, rows, dtype, group))


@pytest.mark.parametrize("group", [0, 32])
def test_without_a_compiler(group, monkeypatch):
    """The reference, as before."""
    x, weight, exact, bias = inputs(3, 96, 40, BF16, group)
    operator, module = (sparse24_int4_linear, cpu_int4) if group else (sparse24_linear, cpu)
    monkeypatch.setenv(native.SWITCH, "0")
    for cached in (native.library, module.native):
        cached.cache_clear()
    try:
        assert module.native() is None
        truth = x.double() @ exact.T + bias.double()
        assert relative_error(operator(x, *weight, bias), truth) <= 2**-8
    finally:
        for cached in (native.library, module.native):
            cached.cache_clear()
