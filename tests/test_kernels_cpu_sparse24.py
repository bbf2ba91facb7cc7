"""`sparse24_linear` on the CPU: every way to compute it is as exact as torch."""

from typing import Any

import pytest
import torch
from kernel_cases import relative_error
from llmcompress_kernels import Sparse24Weight, from_sparse24, native, sparse24_linear
from llmcompress_kernels.sparse24_linear import cpu
from llmcompress_kernels.sparse24_linear.layout import expand_reference
from torch import Tensor

BF16, F16 = torch.bfloat16, torch.float16
WAYS = {"rows": BF16, "many": BF16, "panels": BF16, "panels, float16": F16}
SHAPES = [(1, 96, 71), (3, 576, 33), (17, 256, 70), (70, 1056, 40), (5, 8, 3), (20, 1000, 16)]  # tokens, columns, rows


def kernels() -> cpu.Kernels:
    found = cpu.native()
    if found is None:
        pytest.skip("no compiled kernels on this machine")
    return found


def inputs(tokens: int, columns: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Sparse24Weight, Tensor]:
    """Random weights at random positions; NaN around x."""
    generator = torch.Generator().manual_seed(tokens + columns + rows)
    kept = torch.randn(rows, columns // 2, generator=generator) / columns**0.5
    pairs = torch.tensor([first | second << 2 for second in range(4) for first in range(second)])
    nibbles = pairs[torch.randint(0, 6, (rows, columns // 4), generator=generator)]
    index = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    around = torch.full((tokens + 2, columns + 64), torch.nan, dtype=dtype)
    x = around[1:-1, 32:-32]
    x.copy_(torch.randn(tokens, columns, generator=generator))
    return x, from_sparse24(kept.to(dtype), index), torch.randn(rows, generator=generator).to(dtype)


def way(name: str) -> Any:
    return {"rows": kernels().by_rows, "many": kernels().of_many}.get(name, kernels().by_panels)


@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_as_exact_as_torch(name, tokens, columns, rows):
    if name == "rows" and not kernels()._has & cpu.FEW:
        pytest.skip("this CPU has no such code")
    x, weight, bias = inputs(tokens, columns, rows, WAYS[name])
    dense = expand_reference(weight, columns)
    torch.use_deterministic_algorithms(True)  # uninitialized memory is NaN
    try:
        for added in (bias, None):
            y = way(name)(x, weight, added)
            truth = torch.nn.functional.linear(x.double(), dense.double(), None if added is None else added.double())
            torch_error = relative_error(torch.nn.functional.linear(x, dense, added), truth)
            assert relative_error(y, truth) <= 2 * torch_error
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_compiler(monkeypatch):
    """The reference, as before."""
    x, weight, bias = inputs(3, 96, 40, BF16)
    expected = sparse24_linear(x, *weight, bias)
    monkeypatch.setenv(native.SWITCH, "0")
    native.library.cache_clear()
    cpu.native.cache_clear()
    try:
        assert cpu.native() is None
        assert relative_error(sparse24_linear(x, *weight, bias), expected.double()) <= 2**-7
    finally:
        native.library.cache_clear()
        cpu.native.cache_clear()
