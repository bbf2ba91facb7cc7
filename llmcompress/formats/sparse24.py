"""`sparse24` and `sparse24-int4`: two of every four weights, and where they are. Version 1; see docs/formats.md.

Of every four neighbouring input columns two are stored, in the order of their columns, and for each of them a 2-bit
position 0 .. 3. Where fewer than two are not zero, zeros fill up the smallest free positions; so positions rise within
every four, and equal weights have equal bytes. Per linear [out, in], `in` a multiple of 8:

    sparse24        weight         dtype  [out, in / 2]   the stored weights
                    weight_index   uint8  [out, in / 8]   four positions a byte, the first in the lowest bits

    sparse24-int4   weight         uint8  [out, in / 4]   two codes a byte, the first in the low nibble
                    weight_index   uint8  [out, in / 8]   as above
                    weight_scale   dtype  [out, in / g]   value = (code - 8) scale, groups of g input columns

That is 9 bits per weight, and 3 bits and the scales. The tensor is called `weight`, with a shape of its own, so that a
loader which does not know the format stops at the shape instead of starting from random weights.
"""

from collections.abc import Mapping
from typing import Any

from llmcompress.errors import FormatError
from llmcompress.grid import IntGrid
from llmcompress.lazy import Tensor, torch
from llmcompress.weight import CompressedWeight, Kind

VERSION = 1
METHOD = "llmcompress"  # quant_method in config.json


class Sparse24:
    """2:4 values in the dtype of the checkpoint, 9 bits per weight."""

    name = "sparse24"
    suffix = "weight_index"

    def refuses(self, kind: Kind, shape: tuple[int, int], transposed: bool) -> str | None:
        """Only 2:4 weights of plain linears have this form."""
        if transposed:
            return "Conv1D weights have no packed form"
        if kind.pattern is None or (kind.pattern.kind, kind.pattern.m) != ("n:m", 4) or kind.pattern.n > 2:
            found = f"pattern {kind.pattern}" if kind.pattern else "no pruning step"
            return f"it stores two of every four weights, and the steps for it have {found}; prune with pattern 2:4"
        return f"{shape[1]} input columns are no multiple of 8" if shape[1] % 8 else None

    def stored_bytes(self, kind: Kind, shape: tuple[int, int], itemsize: int) -> int:
        """Half of the weights and 2 bits for each."""
        return shape[0] * (shape[1] // 2 * itemsize + shape[1] // 8)

    def pack(self, weight: CompressedWeight, transposed: bool) -> dict[str, Tensor]:
        """The weights that are not zero, and their positions. Raises FormatError if it is not 2:4."""
        position = positions(weight.values != 0)
        return {"weight": chosen(weight.values, position), "weight_index": pack_positions(position)}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any] | None, transposed: bool) -> Tensor:
        """The values. Raises FormatError if the tensors do not fit each other or the format."""
        _, columns = self.shape(tensors)
        check_positions(tensors, columns)
        return self.values(tensors)

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The values of tensors that `check` has seen."""
        return spread(tensors["weight"], positions_of(tensors["weight_index"]))

    def read(self, tensors: Mapping[str, Tensor], kind: Kind, transposed: bool) -> CompressedWeight:
        """The values."""
        return CompressedWeight(self.unpack(tensors, None, transposed))

    def placeholders(self, shape: tuple[int, int], dtype: "torch.dtype") -> dict[str, Tensor]:
        """Tensors of the right kind without content, for a loader to fill."""
        rows, columns = shape
        return {
            "weight": torch.empty(rows, columns // 2, dtype=dtype, device="meta"),
            "weight_index": torch.empty(rows, columns // 8, dtype=torch.uint8, device="meta"),
        }

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raise FormatError unless the tensors hold a weight of this shape."""
        found = self.shape(tensors)
        if found != shape:
            raise FormatError(f"{self.name}: the tensors hold a weight of {list(found)}, expected {list(shape)}")
        check_positions(tensors, shape[1])

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[out, in] by the stored weights. Raises FormatError."""
        stored = tensors.get("weight")
        if stored is None or not is_real(stored) or stored.ndim != 2:
            raise FormatError(f"sparse24: weight is {describe(stored)}, expected floats [out, in / 2]")
        return stored.shape[0], stored.shape[1] * 2

    def config(self, kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any] | None:
        """Which linears are stored so."""
        return {"quant_method": METHOD, "version": VERSION, "format": self.name, "modules": sorted(kinds)}


class Sparse24Int4(Sparse24):
    """2:4 values on a symmetric 4-bit grid, 3 bits per weight and the scales."""

    name = "sparse24-int4"

    def refuses(self, kind: Kind, shape: tuple[int, int], transposed: bool) -> str | None:
        """Only symmetric 4-bit 2:4 weights of plain linears have this form."""
        if kind.bits != 4 or not kind.symmetric:
            return "it stores symmetric 4-bit codes; quantize with bits: 4 and symmetric: true"
        return super().refuses(kind, shape, transposed)

    def stored_bytes(self, kind: Kind, shape: tuple[int, int], itemsize: int) -> int:
        """Half of the codes, 2 bits for each, and the scales."""
        rows, columns = shape
        return rows * (columns // 4 + columns // 8 + columns // kind.group(columns) * itemsize)

    def pack(self, weight: CompressedWeight, transposed: bool) -> dict[str, Tensor]:
        """The codes of the weights that are not zero, their positions, and the scales."""
        codes, grid = weight.codes, weight.grid
        if codes is None or grid is None or grid.bits != 4 or not grid.symmetric:
            raise FormatError("sparse24-int4 stores codes on a symmetric 4-bit grid, and this weight has none")
        position = positions(weight.values != 0)
        kept = chosen(codes, position)
        return {
            "weight": kept[:, 0::2] | kept[:, 1::2] << 4,
            "weight_index": pack_positions(position),
            "weight_scale": grid.scale.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any] | None, transposed: bool) -> Tensor:
        """The values. Raises FormatError if the tensors do not fit each other or the format."""
        return self.read(tensors, Kind(), transposed).values

    def read(self, tensors: Mapping[str, Tensor], kind: Kind, transposed: bool) -> CompressedWeight:
        """The values, their codes and their grid."""
        check_positions(tensors, self.shape(tensors)[1])
        return self.decoded(tensors)

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The values of tensors that `check` has seen."""
        return self.decoded(tensors).values

    def decoded(self, tensors: Mapping[str, Tensor]) -> CompressedWeight:
        """Codes and grid of tensors that are as they should be."""
        stored, scale = tensors["weight"], tensors["weight_scale"]
        kept = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)
        codes = spread(kept, positions_of(tensors["weight_index"]), fill=8)
        group = codes.shape[1] // scale.shape[1]
        zero = torch.full(scale.shape, 8, dtype=torch.int32, device=scale.device)
        return CompressedWeight.on_grid(codes, IntGrid(4, group, True, scale, zero))

    def placeholders(self, shape: tuple[int, int], dtype: "torch.dtype") -> dict[str, Tensor]:
        """Tensors of the right kind without content, for a loader to fill; the groups are the file's."""
        rows, columns = shape
        return {
            "weight": torch.empty(rows, columns // 4, dtype=torch.uint8, device="meta"),
            "weight_index": torch.empty(rows, columns // 8, dtype=torch.uint8, device="meta"),
            "weight_scale": torch.empty(rows, 1, dtype=dtype, device="meta"),
        }

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[out, in] by the stored codes, which the scales must fit. Raises FormatError."""
        stored, scale = tensors.get("weight"), tensors.get("weight_scale")
        if stored is None or stored.dtype != torch.uint8 or stored.ndim != 2:
            raise FormatError(f"sparse24-int4: weight is {describe(stored)}, expected uint8 [out, in / 4]")
        rows, columns = stored.shape[0], stored.shape[1] * 4
        if scale is None or not is_real(scale) or scale.ndim != 2 or scale.shape[0] != rows:
            raise FormatError(f"sparse24-int4: weight_scale is {describe(scale)}, expected floats [{rows}, in / group]")
        if scale.shape[1] == 0 or columns % scale.shape[1]:
            raise FormatError(f"sparse24-int4: {scale.shape[1]} groups do not divide {columns} input columns")
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise FormatError("sparse24-int4: a scale is zero, negative, infinite or no number; the file is damaged")
        return rows, columns


def positions(keep: Tensor) -> Tensor:
    """keep [out, in] bool, at most two of every four -> [out, in / 4, 2] int64: the two that are stored, rising.

    Raises FormatError if more than two of four are to be kept.
    """
    fours = keep.reshape(len(keep), -1, 4)
    most = int(fours.sum(-1).max()) if fours.numel() else 0
    if most > 2:
        raise FormatError(f"sparse24 stores two of every four weights, and {most} of four are not zero; prune to 2:4")
    return (~fours).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(-1).values


def chosen(x: Tensor, position: Tensor) -> Tensor:
    """The elements of x [out, in] at `position` [out, in / 4, 2]; [out, in / 2]."""
    return x.reshape(len(x), -1, 4).gather(-1, position).flatten(1)


def spread(kept: Tensor, position: Tensor, fill: int = 0) -> Tensor:
    """The inverse of `chosen`: kept [out, in / 2] at their places in [out, in], `fill` elsewhere."""
    rows = kept.shape[0]
    full = torch.full((rows, position.shape[1], 4), fill, dtype=kept.dtype, device=kept.device)
    return full.scatter_(-1, position, kept.reshape(rows, -1, 2)).flatten(1)


def pack_positions(position: Tensor) -> Tensor:
    """[out, in / 4, 2] positions -> [out, in / 8] uint8, four to a byte."""
    p = position.to(torch.uint8).reshape(len(position), -1, 4)
    return p[..., 0] | p[..., 1] << 2 | p[..., 2] << 4 | p[..., 3] << 6


def positions_of(index: Tensor) -> Tensor:
    """index [out, in / 8] uint8 -> positions [out, in / 4, 2] int64."""
    return torch.stack([index >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).reshape(len(index), -1, 2).long()


def check_positions(tensors: Mapping[str, Tensor], columns: int) -> None:
    """Raise FormatError if the positions for a weight with so many columns are missing or damaged."""
    index, rows = tensors.get("weight_index"), tensors["weight"].shape[0]
    if index is None or index.dtype != torch.uint8 or tuple(index.shape) != (rows, columns // 8) or columns % 8:
        raise FormatError(f"sparse24: weight_index is {describe(index)}, expected uint8 [{rows}, {columns // 8}]")
    position = positions_of(index)
    if not bool((position[..., 0] < position[..., 1]).all()):
        raise FormatError("sparse24: positions must rise within every four columns; some do not: the file is damaged")


def is_real(tensor: Tensor) -> bool:
    """Whether it is in a dtype of values and scales."""
    return tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)


def describe(tensor: Tensor | None) -> str:
    """Dtype and shape, for messages."""
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
