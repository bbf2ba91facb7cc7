"""Compile kernels ahead of time, without a GPU, and write what the compiler made of them.

    python kernels/tools/resources.py               # writes kernels/resources/<operator>.json, all operators
    python kernels/tools/resources.py int4_linear   # of this one
    python kernels/tools/resources.py --missing     # compiles only what a table lacks; goes on where it was interrupted
    python kernels/tools/resources.py --check       # compares; exit code 1 and the differences, if any
    python kernels/tools/resources.py --readme      # puts the tables into kernels/README.md; writing them does so too

What is compiled is what `configurations()` of each operator's `launch.py` yields, for each architecture that it names:
every tile with every group and rank, with zero points and without, in bfloat16 and with a bias. What a GPU may run
beyond it:

- `int4_lora_linear` of ranks above 16 without zero points and with groups of 32 or 64: the loop is that of
  `int4_linear`, where both are compiled, and the update after it is compiled with zero points.
- float16 elsewhere than with groups of 64 on sm_90, and parts of a split in it. It has other exponents than bfloat16
  and no other instructions; where both are compiled it takes at most FLOAT16_REGISTERS more (a test holds it). What has
  fewer left, and what is told a limit because it spilled without one, is compiled in it on all its architectures.
- parts of a split of other groups than 64, or of smaller tiles. Their float32 store without a bias follows the same
  loop, and takes at most PARTS_REGISTERS more, which all that are left out have (a test holds both).
- no bias: one load and one addition less after the loop.
- operands that do not begin at multiples of 16 bytes, or sizes that are not multiples of 16: Triton compiles those anew
  and with narrower loads, for shapes that no model has.

That there are registers is not all: ptxas may spill some to fit another program, as it once did on sm_80. So of the
first two it is likely, not proven, that nothing spills.

From the cubin, cuobjdump of the triton wheel reads registers, stack bytes and the machine code (SASS), where
instructions that decide the speed are counted:

    spills               loads and stores of a thread's own stack
    weight_loads_128     loads of 16 bytes per thread with an evict-first hint; where Triton pipelines them,
                         asynchronous copies of 16 bytes, among which those of x may be; their hint is in Triton's
                         own intermediate form alone (`hinted_bytes`), and not in the PTX that Triton 3.7.1 makes of it
    weight_loads_narrow  narrower loads with the hint; no other tensor has it
    conversions          between integers and floats
    tensor_core          HMMA (sm_80, sm_89), HGMMA (sm_90), UTC*MMA (sm_100)
    loop_per_weight      instructions in the main loop, per thread, over the weights which the thread makes there: what
                         bounds a kernel that memory does not bound; 0 for a kernel without a loop or without weights

A kernel takes one to ten seconds; JOBS=8 before the command compiles eight at once. Nothing here is a measurement of
time.
"""

import argparse
import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resource_files import PACKAGE, Rows, differences, still_true, write, write_readme

FLOAT16_REGISTERS = 12  # at most, that a kernel takes in float16 beyond those it takes in bfloat16
PARTS_REGISTERS = 40  # the same of parts of a split, beyond those of a result
LOAD = re.compile(
    r"(?:ttg\.async_copy_global_to_local|tt\.load) .*?evict_first.*?tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>"
)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", re.MULTILINE)

sys.path.insert(0, str(PACKAGE.parent))

if TYPE_CHECKING:  # at run time it is imported late, with torch
    from llmcompress_kernels.configuration import Configuration


@dataclass(frozen=True)
class Case:
    """One compilation."""

    operator: str
    configuration: "Configuration"
    architecture: int
    dtype: str

    def name(self) -> str:
        """A key for the table, readable and sorted by kernel."""
        made = self.configuration
        shown = [shown_constant(*constant) for constant in sorted(made.constants.items())]
        options = [*(["parts"] if made.parts else []), f"warps={made.warps}", f"stages={made.stages}"]
        options += [] if made.registers is None else [f"maxnreg={made.registers}"]
        return " ".join([made.kernel, f"sm_{self.architecture}", self.dtype, *filter(None, shown), *options])


def shown_constant(name: str, value: object) -> str:
    """`GROUP=64`, `SPLIT`, `no zero`; nothing for what is false."""
    if value is None:
        return f"no {name.removesuffix('_ptr')}"
    if isinstance(value, bool):
        return name if value else ""
    return f"{name}={value}"


def operators() -> list[str]:
    """The folders that have a launcher."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/launch.py"))


def cases(operator: str) -> Iterator[Case]:
    """Everything of one operator that is compiled."""
    launch = importlib.import_module(f"llmcompress_kernels.{operator}.launch")
    for configuration in launch.configurations():
        for architecture in configuration.architectures:
            yield Case(operator, configuration, architecture, "bf16")
        if configuration.constants.get("GROUP", 64) == 64 and not configuration.parts:
            for architecture in configuration.float16:
                yield Case(operator, configuration, architecture, "fp16")


def compile_case(case: Case) -> Any:
    """Triton's compiled kernel, with its `asm` and `metadata`; nothing is loaded on a device."""
    import triton
    from llmcompress_kernels.configuration import ALIGNED, TYPES
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = case.configuration
    function = getattr(importlib.import_module(f"llmcompress_kernels.{case.operator}.kernel"), made.kernel)
    names = function.arg_names
    kinds = {name: TYPES.get(name, f"*{case.dtype}" if name.endswith("_ptr") else "i32") for name in names}
    if made.parts:
        kinds["y_ptr"] = "*fp32"
    signature = {name: "constexpr" if name in made.constants else kinds[name] for name in names}
    aligned = [name for name in names if name not in made.constants and (kinds[name][0] == "*" or name in ALIGNED)]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in made.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": made.warps, "num_stages": made.stages, "maxnreg": made.registers}
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


def hinted_bytes(compiled: Any) -> int:
    """Bytes that the loads and asynchronous copies with an evict-first hint bring to a program, each counted once."""
    sizes = LOAD.findall(compiled.asm["ttgir"])
    return sum(math.prod(map(int, shape.split("x"))) * int(bits) // 8 for shape, bits in sizes)


def facts(case: Case) -> dict[str, Any]:
    """What the table says of one case."""
    return facts_of(case, compile_case(case))


def facts_of(case: Case, compiled: Any) -> dict[str, Any]:
    """The same of what is compiled already. `spills` are loads and stores of the thread's stack."""
    usage = cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    found = [(int(at, 16), text.strip()) for at, text in INSTRUCTION.findall(cuobjdump(compiled.asm["cubin"], "-sass"))]
    count = Counter(text.split()[0] for _, text in found)

    def total(pattern: str) -> int:
        return sum(n for name, n in count.items() if re.match(pattern, name))

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    per_thread = case.configuration.weights / (32 * case.configuration.warps)
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
        "loop_per_weight": round(main_loop(found) / per_thread, 2) if per_thread else 0,
    }


def compiled(chosen: Sequence[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and facts of cases, in their order, each as soon as it is there."""
    with ProcessPoolExecutor(int(os.environ.get("JOBS", "1"))) as pool:
        yield from zip((case.name() for case in chosen), pool.map(facts, chosen), strict=True)


def run(operator: str, check: bool = False, missing: bool = False) -> list[str]:
    """Write one operator's table, or give what differs from it."""
    everything = list(cases(operator))
    names = {case.name() for case in everything}
    rows: Rows = {name: row for name, row in still_true(operator).items() if missing and name in names}
    for name, row in compiled([case for case in everything if case.name() not in rows]):
        rows[name] = row
        if missing:
            write(operator, rows)  # so that an interrupted run has done something
    if check:
        return differences(operator, rows, names)
    write(operator, rows)
    return []


def main() -> int:
    """Write the tables, or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("operator", nargs="*", help=f"one of {', '.join(operators())}; all if none is named")
    parser.add_argument("--check", action="store_true", help="compare with the tables instead of writing them")
    parser.add_argument("--missing", action="store_true", help="keep what the tables have of these kernels already")
    parser.add_argument("--readme", action="store_true", help="compile nothing; put the tables into kernels/README.md")
    asked = parser.parse_args()
    if unknown := set(asked.operator) - set(operators()):
        parser.error(f"no operator {', '.join(sorted(unknown))}; there are {', '.join(operators())}")
    if asked.readme:
        write_readme()
        return 0
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        lines = [line for name in asked.operator or operators() for line in run(name, asked.check, asked.missing)]
    if not asked.check:
        write_readme()
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
