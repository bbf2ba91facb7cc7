"""A NumPy model of two instructions of NVIDIA's tensor cores, and of the inline assembly around them.

`mma.m16n8k16` and `mma.sp.m16n8k32` multiply matrices that lie in the registers of a warp: lane 4 g + t has, of

    A dense   [16, 16]  four registers r = h + 2 q: row g + 8 h, columns 8 q + 2 t and the next
    A sparse  [16, 32]  four registers r = h + 2 q: row g + 8 h, the two stored of columns 16 q + 4 t .. 16 q + 4 t + 3
    B         [k, 8]    registers b: rows 8 b + 2 t and the next, column g; two registers for k = 16, four for k = 32
    C         [16, 8]   four float32 i: row g + 8 (i // 2), column 2 t + i % 2
    E         of a sparse A: lane 4 g + 2 selector + q has the positions of columns 16 q .. 16 q + 15, in its low half
              those of row g, in its high half those of row g + 8: per four columns a nibble first | second << 2

A register of A or B holds two 16-bit floats, the first in its low half. Source: PTX ISA, "Matrix fragments for
mma.m16n8k16" and "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".

`run` executes assembly of the few instructions that the kernels use, on all threads at once. `install` gives it to
Triton's interpreter, which knows no inline assembly.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4
ONE_LINE = re.compile(r"\s*([\w.:]+)\s+(.*)")


def halves(registers: Array) -> Array:
    """uint32 [...] -> uint16 [..., 2], the low half first."""
    return np.stack([registers & 0xFFFF, registers >> 16], axis=-1).astype(np.uint16)


def floats(bits: Array, kind: str) -> Array:
    """uint16 as float64; kind: bf16 or f16."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def bits_of(values: Array, kind: str) -> Array:
    """float64 rounded to nearest even as uint16; exact values of float32 range only."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    wide = values.astype(np.float32).view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def dense_a(a: Array, kind: str) -> Array:
    """Registers uint32 [32, 4] -> A [16, 16]."""
    whole, values = np.full((16, 16), np.nan), floats(halves(a), kind)
    for r in range(4):
        for v in range(2):
            whole[G + 8 * (r % 2), 8 * (r // 2) + 2 * T + v] = values[:, r, v]
    return whole


def sparse_a(a: Array, e: Array, selector: int, kind: str) -> Array:
    """Registers uint32 [32, 4] and metadata uint32 [32] -> A [16, 32], zeros where nothing is stored."""
    whole, values = np.zeros((16, 32)), floats(halves(a), kind)
    for r in range(4):
        h, q = r % 2, r // 2
        nibble = e[4 * G + 2 * selector + q] >> (16 * h + 4 * T).astype(np.uint32)
        first, second = nibble & 3, (nibble >> 2) & 3
        if not (first < second).all():
            raise ValueError("ordered_metadata with positions that do not rise is undefined")
        for position, value in ((first, values[:, r, 0]), (second, values[:, r, 1])):
            whole[G + 8 * h, 16 * q + 4 * T + position] = value
    return whole


def right(b: Array, kind: str) -> Array:
    """Registers uint32 [32, k / 8] -> B [k, 8]."""
    whole, values = np.full((8 * b.shape[1], 8), np.nan), floats(halves(b), kind)
    for register in range(b.shape[1]):
        for v in range(2):
            whole[8 * register + 2 * T + v, G] = values[:, register, v]
    return whole


def to_accumulators(c: Array) -> Array:
    """C [16, 8] -> registers float32 [32, 4]."""
    return np.stack([c[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=-1).astype(np.float32)


def from_accumulators(c: Array) -> Array:
    """The reverse of `to_accumulators`."""
    whole = np.full((16, 8), np.nan, dtype=np.float32)
    for i in range(4):
        whole[G + 8 * (i // 2), 2 * T + i % 2] = c[:, i]
    return whole


def mma_m16n8k16(a: Array, b: Array, c: Array, kind: str) -> Array:
    """One warp: registers uint32 [32, 4], uint32 [32, 2], float32 [32, 4] -> float32 [32, 4]."""
    return to_accumulators(dense_a(a, kind) @ right(b, kind) + from_accumulators(c))


def mma_sp_m16n8k32(a: Array, b: Array, c: Array, e: Array, selector: int, kind: str) -> Array:
    """One warp: registers uint32 [32, 4], uint32 [32, 4], float32 [32, 4], uint32 [32] -> float32 [32, 4]."""
    return to_accumulators(sparse_a(a, e, selector, kind) @ right(b, kind) + from_accumulators(c))


class Threads:
    """The registers of some warps, by name: uint32 or float32 [threads]."""

    def __init__(self, operands: dict[str, Array], threads: int) -> None:
        self.registers, self.threads = dict(operands), threads

    def read(self, names: str) -> Array:
        """`a` -> [threads]; `{a, b}` -> [threads, 2]."""
        if names.startswith("{"):
            return np.stack([self.read(name.strip()) for name in names[1:-1].split(",")], axis=-1)
        if names.startswith("0x"):
            return np.full(self.threads, int(names, 16), dtype=np.uint32)
        if names.startswith("0f"):  # a float32 by its bits
            return np.full(self.threads, int(names[2:], 16), dtype=np.uint32).view(np.float32)
        return self.registers[names]

    def write(self, names: str, values: Array) -> None:
        """The reverse of `read`."""
        if names.startswith("{"):
            for i, name in enumerate(names[1:-1].split(",")):
                self.registers[name.strip()] = values[:, i]
        else:
            self.registers[names] = values

    def execute(self, name: str, arguments: list[str]) -> None:
        """One instruction."""
        target, *sources = arguments
        if name in ("mov.b32", "mov.f32"):
            self.write(target, self.read(sources[0]))
        elif fma := re.fullmatch(r"fma\.rn\.(bf16|f16)x2", name):
            kind = fma[1]
            x, y, z = (floats(halves(self.read(source)), kind) for source in sources)
            low, high = bits_of(x * y + z, kind).astype(np.uint32).T
            self.write(target, low | high << 16)
        elif mma := re.fullmatch(
            r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32", name
        ):
            a, b, c, e = (self.read(source) for source in sources[:4])
            warps = [slice(i, i + 32) for i in range(0, self.threads, 32)]
            made = [mma_sp_m16n8k32(a[w], b[w], c[w], e[w], int(sources[4]), mma[1]) for w in warps]
            self.write(target, np.concatenate(made))
        else:
            raise NotImplementedError(f"instruction {name}")


def run(assembly: str, outputs: int, inputs: list[Array]) -> list[Array]:
    """inputs: what `$outputs` and on hold, [threads] each; returns what `$0` .. `$(outputs - 1)` hold at the end."""
    threads = Threads({f"${outputs + i}": value for i, value in enumerate(inputs)}, len(inputs[0]))
    body = assembly.strip()
    assert body[0] == "{"
    assert body[-1] == "}"
    for text in body[1:-1].split(";"):
        found = ONE_LINE.match(text)
        if found is None or found[1] == ".reg":
            assert found or not text.strip(), text
            continue
        threads.execute(found[1], [part.strip() for part in re.split(r",(?![^{]*})", found[2])])
    return [threads.registers[f"${i}"] for i in range(outputs)]


def install() -> None:
    """Give Triton's interpreter inline assembly: threads in the order of the elements, `pack` elements each."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    class Results(list[Any]):
        def get_result(self, i: int) -> Any:
            return self[i]

    def create_inline_asm(
        self: Any, assembly: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
    ) -> Results:
        shape = values[0].data.shape
        operands = [value.data.reshape(-1, pack).view(np.uint32)[:, i] for value in values for i in range(pack)]
        assert len(operands) + pack * len(types) == len(constraints.split(","))
        found = run(assembly, pack * len(types), operands)
        results = Results()
        for i, kind in enumerate(types):
            data = np.stack(found[pack * i : pack * (i + 1)], axis=-1).reshape(shape)
            results.append(TensorHandle(data.view(np.float32 if kind.scalar.is_fp32() else np.int32), kind.scalar))
        return results

    InterpreterBuilder.create_inline_asm = create_inline_asm
