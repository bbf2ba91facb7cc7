"""Compile every kernel configuration ahead of time, without a GPU, and write what the compiler made of it.

    python kernels/tools/resources.py               # writes kernels/resources/<operator>.json, all operators
    python kernels/tools/resources.py int4_linear   # of this one
    python kernels/tools/resources.py --check       # compares; exit code 1 and the differences, if any

For what `configurations()` of each operator's `launch.py` yields, and each architecture that it names, ptxas makes a
cubin.
float16 differs by its exponent alone and is compiled for groups of 64 on sm_90. From the cubin, cuobjdump of the triton
wheel reads registers, stack bytes and the machine code (SASS), where instructions that decide the speed are counted:

    spills               loads and stores of a thread's own stack
    weight_loads_128     loads of 16 bytes per thread with an evict-first hint; where Triton pipelines them,
                         asynchronous copies of 16 bytes, which show no hint, and among which those of x may be
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
import json
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

KERNELS = Path(__file__).parents[1]
PACKAGE = KERNELS / "torch-ext/llmcompress_kernels"
TABLES = KERNELS / "resources"
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
        options = [f"warps={made.warps}", f"stages={made.stages}"]
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
        if configuration.constants.get("GROUP", 64) == 64:
            yield Case(operator, configuration, 90, "fp16")


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
    signature = {name: "constexpr" if name in made.constants else kinds[name] for name in names}
    aligned = [name for name in names if name not in made.constants and (kinds[name][0] == "*" or name in ALIGNED)]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in made.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": made.warps, "num_stages": made.stages}
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


def table(chosen: Sequence[Case]) -> dict[str, Any]:
    """Name of each case to its facts, sorted."""
    with ProcessPoolExecutor(int(os.environ.get("JOBS", "1"))) as pool:
        return dict(sorted(zip((case.name() for case in chosen), pool.map(facts, chosen), strict=True)))


def write(operator: str, rows: dict[str, Any]) -> None:
    """One line per configuration, so that a change reads as a change."""
    import triton

    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n{body}\n}}}}\n'
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{operator}.json").write_text(text, encoding="utf-8")


def differences(operator: str, rows: dict[str, Any], names: set[str]) -> list[str]:
    """One line for every case whose facts are others than those in the table, or that only one of the two has.

    rows: facts of cases; names: of all cases.
    """
    import triton

    path = TABLES / f"{operator}.json"
    if not path.exists():
        return [f"{operator}: no {path}"]
    recorded = json.loads(path.read_text(encoding="utf-8"))
    expected = recorded["kernels"]
    made_by = f"table of triton {recorded['triton']}, compiled by {triton.__version__}"
    changed = [f"{n}: {expected[n]} -> {row} ({made_by})" for n, row in rows.items() if expected.get(n, row) != row]
    missing = [f"{n}: not in the table" for n in sorted(names - expected.keys())]
    return [*changed, *missing, *(f"{n}: no such configuration" for n in sorted(expected.keys() - names))]


def run(operator: str, check: bool) -> list[str]:
    """Write one operator's table, or what differs from it."""
    everything = list(cases(operator))
    rows = table(everything)
    if check:
        return differences(operator, rows, {case.name() for case in everything})
    write(operator, rows)
    return []


def main() -> int:
    """Write the tables, or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("operator", nargs="*", help=f"one of {', '.join(operators())}; all if none is named")
    parser.add_argument("--check", action="store_true", help="compare with the tables instead of writing them")
    asked = parser.parse_args()
    if unknown := set(asked.operator) - set(operators()):
        parser.error(f"no operator {', '.join(sorted(unknown))}; there are {', '.join(operators())}")
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        lines = [line for name in asked.operator or operators() for line in run(name, asked.check)]
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
