"""What operators are compared with: the dense linear, torch's int4 operator, and packages that may be installed.

gemlite (Triton, pypi.org/project/gemlite) and marlin (CUDA, github.com/IST-DASLab/marlin) are measured if they can be
imported; neither is needed. Marlin computes in float16, with groups of 128 and without zero points.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from layers import Int4Layer
from torch import Tensor
from torch.nn.functional import linear

HERE = ""  # an implementation is there


@dataclass(frozen=True)
class Implementation:
    """One way to compute what an operator computes.

    prepare  weights -> what `call` takes beside x; never timed
    call     x [M, in] in `dtype`, prepared -> y [M, out]
    missing  device -> why it cannot run there, empty if it can
    """

    name: str
    prepare: Callable[[Any], Any]
    call: Callable[[Tensor, Any], Tensor]
    dtype: torch.dtype = torch.bfloat16
    missing: Callable[[torch.device], str] = lambda device: HERE


def needs(package: str) -> Callable[[torch.device], str]:
    """`missing` of an implementation in a package for NVIDIA GPUs that may not be installed."""

    def missing(device: torch.device) -> str:
        if device.type != "cuda":
            return f"runs on a GPU alone, this is {device.type}"
        return HERE if importlib.util.find_spec(package) else f"{package} is not installed"

    return missing


def torch_int4(layer: Int4Layer) -> tuple[Tensor, int, Tensor]:
    """Packed codes, group and [in / group, out, 2] scales with offsets: (code - 8) * scale + offset."""
    zero = torch.zeros_like(layer.scale) if layer.zero is None else (8 - layer.zero.to(layer.scale.dtype)) * layer.scale
    offsets = torch.stack([layer.scale, zero], dim=2).contiguous()
    if layer.codes.is_cuda:
        pairs = layer.codes[:, ::2] << 4 | layer.codes[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8), layer.group, offsets
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(layer.codes.int(), 1)
    return packed, layer.group, offsets


def call_torch_int4(x: Tensor, prepared: tuple[Tensor, int, Tensor]) -> Tensor:
    operator = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
    return operator(x, *prepared)


def gemlite_linear(layer: Int4Layer) -> Any:
    """A layer of gemlite with the same weight."""
    from gemlite.core import DType, GemLiteLinear

    rows, columns = layer.codes.shape
    made = GemLiteLinear(
        4, group_size=layer.group, in_features=columns, out_features=rows, input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )  # fmt: skip
    zero = torch.full_like(layer.scale, 8) if layer.zero is None else layer.zero.to(layer.scale.dtype)
    made.pack(layer.codes, layer.scale.T.contiguous(), zero.T.contiguous(), bias=None)
    return made


def marlin_linear(layer: Int4Layer) -> Any:
    """A layer of marlin with the same weight; packing goes through the CPU and takes seconds for large ones."""
    import marlin

    if layer.zero is not None or layer.group != 128:
        raise ValueError("marlin: takes groups of 128 without zero points")
    rows, columns = layer.codes.shape
    dense = torch.nn.Linear(columns, rows, bias=False, device=layer.codes.device, dtype=torch.float16)
    dense.weight.data = layer.dense(torch.float16)
    made = marlin.Layer(columns, rows, groupsize=layer.group).to(layer.codes.device)
    made.pack(dense, layer.scale.T.contiguous().to(torch.float16))
    return made


def call_module(x: Tensor, module: Any) -> Tensor:
    return module(x)


BF16 = Implementation("bf16", lambda layer: layer.dense(torch.bfloat16), linear)
TORCH_INT4 = Implementation("torch int4", torch_int4, call_torch_int4)
GEMLITE = Implementation("gemlite", gemlite_linear, call_module, missing=needs("gemlite"))
MARLIN = Implementation("marlin", marlin_linear, call_module, torch.float16, needs("marlin"))
