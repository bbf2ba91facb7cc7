"""What an operator of llmcompress_kernels is to a model, and the one that multiplies with int4 weights.

`runtime/table.py` has the rows.

Repacking works on some rows of a weight at a time, so that what it needs beside the two packed weights is a few MiB.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from llmcompress_kernels import Int4Weight, from_pack_quantized, int4_linear, to_pack_quantized
from llmcompress_kernels.checks import DEVICES, FLOATS, unsupported
from llmcompress_kernels.int4_linear.layout import GROUPS, PLANES, TILE, WIDTH
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from torch import Tensor

Shape = tuple[int, int]  # out, in
Weight = Any  # a named tuple of tensors, or None for one that is absent; of the operator's own class
Tensors = Mapping[str, Tensor]  # of a file, by their names below the module

PANEL = 1 << 20  # weights that are repacked at once


@dataclass(frozen=True, slots=True)
class Operator:
    """A linear on packed weights: which it takes, and how they get into its layout and back."""

    name: str
    weight: Any  # the class of its weights, a named tuple
    floats: str  # the field of the weight that has the dtype of x
    refuses: Callable[[Tensors, Shape], str | None]  # why these tensors, which fit each other, are not for it
    pack: Callable[[Tensors, Shape], Weight]  # raises ValueError if sizes or dtypes contradict each other
    stored: Callable[[Weight, Shape], dict[str, Tensor]]  # the reverse of `pack`, exactly
    dense: Callable[[Weight, Shape], Tensor]  # [out, in] in the dtype of the floats
    compute: Callable[[Tensor, Weight, Tensor | None], Tensor]  # x [..., in], weight, bias -> [..., out]


def int4_refuses(tensors: Tensors, shape: Shape) -> str | None:
    """Groups, dtypes and devices that the kernels do not have."""
    scale, columns = tensors["weight_scale"], shape[1]
    if scale.device.type not in DEVICES or scale.is_meta:
        return "its tensors are offloaded" if scale.is_meta else f"there is no kernel for {scale.device.type}"
    if (why := gpu_refuses(scale.device)) is not None:
        return why
    if scale.dtype not in FLOATS:
        return f"it is computed in {dtype_name(scale.dtype)}, the kernels' dtypes are bfloat16 and float16"
    if scale.ndim != 2:
        return "one scale for the whole weight"
    groups = scale.shape[1]
    if groups and columns % groups == 0 and columns // groups in GROUPS:
        return None
    return "one scale for each row" if groups == 1 else f"{groups} scales for rows of {columns}"


def gpu_refuses(device: torch.device) -> str | None:
    """Why the kernels do not run on a GPU; None on one that they run on, and on anything else."""
    lacking = unsupported(device) if device.type == "cuda" else None
    return None if lacking is None else f"it is {lacking[0]}, expected {lacking[1]}"


def int4_pack(tensors: Tensors, shape: Shape) -> Int4Weight:
    """`pack-quantized` tensors of 4 bits, with or without weight_zero_point."""
    packed, scale, zero_point = (tensors.get(f"weight_{leaf}") for leaf in ("packed", "scale", "zero_point"))
    assert packed is not None
    assert scale is not None
    out, columns = shape
    if tuple(packed.shape) != (out, -(-columns // PLANES)) or scale.shape[0] != out:
        raise ValueError(f"weight_packed is {list(packed.shape)} and weight_scale {list(scale.shape)} for {shape}")
    groups, device = scale.shape[1], packed.device
    weight = Int4Weight(
        torch.empty(-(-columns // TILE), out, WIDTH, dtype=torch.int32, device=device),
        torch.empty(groups, out, dtype=scale.dtype, device=device),
        None if zero_point is None else torch.empty(groups, out, dtype=torch.uint8, device=device),
    )
    for rows in panels(shape):
        words_of_rows = slice(rows.start // PLANES, -(-rows.stop // PLANES))
        zeros = None if zero_point is None else zero_point[words_of_rows]
        for whole, part in zip(weight, from_pack_quantized(packed[rows], scale[rows], zeros, columns), strict=True):
            if whole is not None and part is not None:
                whole[:, rows] = part
    return weight


def int4_stored(weight: Int4Weight, shape: Shape) -> dict[str, Tensor]:
    """weight_packed, weight_scale, weight_shape, and weight_zero_point if there are zeros."""
    parts = [to_pack_quantized(int4_rows(weight, rows), shape[1]) for rows in panels(shape)]
    packed, scale, zero_point = zip(*parts, strict=True)
    tensors = {
        "weight_packed": torch.cat(packed),
        "weight_scale": torch.cat(scale),
        "weight_shape": torch.tensor(shape, device=weight.words.device),
    }
    return tensors if weight.zero is None else tensors | {"weight_zero_point": torch.cat(zero_point)}


def int4_dense(weight: Int4Weight, shape: Shape) -> Tensor:
    """(code - zero) * scale, rounded once."""
    dense = weight.scale.new_empty(shape)
    for rows in panels(shape):
        dense[rows] = dequantize_reference(int4_rows(weight, rows), shape[1], dense.dtype)
    return dense


def int4_compute(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """By the registered operator, which finds the kernel for the device."""
    return int4_linear(x, *weight, bias)


def int4_rows(weight: Int4Weight, rows: slice) -> Int4Weight:
    """Some rows of a weight."""
    zero = None if weight.zero is None else weight.zero[:, rows].contiguous()
    return Int4Weight(weight.words[:, rows].contiguous(), weight.scale[:, rows].contiguous(), zero)


def panels(shape: Shape) -> Iterator[slice]:
    """Rows of about PANEL weights; each begins at a multiple of eight, as words of zero points do."""
    rows, columns = shape
    step = max(PANEL // max(columns, 1) // PLANES, 1) * PLANES
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def dtype_name(dtype: torch.dtype) -> str:
    """As transformers spells it."""
    return str(dtype).removeprefix("torch.")


INT4 = Operator("int4_linear", Int4Weight, "scale", int4_refuses, int4_pack, int4_stored, int4_dense, int4_compute)
