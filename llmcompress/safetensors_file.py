"""Safetensors files read with suspicion: headers checked in full, tensors copied out one at a time.

The format: 8 bytes of length (little endian), a JSON header of that length, then the data of all tensors without gaps.
The library checks much of this when it opens a file; here it is checked before a run starts, without mapping the data,
and a problem becomes one message that names the file.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import FormatError, SourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, known from its header."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it, such as "BF16"
    file: str  # file name within the folder
    bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file, from its header, strictly checked; no weights are read.

    The format: 8 bytes of length (little endian), a JSON header of that length, then data without gaps.
    Raises SourceError if the file is unreadable, truncated, or contradicts itself.
    """
    header, start = header_bytes(path)
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("it is not a mapping")
        entries.pop("__metadata__", None)
        return parse_entries(entries, path.name, path.stat().st_size - start)
    except (ValueError, RecursionError) as exc:  # JSON and text errors are ValueErrors
        raise SourceError(f"{path}: not a valid safetensors file: {exc}; download or save it again") from None


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Tensors of the safetensors files of a checkpoint, by name. Raises FormatError if one is truncated or worse."""
    stored: dict[str, TensorInfo] = {}
    for file in files:
        try:
            stored |= read_header(Path(file))
        except SourceError as exc:
            raise FormatError(str(exc)) from None
    return stored


def parse_entries(entries: Mapping[str, Any], file: str, data_bytes: int | None) -> dict[str, TensorInfo]:
    """TensorInfo for each header entry of `file`, in order of position.

    data_bytes: size of the data part, None if unknown. Raises ValueError if an entry is malformed, if its size does not
    match its shape, or if the entries do not cover the data exactly.
    """
    spans = sorted((_parse_entry(name, entry, file) for name, entry in entries.items()), key=lambda span: span[:2])
    end = 0
    for start, stop, tensor in spans:
        if start != end:
            raise ValueError(f"tensor {tensor.name!r} begins at byte {start} of the data, expected {end}")
        end = stop
    if data_bytes is not None and end != data_bytes:
        raise ValueError(f"its tensors take {end} bytes, the file holds {data_bytes} (truncated?)")
    return {tensor.name: tensor for _, _, tensor in spans}


def _parse_entry(name: str, entry: Any, file: str) -> tuple[int, int, TensorInfo]:
    """Begin and end within the data, and the TensorInfo, of one header entry; raises ValueError."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"entry {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list | tuple) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"entry {name!r} has shape {shape!r} and offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise ValueError(f"tensor {name!r} has unknown dtype {dtype!r}")
    size = prod(shape) * ITEM_SIZE[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {name!r} of shape {shape} in {dtype} takes {size} bytes, its offsets are {offsets}")
    return offsets[0], offsets[1], TensorInfo(name, tuple(shape), dtype, file, size)


def header_bytes(path: Path) -> tuple[bytes, int]:
    """The raw JSON header of a safetensors file and the position of the data."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise SourceError(
                    f"{path}: not a valid safetensors file: {size} bytes, with a header of {length} bytes "
                    "(truncated?); download or save it again"
                )
            return file.read(length), 8 + length
    except OSError as exc:
        raise SourceError(f"{path}: cannot read this file: {exc.strerror}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's hook for mappings, refusing a key that appears twice."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return mapping


def read_tensors(path: Path, names: list[str], dtype: "torch.dtype | None", device: Any) -> dict[str, "Tensor"]:
    """These tensors of one file, floats cast to `dtype` or with None as they are, on `device`.

    The file is mapped anew for each tensor: pages that were read count as resident memory until the mapping goes.
    Raises SourceError if the file is damaged or has changed since it was opened.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    try:
        for name in names:
            with safe_open(path, framework="pt") as file:
                value = file.get_tensor(name)
                wanted = dtype if dtype and value.is_floating_point() else value.dtype
                found[name] = value.to(device=device, dtype=wanted, copy=True)
                del value
    except (OSError, SafetensorError) as exc:
        raise SourceError(
            f"{path}: cannot read tensors ({exc}); the file changed or is damaged: download or save it again"
        ) from None
    return found


def hash_file(digest: Any, path: Path, header: int, middles: list[int]) -> None:
    """Add a file's header (`header` bytes), size, ends and samples at `middles` (positions) to a digest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest.update(struct.pack("<Q", size) + file.read(header + 65536))
        for position in [*middles, max(0, size - 65536)]:
            file.seek(position)
            digest.update(file.read(65536 if position == max(0, size - 65536) else 4096))
