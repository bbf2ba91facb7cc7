"""Runs Triton kernels in Triton's interpreter, on the CPU, and prints how far they are from float64.

Its own process, because TRITON_INTERPRET must be set before triton is first imported. Standard input: a JSON list of
cases, as kernel_cases.py makes them; standard output: a JSON list with, for each, the relative errors of the kernel and
of torch in the same dtype. Uninitialized memory is filled with NaN, and so is what surrounds x and follows the scales
and the factors of LoRA, and columns that are left out: outputs which are not written and inputs which must not be read
both show.
Inline assembly is executed by ptx_fragments.py. A case with `capability` runs as on a GPU of that compute capability.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import ptx_fragments
import torch
from kernel_cases import int4_weight, relative_error
from llmcompress_kernels import Int4Weight
from llmcompress_kernels.int4_gated_mlp import launch as gated_mlp
from llmcompress_kernels.int4_gated_mlp.launch import int4_gated_mlp_triton
from llmcompress_kernels.int4_gated_mlp.reference import ACTIVATIONS, Gated, int4_gated_mlp_reference
from llmcompress_kernels.int4_linear import launch as linear4
from llmcompress_kernels.int4_linear.launch import dequantize, int4_linear_triton
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from llmcompress_kernels.int4_lora_linear import launch as lora
from llmcompress_kernels.int4_lora_linear.launch import int4_lora_linear_triton
from llmcompress_kernels.int4_lora_linear.reference import Adapter, int4_lora_linear_reference
from llmcompress_kernels.sparse24_int4_linear import from_sparse24_int4
from llmcompress_kernels.sparse24_int4_linear import launch as sparse24_int4
from llmcompress_kernels.sparse24_linear import from_sparse24
from llmcompress_kernels.sparse24_linear import launch as sparse24
from llmcompress_kernels.teal_linear.launch import teal_linear_triton
from sparse24_cases import stored_sparse24, stored_sparse24_int4
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime.interpreter import InterpretedFunction

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
CHOOSING = (linear4, gated_mlp, lora, sparse24)  # launchers that look at the compute capability
PROCESSORS = 4  # few, so that small shapes have one, two or more splits


class Results(NamedTuple):
    """One case: by the kernels, in float64, and by torch in the dtype of the case."""

    kernel: Tensor
    truth: Tensor
    torch: Tensor
    unpacked: bool = True  # whether the dequantized weight has the bits that torch gives; seldom looked at
    repeated: bool = True  # whether a second call gave the same bits; seldom looked at


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


class Inputs:
    """Random tensors of one case; each call goes on in the same sequence."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.dtype = case, getattr(torch, case["dtype"])
        self.generator = torch.Generator().manual_seed(case["tokens"] + case["rows"] + case["columns"])

    def weight(self) -> Int4Weight:
        shape = (self.case["rows"], self.case["columns"], self.case["group"], not self.case["zero"])
        weight = int4_weight(*shape, self.dtype, self.generator)
        return weight._replace(scale=followed_by_nan(weight.scale))

    def bias(self) -> Tensor | None:
        return self.random(self.case["rows"]) if self.case["bias"] else None

    def x(self) -> Tensor:
        return guarded(self.random(self.case["tokens"], self.case["columns"]), self.case["transposed"])

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def values(self, weight: Int4Weight) -> Tensor:
        """The unpacked weight, as torch alone would multiply with it."""
        return dequantize_reference(weight, self.case["columns"], torch.float64).to(self.dtype)


def int4_linear(inputs: Inputs) -> Results:
    weight, bias, x = inputs.weight(), inputs.bias(), inputs.x()
    exact = dequantize_reference(weight, x.shape[1], torch.float64)
    truth = linear(x.double(), exact, None if bias is None else bias.double())
    same = len(x) > 1 or torch.equal(dequantize(weight, x.shape[1], x.dtype), exact.to(x.dtype))
    found = int4_linear_triton(x, weight, bias, PROCESSORS)
    return Results(found, truth, linear(x, inputs.values(weight), bias), same)


def int4_gated_mlp(inputs: Inputs) -> Results:
    weights, x = Gated(inputs.weight(), inputs.weight(), inputs.bias(), inputs.bias()), inputs.x()
    activation = inputs.case["activation"]
    gate = linear(x, inputs.values(weights.gate), weights.gate_bias)
    by_torch = ACTIVATIONS[activation](gate) * linear(x, inputs.values(weights.up), weights.up_bias)
    truth = int4_gated_mlp_reference(x, weights, activation, torch.float64)
    return Results(int4_gated_mlp_triton(x, weights, activation, PROCESSORS), truth, by_torch)


def int4_lora_linear(inputs: Inputs) -> Results:
    weight, bias, x, rank = inputs.weight(), inputs.bias(), inputs.x(), inputs.case["rank"]
    a, b = inputs.random(rank, x.shape[1]) / x.shape[1] ** 0.5, inputs.random(inputs.case["rows"], rank) / rank**0.5
    adapter = Adapter(a, followed_by_nan(b), 1.5)
    by_torch = linear(x, inputs.values(weight), bias) + adapter.scaling * linear(linear(x, a), b)
    truth = int4_lora_linear_reference(x, weight, bias, adapter, torch.float64)
    return Results(int4_lora_linear_triton(x, weight, bias, adapter, PROCESSORS), truth, by_torch)


def sparse24_linear(inputs: Inputs) -> Results:
    rows, columns = inputs.case["rows"], inputs.case["columns"]
    kept, index, whole = stored_sparse24(rows, columns, inputs.dtype, inputs.generator)
    weight, bias, x = from_sparse24(kept, index), inputs.bias(), inputs.x()
    weight = weight._replace(values=followed_by_nan(weight.values))
    same = len(x) > 1 or torch.equal(sparse24.expand(weight, columns), whole)
    truth = linear(x.double(), whole.double(), None if bias is None else bias.double())
    found = sparse24.sparse24_linear_triton(x, weight, bias, PROCESSORS)
    return Results(found, truth, linear(x, whole, bias), same)


def sparse24_int4_linear(inputs: Inputs) -> Results:
    rows, columns, group = inputs.case["rows"], inputs.case["columns"], inputs.case["group"]
    *stored, exact = stored_sparse24_int4(rows, columns, group, inputs.dtype, inputs.generator)
    weight, bias, x = from_sparse24_int4(*stored), inputs.bias(), inputs.x()
    weight = weight._replace(scale=followed_by_nan(weight.scale))
    values = exact.to(inputs.dtype)
    same = len(x) > 1 or torch.equal(sparse24_int4.dequantize(weight, columns), values)
    truth = linear(x.double(), exact, None if bias is None else bias.double())
    found = sparse24_int4.sparse24_int4_linear_triton(x, weight, bias, PROCESSORS, inputs.case["sparse_cores"])
    return Results(found, truth, linear(x, values, bias), same)


def teal_linear(inputs: Inputs) -> Results:
    threshold, bias, x = inputs.case["threshold"], inputs.bias(), inputs.x()
    columns = inputs.random(x.shape[1], inputs.case["rows"]) / x.shape[1] ** 0.5
    small = x.float().abs() <= threshold
    masked = x.masked_fill(small, 0)
    truth = linear(masked.double(), columns.T.double(), None if bias is None else bias.double())
    by_torch = linear(masked, columns.T, bias)
    if len(x) == 1:  # of several tokens, each has columns of its own, and none is left out
        columns[small[0]] = torch.nan
    found, again = (teal_linear_triton(x, columns, threshold, bias, PROCESSORS) for _ in range(2))
    return Results(found, truth, by_torch, repeated=torch.equal(found, again))


OPERATORS: dict[str, Callable[[Inputs], Results]] = {
    "int4_linear": int4_linear,
    "int4_gated_mlp": int4_gated_mlp,
    "int4_lora_linear": int4_lora_linear,
    "sparse24_linear": sparse24_linear,
    "sparse24_int4_linear": sparse24_int4_linear,
    "teal_linear": teal_linear,
}


@contextmanager
def on_a_gpu(capability: int) -> Iterator[None]:
    """Launchers take x for one on a GPU of that compute capability's first number; 0: on none, as it is."""
    with ExitStack() as stack:
        for launcher in CHOOSING:
            stack.enter_context(mock.patch.object(launcher, "capability_of", return_value=capability))
        yield


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels that are started, in their order."""
    started: list[str] = []
    run = InterpretedFunction.run

    def noted(kernel: Any, *given: Any, **options: Any) -> Any:
        started.append(kernel.fn.__name__)
        return run(kernel, *given, **options)

    with mock.patch.object(InterpretedFunction, "run", noted):
        yield started


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case: the kernels that `launch` takes for its shape, against float64 and against torch."""
    with on_a_gpu(case.get("capability", 0)), launches() as started:
        results = OPERATORS[case["operator"]](Inputs(case))
    return {
        "kernels": started,
        "kernel": relative_error(results.kernel, results.truth),
        "torch": relative_error(results.torch, results.truth),
        "unpacked": results.unpacked,
        "repeated": results.repeated,
        "dtype": str(results.kernel.dtype),
        "shape": list(results.kernel.shape),
    }


def main() -> None:
    """Measures all cases of standard input."""
    poison = torch.ones(3).new_empty(2, 2)
    if not bool(poison.isnan().all() and torch.empty(3).isnan().all()):
        raise SystemExit("uninitialized memory is not NaN, so a missing output would not be seen")
    ptx_fragments.install()
    json.dump([measure(case) for case in json.load(sys.stdin)], sys.stdout)


main()
