"""Runs Triton kernels in Triton's interpreter, on the CPU, and prints how far they are from float64.

Its own process, because TRITON_INTERPRET must be set before triton is first imported. Standard input: a JSON list of
cases, as test_kernels_int4_linear.py makes them; standard output: a JSON list with, for each, the relative errors of
the kernel and of torch in the same dtype. Uninitialized memory is filled with NaN, and so is what surrounds x and
follows the scales: outputs which are not written and inputs which must not be read both show.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from llmcompress_kernels.int4_linear import launch
from llmcompress_kernels.int4_linear.layout import Int4Weight, to_tiles
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from torch import Tensor

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
PROCESSORS = 4  # few, so that small shapes have one, two or more splits


def weight_and_bias(case: dict[str, Any], generator: torch.Generator) -> tuple[Int4Weight, Tensor | None]:
    """A random weight as a model has it: codes of all 16 values, scales around 1 / sqrt(in)."""
    rows, columns, dtype = case["rows"], case["columns"], getattr(torch, case["dtype"])
    size = (columns // case["group"], rows)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = ((torch.rand(size, generator=generator) + 0.5) / (8 * columns**0.5)).to(dtype)
    zero = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8) if case["zero"] else None
    bias = torch.randn(rows, generator=generator).to(dtype) if case["bias"] else None
    return Int4Weight(to_tiles(codes), followed_by_nan(scale), zero), bias


def followed_by_nan(tensor: Tensor) -> Tensor:
    """The same contiguous tensor in a memory block that goes on with NaN."""
    block = torch.cat([tensor.flatten(), torch.full((1024,), torch.nan, dtype=tensor.dtype)])
    return block[: tensor.numel()].view(tensor.shape)


def guarded(x: Tensor, transposed: bool) -> Tensor:
    """x as part of a larger tensor of NaN; `transposed`: neighbouring columns are far apart in memory."""
    around = torch.full((x.shape[0] + 2, x.shape[1] + 48), torch.nan, dtype=x.dtype)
    around = around.T.contiguous().T if transposed else around
    inside = around[1:-1, 16 : 16 + x.shape[1]]
    return inside.copy_(x)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth; NaN if anything is NaN."""
    if truth.numel() == 0:
        return 0.0
    return float((found.double() - truth).norm() / truth.norm())


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case: the kernels that `launch` takes for its shape, against float64 and against torch.

    `unpacked`: whether the dequantized weight has the bits that torch gives; looked at where there is one token.
    """
    generator = torch.Generator().manual_seed(case["tokens"] + case["rows"] + case["columns"])
    weight, bias = weight_and_bias(case, generator)
    columns, dtype = case["columns"], getattr(torch, case["dtype"])
    x = guarded(torch.randn(case["tokens"], columns, generator=generator).to(dtype), case["transposed"])
    exact = dequantize_reference(weight, columns, torch.float64)
    truth = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
    found = launch.int4_linear_triton(x, weight, bias, PROCESSORS)
    unpacked = case["tokens"] > 1 or torch.equal(launch.dequantize(weight, columns, dtype), exact.to(dtype))
    return {
        "kernel": relative_error(found, truth),
        "torch": relative_error(torch.nn.functional.linear(x, exact.to(dtype), bias), truth),
        "unpacked": unpacked,
        "dtype": str(found.dtype),
    }


def main() -> None:
    """Measures all cases of standard input."""
    poison = torch.ones(3).new_empty(2, 2)
    if not bool(poison.isnan().all() and torch.empty(3).isnan().all()):
        raise SystemExit("uninitialized memory is not NaN, so a missing output would not be seen")
    json.dump([measure(case) for case in json.load(sys.stdin)], sys.stdout)


main()
