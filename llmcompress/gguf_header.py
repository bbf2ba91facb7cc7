"""Reads the header of a GGUF file: metadata and where each tensor lies.

A GGUF file is a header (metadata, then one entry per tensor) followed by aligned data. The metadata holds the whole
vocabulary, which is why general readers take seconds and hundreds of megabytes. This reader walks over the big arrays
without keeping them, and checks every count, length and offset against the size of the file before it believes it.
"""

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.errors import SourceError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
KEPT_ARRAY = 64  # longer arrays (vocabulary, merges, scores) are counted, not kept

BLOCKS = {                             # ggml type: name, elements per block, bytes per block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LongArray:
    """Stands for a metadata array that was walked over."""

    length: int


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of the file; `shape` slowest dimension first, as torch counts."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml type, a key of BLOCKS
    start: int  # absolute position in the file
    size: int  # bytes in the file


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The checked header of a file."""

    metadata: dict[str, Any] = field(repr=False)  # long arrays stand as LongArray
    tensors: dict[str, GGUFTensor] = field(repr=False)  # in the order of the file
    data_start: int  # bytes before the data


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file (version 2 or 3, little endian); raises SourceError if it is damaged."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, path)
            metadata, table = _read_tables(cursor)
            tensors, start = _locate(cursor, table, metadata.get("general.alignment", 32))
    except (OSError, ValueError) as exc:  # mmap refuses an empty file with ValueError
        raise SourceError(f"{path}: cannot read this file: {exc}") from None
    return GGUFHeader(metadata, tensors, start)


class _Cursor:
    """A position in the header; every step is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def error(self, what: str) -> SourceError:
        return SourceError(f"{self.path}: not a usable GGUF file: {what}; download it again or convert the model anew")

    def skip(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise self.error(f"the header runs past the end of the file ({len(self.data)} bytes)")
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))[0]

    def count(self, what: str, at_least: int) -> int:
        """A 64-bit count of things that take `at_least` bytes each, so that a lie cannot make us loop or allocate."""
        value = self.number("<Q")
        if value * at_least > len(self.data) - self.at:
            raise self.error(f"{value} {what} do not fit into {len(self.data)} bytes")
        return int(value)

    def text(self) -> str:
        size = self.count("bytes of text", 1)
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise self.error(f"text at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise self.error(f"unknown type {kind} of a metadata value at byte {self.at}")
        return self.number(SCALARS[kind])

    def array(self) -> Any:
        kind = self.number("<I")
        if kind != STRING and kind not in SCALARS:
            raise self.error(f"unknown type {kind} of array elements at byte {self.at}")
        size = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        length = self.count("array elements", size)
        if length <= KEPT_ARRAY:
            return [self.value(kind) for _ in range(length)]
        if kind == STRING:
            self.skip_texts(length)
        else:
            self.skip(length * size)
        return LongArray(length)

    def skip_texts(self, length: int) -> None:
        """Pass over texts in a plain loop: a vocabulary has a hundred thousand, most of the time of a plan."""
        size_at, at, last = struct.Struct("<Q").unpack_from, self.at, len(self.data) - 8
        for _ in range(length):
            if at > last:
                self.skip(len(self.data))  # past the end: its error
            at += 8 + size_at(self.data, at)[0]
        self.skip(at - self.at)


def _read_tables(cursor: _Cursor) -> tuple[dict[str, Any], list[tuple[str, list[int], int, int]]]:
    """Metadata, and per tensor its name, dimensions (slowest first), ggml type and offset within the data."""
    if cursor.data[: cursor.skip(4) + 4] != b"GGUF":
        raise cursor.error("it does not begin with 'GGUF'")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise cursor.error(f"version {version}, known are 2 and 3, little endian")
    tensor_count, pair_count = cursor.count("tensors", 24), cursor.count("metadata entries", 13)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    table = []
    for _ in range(tensor_count):
        name, rank = cursor.text(), cursor.number("<I")
        if not 1 <= rank <= 4:
            raise cursor.error(f"tensor {name!r} has {rank} dimensions")
        dims = [cursor.number("<Q") for _ in range(rank)]
        table.append((name, dims[::-1], cursor.number("<I"), cursor.number("<Q")))
    return metadata, table


def _locate(
    cursor: _Cursor, table: list[tuple[str, list[int], int, int]], alignment: Any
) -> tuple[dict[str, GGUFTensor], int]:
    """Absolute positions and sizes of the tensors, checked against the file and each other; and where data begins."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"alignment {alignment!r} is not a power of two")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    end, previous = base, ""
    for name, dims, kind, offset in sorted(table, key=lambda entry: entry[3]):
        if kind not in BLOCKS:
            known = ", ".join(label for label, _, _ in BLOCKS.values())
            raise cursor.error(f"tensor {name!r} is stored as ggml type {kind}; known are {known}")
        _, elements, size = BLOCKS[kind]
        if 0 in dims or dims[-1] % elements:
            raise cursor.error(f"tensor {name!r} of shape {dims} does not divide into blocks of {elements}")
        tensor = GGUFTensor(name, tuple(dims), kind, base + offset, prod(dims) // elements * size)
        if name in tensors or tensor.start < end:
            raise cursor.error(f"tensor {name!r} appears twice or overlaps {previous!r}")
        end, previous = tensor.start + tensor.size, name
        if end > len(cursor.data):
            raise cursor.error(f"tensor {name!r} ends at byte {end}, the file at {len(cursor.data)} (truncated?)")
        tensors[name] = tensor
    return tensors, base
