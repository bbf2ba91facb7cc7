"""Compile every kernel configuration ahead of time, without a GPU, and write what the compiler made of it.

    python kernels/tools/resources.py            # writes kernels/resources.json
    python kernels/tools/resources.py --check    # compares with it; exit code 1 and the differences if it is another

For each configuration of `launch.py` x group size x grid x dtype and each of four architectures, ptxas makes a cubin.
From it, cuobjdump of the triton wheel reads registers, stack bytes and the machine code (SASS), where the instructions
that decide the speed are counted:

    spills               loads and stores of a thread's own stack
    weight_loads_128     loads of 16 bytes per thread with an evict-first hint; in int4_gemm asynchronous copies of 16
                         bytes, which show no hint, and among which are those of x where BM is 64
    weight_loads_narrow  narrower loads with the hint; no other tensor has it
    conversions          between integers and floats
    tensor_core          HMMA (sm_80, sm_89), HGMMA (sm_90), UTC*MMA (sm_100)
    loop_per_weight      instructions in the main loop, per thread, over the weights which the thread makes there: what
                         bounds a kernel that memory does not bound

Kernels are compiled with a bias and a result in the dtype of x. A split launch stores float32 and skips the bias; its
loop is the same. Nothing here is a measurement of time.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1]
TABLE = KERNELS / "resources.json"
ARCHITECTURES = (80, 89, 90, 100)
DTYPES = ("bf16", "fp16")
CONSTANTS: dict[str, Callable[[int], dict[str, Any]]] = {  # further constexpr arguments, given the tokens per program
    "int4_dequantize": lambda tokens: {},
    "int4_gemv": lambda tokens: {"SPLIT": False},
    "int4_gemm": lambda tokens: {"SPLIT": False, "INTERPRETED": False, "BM": tokens},
}
ALIGNED = ("N", "K", "stride")  # multiples of 16 in any model, which the launcher finds out
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", re.MULTILINE)

sys.path.insert(0, str(KERNELS / "torch-ext"))


@dataclass(frozen=True)
class Case:
    """One compilation; `constants` are the kernel's constexpr arguments, None for an absent tensor."""

    kernel: str
    architecture: int
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    def name(self) -> str:
        """A key for the table, readable and sorted by kernel."""
        values = dict(self.constants)
        zero = ["symmetric"] if "zero_ptr" in values else []
        shown = [f"{key}={values[key]}" for key in ("GROUP", "BN", "BM") if key in values]
        options = [f"warps={self.warps}", f"stages={self.stages}"]
        return " ".join([self.kernel, f"sm_{self.architecture}", self.dtype, *shown, *zero, *options])


def cases() -> Iterator[Case]:
    """Every configuration that `launch.py` can choose."""
    from llmcompress_kernels.int4_linear import launch
    from llmcompress_kernels.int4_linear.layout import GROUPS

    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        tiles = launch.REDUCE
        yield Case("reduce_splits", architecture, dtype, (("BN", tiles.rows),), tiles.warps, tiles.stages)
        for group, symmetric in itertools.product(GROUPS, (True, False)):
            grid = {"GROUP": group} | ({"zero_ptr": None} if symmetric else {})
            for kernel, tiles in [
                ("int4_dequantize", launch.DEQUANTIZE),
                ("int4_gemv", launch.GEMV),
                *(("int4_gemm", tiles) for tiles in launch.GEMM),
            ]:
                constants = grid | {"BN": tiles.rows} | CONSTANTS[kernel](tiles.tokens)
                yield Case(kernel, architecture, dtype, tuple(constants.items()), tiles.warps, tiles.stages)


def compile_case(case: Case) -> Any:
    """Triton's compiled kernel, with its `asm` and `metadata`; nothing is loaded on a device."""
    import triton
    from llmcompress_kernels.int4_linear import kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernel, case.kernel)
    constants, names = dict(case.constants), function.arg_names
    pointers = {"words_ptr": "*i32", "zero_ptr": "*u8", "parts_ptr": "*fp32"}
    kinds = {name: pointers.get(name, f"*{case.dtype}" if name.endswith("_ptr") else "i32") for name in names}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned = [name for name in names if name not in constants and (kinds[name][0] == "*" or name in ALIGNED)]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)


def cuobjdump(cubin: bytes, *options: str) -> str:
    """What the disassembler of the triton wheel prints for a cubin."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True).stdout


def main_loop(instructions: list[tuple[int, str]]) -> int:
    """Instructions between the farthest backward branch and its target; 0 without a loop."""
    longest = 0
    for address, text in instructions:
        target = re.search(r"^BRA\S* .*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            longest = max(longest, sum(int(target[1], 16) <= at <= address for at, _ in instructions))
    return longest


def facts(case: Case) -> dict[str, Any]:
    """What the table says of one case. `spills` are loads and stores of the thread's stack."""
    compiled = compile_case(case)
    usage = cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    found = [(int(at, 16), text.strip()) for at, text in INSTRUCTION.findall(cuobjdump(compiled.asm["cubin"], "-sass"))]
    count = Counter(text.split()[0] for _, text in found)

    def total(pattern: str) -> int:
        return sum(n for name, n in count.items() if re.match(pattern, name))

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    values = dict(case.constants)
    weights = values.get("BN", 0) * 128 / (32 * case.warps)
    loop = main_loop(found)
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": total(r"LDL|STL"),
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(found),
        "weight_loads_128": total(r"LDG\.E\.EF\.128|LDGSTS\.\S*128"),
        "weight_loads_narrow": total(r"LDG\.E\.EF(?!\.128)"),
        "conversions": total(r"I2F|F2I|I2FP"),
        "tensor_core": total(r"HMMA|HGMMA|UTC\w*MMA"),
        "loop_per_weight": round(loop / weights, 2) if weights and case.kernel in ("int4_gemv", "int4_gemm") else 0,
    }


def table() -> dict[str, Any]:
    """The whole table; takes some minutes."""
    import triton

    everything = list(cases())
    with ProcessPoolExecutor(int(os.environ.get("JOBS", "1"))) as pool:
        rows = dict(zip((case.name() for case in everything), pool.map(facts, everything), strict=True))
    return {"triton": triton.__version__, "kernels": dict(sorted(rows.items()))}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for every configuration that differs, is missing or is new."""
    names = sorted(found.keys() | expected.keys())
    return [f"{n}: {expected.get(n)} -> {found.get(n)}" for n in names if found.get(n) != expected.get(n)]


def write(rows: dict[str, Any]) -> None:
    """One line per configuration, so that a change reads as a change."""
    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows["kernels"].items())
    TABLE.write_text(f'{{"triton": {json.dumps(rows["triton"])}, "kernels": {{\n{body}\n}}}}\n', encoding="utf-8")


def main() -> int:
    """Write the table, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    check = parser.parse_args().check
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = table()
    if not check:
        write(rows)
        return 0
    expected = json.loads(TABLE.read_text(encoding="utf-8"))
    if expected["triton"] != rows["triton"]:
        print(f"the table is of triton {expected['triton']}, this is {rows['triton']}", file=sys.stderr)
    lines = differences(rows["kernels"], expected["kernels"])
    print(*lines, sep="\n", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
