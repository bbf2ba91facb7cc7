"""What every format is: how one compressed weight is stored, and what config.json says about all of them."""

from collections.abc import Mapping
from typing import Any, Protocol

from llmcompress.lazy import Tensor, torch
from llmcompress.weight import CompressedWeight, Kind


class Format(Protocol):
    """A layout of compressed weights in safetensors. Knows neither model nor files."""

    name: str
    suffix: str  # the tensor that marks a linear stored this way, as `<module>.<suffix>`

    def refuses(self, kind: Kind, shape: tuple[int, int], transposed: bool) -> str | None:
        """Why a weight [out, in] of this kind cannot be stored this way; None if it can.

        transposed: the module keeps its weight as [in, out] (GPT-2's Conv1D).
        """
        ...

    def stored_bytes(self, kind: Kind, shape: tuple[int, int], itemsize: int) -> int:
        """Bytes that `pack` will take for a weight [out, in] of this kind, exactly; itemsize: of a dense number."""
        ...

    def pack(self, weight: CompressedWeight, transposed: bool) -> dict[str, Tensor]:
        """Tensors to store, by their names below the module."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any] | None, transposed: bool) -> Tensor:
        """The weight's values [out, in] from what `pack` made; bit for bit. `scheme` is the linear's in `config`."""
        ...

    def read(self, tensors: Mapping[str, Tensor], kind: Kind, transposed: bool) -> CompressedWeight:
        """What `pack` was given, as far as the tensors hold it: values, and codes with their grid if there are any."""
        ...

    def config(self, kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any] | None:
        """`quantization_config` for config.json, or None.

        kinds: of each compressed linear, by module name.  ignore: all other linears.
        """
        ...


class OwnFormat(Format, Protocol):
    """A format of this project: `llmcompress.runtime` loads it, and stock engines do not."""

    def placeholders(self, shape: tuple[int, int], dtype: "torch.dtype") -> dict[str, Tensor]:
        """Tensors by the names that `pack` gives, on the meta device, for a loader to fill; sizes may be the file's."""
        ...

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Raise FormatError unless the tensors hold a weight of this shape; much cheaper than `unpack`."""
        ...

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight's values [out, in] from tensors that `check` has seen; nothing is looked at again."""
        ...
