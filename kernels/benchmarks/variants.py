"""What is not timed but has to be right: biases, float16, activations, strides of x, and kernels of older GPUs.

cases.py times operators in bfloat16, without biases, on contiguous x. Here each of them runs once in the other ways,
against float64, and twice in each, for the same bits. The limit is that of `measuring.check`: twice the error of torch
in the same dtype.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from int4_cases import int4_weight
from layers import Int4Layer, int4_layer
from llmcompress_kernels import int4_gated_mlp, int4_linear, int4_lora_linear, sparse24_int4_linear, sparse24_linear
from llmcompress_kernels.int4_gated_mlp.reference import ACTIVATIONS
from sparse_cases import sparse24_int4_weight, sparse24_weight, sparse_layer
from torch import Tensor
from torch.nn.functional import linear

ROWS, COLUMNS, GROUP = 130, 576, 64
TOKENS = (1, 5, 33)
WRONG = 2.0  # times the error of torch in the same dtype
RANK, SCALING = 20, 1.5


@dataclass(frozen=True)
class Variant:
    """Of an operator: what it computes, and the same in torch, which in float64 is the truth.

    ours      x, bias -> y; with weights that it holds
    by_torch  x, bias and the dtype of everything -> y
    """

    operator: str
    name: str
    ours: Callable[[Tensor, Tensor | None], Tensor]
    by_torch: Callable[[Tensor, Tensor | None, torch.dtype], Tensor]
    dtype: torch.dtype


def variants(device: torch.device) -> Iterator[Variant]:
    """All operators on int4 and 2:4 weights, in both dtypes; the gated MLP with every activation."""
    for dtype in (torch.bfloat16, torch.float16):
        generator = torch.Generator(device).manual_seed(7)
        layer, other = (in_dtype(int4_layer(ROWS, COLUMNS, GROUP, False, generator), dtype) for _ in range(2))
        yield linear_variant(layer, dtype)
        for activation in ACTIVATIONS:
            yield gated_variant(layer, other, activation, dtype)
        yield adapted_variant(layer, dtype, generator)
        yield from sparse_variants(dtype, generator)


def in_dtype(layer: Int4Layer, dtype: torch.dtype) -> Int4Layer:
    """With scales of that dtype."""
    return Int4Layer(layer.codes, layer.scale.to(dtype), layer.zero)


def as_dense(x: Tensor, layer: Int4Layer, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + bias with everything in `dtype`."""
    return linear(x.to(dtype), layer.dense(dtype), None if bias is None else bias.to(dtype))


def linear_variant(layer: Int4Layer, dtype: torch.dtype) -> Variant:
    weight = int4_weight(layer)
    return Variant(
        "int4_linear", "", lambda x, bias: int4_linear(x, *weight, bias),
        lambda x, bias, to: as_dense(x, layer, bias, to), dtype,
    )  # fmt: skip


def gated_variant(gate: Int4Layer, up: Int4Layer, activation: str, dtype: torch.dtype) -> Variant:
    """Both weights have the same bias."""
    weights, act = (int4_weight(gate), int4_weight(up)), ACTIVATIONS[activation]
    return Variant(
        "int4_gated_mlp", activation, lambda x, bias: int4_gated_mlp(x, *weights, activation, bias, bias),
        lambda x, bias, to: act(as_dense(x, gate, bias, to)) * as_dense(x, up, bias, to), dtype,
    )  # fmt: skip


def adapted_variant(layer: Int4Layer, dtype: torch.dtype, generator: torch.Generator) -> Variant:
    weight = int4_weight(layer)
    a, b = (
        torch.randn(size, generator=generator, device=generator.device).mul_(scale).to(dtype)
        for size, scale in (((RANK, COLUMNS), COLUMNS**-0.5), ((ROWS, RANK), 0.1))
    )

    def by_torch(x: Tensor, bias: Tensor | None, to: torch.dtype) -> Tensor:
        return as_dense(x, layer, bias, to) + SCALING * linear(linear(x.to(to), a.to(to)), b.to(to))

    return Variant(
        "int4_lora_linear", f"rank {RANK}", lambda x, bias: int4_lora_linear(x, weight, a, b, SCALING, bias), by_torch,
        dtype,
    )  # fmt: skip


def sparse_variants(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Variant]:
    """Both operators on 2:4 weights, and the kernels of the second that do without sparse tensor cores."""
    made = sparse_layer(ROWS, COLUMNS, GROUP, True, generator)
    layer = made._replace(layer=in_dtype(made.layer, dtype))
    packed, packed4 = sparse24_weight(layer, dtype), sparse24_int4_weight(layer)

    def by_torch(x: Tensor, bias: Tensor | None, to: torch.dtype) -> Tensor:
        return as_dense(x, layer.layer, bias, to)

    yield Variant("sparse24_linear", "", lambda x, bias: sparse24_linear(x, *packed, bias), by_torch, dtype)
    yield Variant("sparse24_int4_linear", "", lambda x, bias: sparse24_int4_linear(x, *packed4, bias), by_torch, dtype)
    if generator.device.type == "cuda":
        from llmcompress_kernels.sparse24_int4_linear.launch import sparse24_int4_linear_triton

        processors = torch.cuda.get_device_properties(generator.device).multi_processor_count
        yield Variant(
            "sparse24_int4_linear", "portable",
            lambda x, bias: sparse24_int4_linear_triton(x, packed4, bias, processors, sparse_cores=False), by_torch,
            dtype,
        )  # fmt: skip


def check_variants(device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows like those of `measuring.check`: all variants x M x bias x strides of x."""
    generator = torch.Generator(device).manual_seed(8)
    ways = list(itertools.product(TOKENS, (False, True), (False, True)))
    for variant, (tokens, biased, strided) in itertools.product(list(variants(device)), ways):
        x = torch.randn(tokens, COLUMNS, generator=generator, device=device).to(variant.dtype)
        bias = torch.randn(ROWS, generator=generator, device=device).to(variant.dtype) if biased else None
        row = {"operator": variant.operator, "name": variant.operator, "variant": variant.name, "tokens": tokens,
               "dtype": str(variant.dtype), "bias": biased, "strided": strided}  # fmt: skip
        yield row | compared(variant, x.T.contiguous().T if strided else x, bias)


def compared(variant: Variant, x: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """Errors of the operator and of torch, and whether a second call gives the same bits."""
    try:
        found, again = (variant.ours(x, bias) for _ in range(2))
    except Exception as problem:  # another variant may run all the same, and the report says it
        return {"failed": f"{type(problem).__name__}: {problem}", "right": False}
    truth = variant.by_torch(x, bias, torch.float64)
    error, limit = (
        float((y.double() - truth).norm() / truth.norm()) for y in (found, variant.by_torch(x, bias, x.dtype))
    )
    same = torch.equal(found, again)
    return {"error": error, "torch_error": limit, "repeated": same, "right": same and error <= WRONG * limit}
