"""`bitmask`: the weights that are not zero, and one bit for every weight. Version 1; see docs/formats.md.

For unstructured sparsity of half of the weights and more; 1 + 16 (1 - sparsity) bits per weight in bfloat16. Per
linear [out, in]:

    weight         dtype  [n]                   the weights that stay, row after row
    weight_mask    uint8  [out, ceil(in / 8)]   a bit for every weight; of eight columns the first is lowest
    weight_shape   int64  [2]                   (out, in)
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

from llmcompress.errors import FormatError
from llmcompress.formats.sparse24 import METHOD, VERSION, describe, is_real
from llmcompress.lazy import Tensor, torch
from llmcompress.weight import CompressedWeight, Kind


def bits(device: "torch.device") -> Tensor:
    """0 .. 7, the places of a byte's bits."""
    return torch.arange(8, dtype=torch.uint8, device=device)


class Bitmask:
    """Values in the dtype of the checkpoint under a mask of one bit per weight."""

    name = "bitmask"
    suffix = "weight_mask"

    def refuses(self, kind: Kind, shape: tuple[int, int], transposed: bool) -> str | None:
        """Only pruned weights of plain linears gain from it."""
        if transposed:
            return "Conv1D weights have no packed form"
        return None if kind.pattern else "no step prunes it, so that a mask would only add to its size"

    def stored_bytes(self, kind: Kind, shape: tuple[int, int], itemsize: int) -> int:
        """A bit for every weight, those that stay, and the shape."""
        rows, columns = shape
        assert kind.pattern is not None
        return kind.pattern.stay(rows, columns, kind.sparsity) * itemsize + rows * ceil(columns / 8) + 2 * 8

    def pack(self, weight: CompressedWeight, transposed: bool) -> dict[str, Tensor]:
        """The weights that stay and their mask."""
        keep = weight.values != 0 if weight.mask is None else weight.mask
        padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8)).reshape(len(keep), -1, 8)
        mask = (padded << bits(keep.device)).sum(-1, dtype=torch.uint8)
        return {"weight": weight.values[keep], "weight_mask": mask, "weight_shape": torch.tensor(keep.shape)}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any] | None, transposed: bool) -> Tensor:
        """The values. Raises FormatError if the tensors do not fit each other or the format."""
        self.mask(tensors)
        return self.values(tensors)

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The values of tensors that `check` has seen."""
        stored, columns = tensors["weight"], int(tensors["weight_shape"][1])
        keep = bits_of(tensors["weight_mask"])[:, :columns]
        values = torch.zeros(keep.shape, dtype=stored.dtype, device=stored.device)
        values[keep] = stored
        return values

    def read(self, tensors: Mapping[str, Tensor], kind: Kind, transposed: bool) -> CompressedWeight:
        """The values and the mask."""
        return CompressedWeight(self.unpack(tensors, None, transposed), mask=self.mask(tensors))

    def placeholders(self, shape: tuple[int, int], dtype: "torch.dtype") -> dict[str, Tensor]:
        """Tensors of the right kind without content, for a loader to fill; how many stay is the file's."""
        rows, columns = shape
        return {
            "weight": torch.empty(1, dtype=dtype, device="meta"),
            "weight_mask": torch.empty(rows, ceil(columns / 8), dtype=torch.uint8, device="meta"),
            "weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
        }

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raise FormatError unless the tensors hold a weight of this shape."""
        found = tuple(self.mask(tensors).shape)
        if found != shape:
            raise FormatError(f"bitmask: the tensors hold a weight of {list(found)}, expected {list(shape)}")

    def mask(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Which weights stay, [out, in] bool. Raises FormatError if the tensors do not fit each other."""
        stored, mask, shape = (tensors.get(leaf) for leaf in ("weight", "weight_mask", "weight_shape"))
        if shape is None or shape.dtype != torch.int64 or tuple(shape.shape) != (2,) or int(shape.min()) < 1:
            raise FormatError(
                f"bitmask: weight_shape is {describe(shape)}, expected two positive int64 numbers, out and in"
            )
        rows, columns = shape.tolist()
        if mask is None or mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, ceil(columns / 8)):
            raise FormatError(f"bitmask: weight_mask is {describe(mask)}, expected uint8 [{rows}, {ceil(columns / 8)}]")
        bits = bits_of(mask)
        keep = bits[:, :columns]
        if bool(bits[:, columns:].any()):
            raise FormatError("bitmask: bits after the last column must be zero; the file is damaged")
        if stored is None or not is_real(stored) or stored.ndim != 1 or len(stored) != int(keep.sum()):
            raise FormatError(f"bitmask: weight is {describe(stored)}, expected floats [{int(keep.sum())}]")
        return keep

    def config(self, kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any] | None:
        """Which linears are stored so."""
        return {"quant_method": METHOD, "version": VERSION, "format": self.name, "modules": sorted(kinds)}


def bits_of(mask: Tensor) -> Tensor:
    """mask [out, bytes] uint8 -> its bits [out, 8 bytes] bool, the lowest of a byte first."""
    return (mask[..., None] >> bits(mask.device) & 1).bool().flatten(1)
