"""`int4_linear` on a CPU by torch's own operators, where C++ cannot be compiled.

Few tokens: `_weight_int4pack_mm_for_cpu`, bfloat16 only. It wants codes in an order of its own, so the weight is
converted when it is first used. Converted weights are kept as long as their words live, and at most KEPT_BYTES of them:
beyond that, and for everything else, panels of rows are unpacked to the dtype of x at each call, and torch multiplies.
"""

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..crossover import crossover
from .layout import Int4Weight, from_tiles, sample_weight
from .reference import dequantize_reference

KEPT_BYTES = 256 << 20  # of converted weights in this process: a large model is not held twice
PANEL_VALUES = 1 << 20  # of a weight that are unpacked at once, by way of float32
ROW_UNIT = 16  # torch's operator takes outputs in multiples of it


def int4_linear_torch(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [M, in] -> [M, out], M and out at least 1."""
    shape = weight.words.shape[1], x.shape[1]
    if x.dtype == torch.bfloat16 and shape[0] % ROW_UNIT == 0 and converted().takes(weight):
        ways = by_torch_int4, by_panels
        if x.shape[0] == 1 or x.shape[0] < crossover("int4_linear torch", x.dtype, *ways, sample_weight, shape):
            return by_torch_int4(x, weight, bias)
    return by_panels(x, weight, bias)


def by_panels(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """Rows of the weight are unpacked, some at a time, and multiplied."""
    columns, rows = x.shape[1], weight.words.shape[1]
    count = max(PANEL_VALUES // columns, 1)
    y = x.new_empty(x.shape[0], rows)
    for first in range(0, rows, count):
        some = slice(first, first + count)
        zero = None if weight.zero is None else weight.zero[:, some]
        panel = dequantize_reference(Int4Weight(weight.words[:, some], weight.scale[:, some], zero), columns)
        y[:, some] = torch.nn.functional.linear(x, panel.to(x.dtype), None if bias is None else bias[some])
    return y


def by_torch_int4(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """torch's operator, whose weight is (code - 8) * scale + offset."""
    codes, grid = converted().of(weight, x.shape[1])
    group = x.shape[1] // weight.scale.shape[0]
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, group, grid)
    return y if bias is None else y + bias


class Converted:
    """Weights in the order of torch's operator, found by their words as long as these live and are not changed."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def takes(self, weight: Int4Weight) -> bool:
        """Whether the weight is here, or there is room for it."""
        size = weight.words.nbytes + 4 * weight.scale.numel()
        used = sum(codes.nbytes + grid.nbytes for _, codes, grid in self._kept.values())
        return weight.words in self._kept or used + size <= KEPT_BYTES

    def of(self, weight: Int4Weight, columns: int) -> tuple[Tensor, Tensor]:
        """Codes, and scales with offsets."""
        state = [changes(tensor) for tensor in weight]
        kept = self._kept.get(weight.words)
        if kept is None or kept[0] != state:
            kept = state, *convert(weight, columns)
            self._kept[weight.words] = kept
        return kept[1], kept[2]


@functools.cache
def converted() -> Converted:
    """Those of this process."""
    return Converted()


def changes(tensor: Tensor | None) -> tuple[int, int]:
    """Differs after the tensor was written to, as far as torch counts that."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def convert(weight: Int4Weight, columns: int) -> tuple[Tensor, Tensor]:
    """codes uint8 [out, in / 2], scale and offset [in / g, out, 2], as torch's operator wants them."""
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(from_tiles(weight.words, columns).to(torch.int32), 1)
    zero = 8.0 if weight.zero is None else weight.zero.to(torch.float32)
    offset = (8.0 - zero) * weight.scale.to(torch.float32)
    grid = torch.stack([weight.scale, offset.to(weight.scale.dtype)], dim=-1).contiguous()
    return codes, grid
