"""`dense`: the values themselves, written back into the weights. No smaller, and loads anywhere."""

from collections.abc import Mapping
from typing import Any

from llmcompress.lazy import Tensor
from llmcompress.weight import CompressedWeight, Kind


class Dense:
    """`<module>.weight` [out, in] in the dtype of the checkpoint; [in, out] where the module is transposed."""

    name = "dense"
    suffix = "weight"

    def refuses(self, kind: Kind, shape: tuple[int, int], transposed: bool) -> str | None:
        """Never."""
        return None

    def stored_bytes(self, kind: Kind, shape: tuple[int, int], itemsize: int) -> int:
        """One number per weight."""
        return shape[0] * shape[1] * itemsize

    def pack(self, weight: CompressedWeight, transposed: bool) -> dict[str, Tensor]:
        """The values, as they are."""
        return {"weight": (weight.values.T if transposed else weight.values).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any] | None, transposed: bool) -> Tensor:
        """The values, as they were."""
        return tensors["weight"].T if transposed else tensors["weight"]

    def read(self, tensors: Mapping[str, Tensor], kind: Kind, transposed: bool) -> CompressedWeight:
        """The values; on which grid they are is not stored."""
        return CompressedWeight(self.unpack(tensors, None, transposed).contiguous())

    def config(self, kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any] | None:
        """Nothing: to every engine this is an ordinary checkpoint."""
        return None
