"""`pack-quantized`: integer codes packed into 32-bit words, as the compressed-tensors library defines it.

Transformers and vLLM load it. Per linear [out, in] with b bits and groups of g columns:

    weight_packed      int32  [out, ceil(in b / 32)]         the codes, dense, lowest bits first
    weight_scale       dtype  [out, in / g]                  [out, 1] for whole rows
    weight_zero_point  int32  [ceil(out b / 32), in / g]     asymmetric grids only, packed along the rows
    weight_shape       int64  [2]                            (out, in)

All packing and the schema of `quantization_config` come from that library, so a key it does not know cannot get in.
"""

import math
from collections.abc import Mapping
from typing import Any

from llmcompress.grid import IntGrid
from llmcompress.lazy import Tensor, torch
from llmcompress.weight import CompressedWeight, Kind


class PackQuantized:
    """compressed-tensors `pack-quantized`: 2, 3, 4 or 8 bits, grouped or whole rows, symmetric or not."""

    name = "pack-quantized"
    suffix = "weight_packed"

    def refuses(self, kind: Kind, shape: tuple[int, int], transposed: bool) -> str | None:
        """Only integer grids on plain linears have this form."""
        if transposed:
            return "Conv1D weights have no packed form in stock libraries"
        if kind.bits is None:
            return "its result is not on an integer grid"
        if not kind.symmetric and words(shape[0], kind.bits) < 2:
            return f"{shape[0]} rows of zero points fit one word, which the compressed-tensors library cannot unpack"
        return None

    def stored_bytes(self, kind: Kind, shape: tuple[int, int], itemsize: int) -> int:
        """Words, scales, packed zeros and the shape."""
        assert kind.bits is not None
        rows, columns = shape
        groups = columns // kind.group(columns)
        total = rows * words(columns, kind.bits) * 4 + rows * groups * itemsize + 2 * 8
        return total if kind.symmetric else total + words(rows, kind.bits) * groups * 4

    def pack(self, weight: CompressedWeight, transposed: bool) -> dict[str, Tensor]:
        """Pack the codes of a weight that is on a grid."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        codes, grid = weight.codes, weight.grid
        if codes is None or grid is None:
            raise ValueError("pack-quantized stores codes on a grid, and this weight has none")
        middle = 2 ** (grid.bits - 1)
        tensors = {
            "weight_packed": pack_to_int32((codes.to(torch.int16) - middle).to(torch.int8), grid.bits),
            "weight_scale": grid.scale.contiguous(),
            "weight_shape": torch.tensor(codes.shape),
        }
        if not grid.symmetric:
            zero = (grid.zero - middle).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(zero, grid.bits, packed_dim=0).contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any] | None, transposed: bool) -> Tensor:
        """Decode with the library's own decompressor, which is what stock engines run."""
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationScheme

        return PackedQuantizationCompressor.decompress(dict(tensors), QuantizationScheme.model_validate(scheme))[
            "weight"
        ]

    def read(self, tensors: Mapping[str, Tensor], kind: Kind, transposed: bool) -> CompressedWeight:
        """The values, their codes and their grid."""
        from compressed_tensors.compressors.pack_quantized import unpack_from_int32

        assert kind.bits is not None
        scale, middle = tensors["weight_scale"], 2 ** (kind.bits - 1)
        rows, columns = tensors["weight_shape"].tolist()
        codes = unpack_from_int32(tensors["weight_packed"], kind.bits, torch.Size([rows, columns])).to(torch.int16)
        zero = torch.zeros(scale.shape, dtype=torch.int32)
        if not kind.symmetric:
            zero = unpack_from_int32(tensors["weight_zero_point"], kind.bits, scale.shape, packed_dim=0).to(torch.int32)
        grid = IntGrid(kind.bits, kind.group(columns), kind.symmetric, scale, zero + middle)
        return CompressedWeight.on_grid((codes + middle).to(torch.uint8), grid)

    def config(self, kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any] | None:
        """One config group per distinct grid; a single one targets every Linear that is not ignored."""
        from compressed_tensors.quantization import QuantizationConfig

        by_grid: dict[tuple[int, int | str, bool], list[str]] = {}
        for name, kind in kinds.items():
            assert kind.bits is not None
            by_grid.setdefault((kind.bits, kind.group_size, kind.symmetric), []).append(name)
        groups = {
            f"group_{i}": scheme(grid, ["Linear"] if len(by_grid) == 1 else names)
            for i, (grid, names) in enumerate(by_grid.items())
        }
        config = QuantizationConfig(
            config_groups=groups, format=self.name, quantization_status="compressed", ignore=ignore
        )
        return config.model_dump(mode="json")


def scheme(grid: tuple[int, int | str, bool], targets: list[str]) -> dict[str, Any]:
    """A compressed-tensors QuantizationScheme for (bits, group_size, symmetric), as plain values."""
    bits, group_size, symmetric = grid
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    if group_size == "row":
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": group_size}
    if not symmetric:
        weights["zp_dtype"] = "torch.int8"
    return {"targets": targets, "weights": weights, "format": PackQuantized.name}


def words(count: int, bits: int) -> int:
    """32-bit words that `count` codes of `bits` bits take."""
    return math.ceil(count * bits / 32)
