"""Runs the Triton kernel of `teal_linear` in Triton's interpreter, and prints how far it is from float64.

Its own process, because TRITON_INTERPRET must be set before triton is first imported. Standard input: a JSON list of
cases, as test_kernels_teal_linear.py makes them; standard output: a JSON list with, for each, the relative errors of
the kernel and of torch in the same dtype. Uninitialized memory is NaN, and so are the columns of all small inputs and
what follows x: outputs which are not written and columns which must not be read both show.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from kernel_cases import relative_error
from llmcompress_kernels.teal_linear import launch

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
PROCESSORS = 4  # few, so that small shapes have one, two or more splits


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case: the kernel against float64 and against torch."""
    generator = torch.Generator().manual_seed(case["rows"] + case["columns"])
    dtype, columns = getattr(torch, case["dtype"]), case["columns"]
    x = torch.randn(case["tokens"], columns, generator=generator).to(dtype)
    around = torch.full((case["tokens"], columns + 64), torch.nan, dtype=dtype)
    inside = around[:, :columns].copy_(x)
    weight = torch.randn(columns, case["rows"], generator=generator).div(columns**0.5).to(dtype)
    bias = torch.randn(case["rows"], generator=generator).to(dtype) if case["bias"] else None
    small = x.float().abs() <= case["threshold"]
    masked = x.masked_fill(small, 0)
    wide = None if bias is None else bias.double()
    truth = torch.nn.functional.linear(masked.double(), weight.T.double(), wide)
    in_torch = relative_error(torch.nn.functional.linear(masked, weight.T, bias), truth)
    if case["tokens"] == 1:  # each token has columns of its own; only one token leaves them out
        weight[small[0]] = torch.nan
    found = launch.teal_linear_triton(inside, weight, case["threshold"], bias, PROCESSORS)
    again = launch.teal_linear_triton(inside, weight, case["threshold"], bias, PROCESSORS)
    return {
        "kernel": relative_error(found, truth),
        "torch": in_torch,
        "same": torch.equal(found, again),
        "dtype": str(found.dtype),
        "shape": list(found.shape),
    }


def main() -> None:
    """Measures all cases of standard input."""
    if not bool(torch.empty(3).isnan().all()):
        raise SystemExit("uninitialized memory is not NaN, so a missing output would not be seen")
    json.dump([measure(case) for case in json.load(sys.stdin)], sys.stdout)


main()
