"""Predict, without a GPU, how long an operator takes: from its machine code and what is published about GPUs.

    python kernels/tools/roofline.py            # prints the table
    python kernels/tools/roofline.py --write    # puts it into kernels/README.md, between its two markers

The model of a launch is gpu_model.py; GPUs and the sources of their numbers are gpus.py. Registers, shared memory and
instructions are those of kernels/resources/<operator>.json; grids and splits are those which the operator's `launch.py`
would choose. To add an operator: a function as `int4_linear` below, and a row in PLANS.

Each cell is microseconds, the time of a dense bfloat16 linear over it, the share of the datasheet's bandwidth that
reading the packed weight and x and writing y once makes of it, and what most of the time is spent on. The dense linear
is a BLAS that is never short of bytes in flight, which is kinder to it than small layers are.
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_model import Code, Launch, blas, duration
from gpus import GPUS, Gpu
from resources import KERNELS, TABLES, Case

README = KERNELS / "README.md"
BEGIN, END = "<!-- roofline: begin -->\n", "<!-- roofline: end -->\n"

GROUP = 128
LAYERS = ((4096, 4096), (14336, 4096), (28672, 8192))  # q and gate of Llama 8B, gate of Llama 70B
TOKENS = (1, 16, 64, 256, 4096)


@dataclass(frozen=True)
class Prediction:
    """One cell."""

    seconds: float
    ratio: float
    share: float
    limit: str


@functools.cache
def compiled(operator: str) -> dict[str, Any]:
    """The resource table of an operator."""
    return json.loads((TABLES / f"{operator}.json").read_text(encoding="utf-8"))["kernels"]


@functools.cache
def code_of(operator: str, architecture: int, kernel: str, **constants: Any) -> Code:
    """The only configuration of a kernel with these constants, compiled for bfloat16.

    Raises LookupError if there is none or more than one: then the launcher and this file disagree.
    """
    launch = importlib.import_module(f"llmcompress_kernels.{operator}.launch")
    found = [
        configuration
        for configuration in launch.configurations()
        if configuration.kernel == kernel and constants.items() <= configuration.constants.items()
    ]
    if len(found) != 1:
        raise LookupError(
            f"roofline: {len(found)} configurations of {operator} {kernel} with {constants}, expected one"
        )
    row = compiled(operator)[Case(operator, found[0], architecture, "bf16").name()]
    return Code(
        row["registers"], row["shared_bytes"], found[0].warps, found[0].stages, row["instructions"],
        row["loop_per_weight"], found[0].weights,
    )  # fmt: skip


def int4_bytes(rows: int, columns: int) -> float:
    """Packed symmetric weight with 16-bit scales."""
    return rows * columns * (0.5 + 2 / GROUP)


def int4_linear(gpu: Gpu, tokens: int, rows: int, columns: int) -> tuple[list[Launch], float]:
    """The launches of `int4_linear_triton` on symmetric weights, and the seconds that it spends in the BLAS."""
    from llmcompress_kernels.int4_linear import launch
    from llmcompress_kernels.launching import spans

    code = functools.partial(code_of, "int4_linear", gpu.architecture)
    tiles, packed = -(-columns // launch.TILE), int4_bytes(rows, columns)
    if tokens > launch.BLAS_TOKENS:
        programs = -(-rows // launch.DEQUANTIZE.rows) * tiles
        made = code("int4_dequantize", GROUP=GROUP, zero_ptr=None)
        unpack = Launch(made, programs, launch.DEQUANTIZE.rows * launch.TILE, packed, 2.0 * rows * columns)
        return [unpack], blas(gpu, tokens, rows, columns)
    if tokens == 1:
        chosen, made = launch.GEMV, code("int4_gemv", GROUP=GROUP, zero_ptr=None)
    else:
        chosen = next((t for t in launch.GEMM if tokens <= t.tokens), launch.GEMM[-1])
        made = code("int4_gemm", GROUP=GROUP, zero_ptr=None, BM=chosen.tokens)
    across, down = -(-rows // chosen.rows), -(-tokens // chosen.tokens)
    span, splits = spans(tiles, across * down, gpu.processors)
    reads = 1 if packed <= gpu.cache else down  # a weight that fits in L2 stays there for the next tokens
    results = 2 * tokens * rows if splits == 1 else 4 * splits * tokens * rows
    flops = 2.0 * down * chosen.tokens * across * chosen.rows * columns if tokens > 1 else 0.0
    loaded = reads * packed + 2 * tokens * columns
    launches = [Launch(made, across * down * splits, chosen.rows * launch.TILE * span, loaded, results, flops)]
    if splits > 1:
        programs = -(-rows // launch.REDUCE.rows) * tokens
        launches.append(Launch(code("reduce_splits"), programs, 0, results, 2 * tokens * rows))
    return launches, 0.0


Plan = Callable[[Gpu, int, int, int], tuple[list[Launch], float]]
PLANS: dict[str, Plan] = {"int4_linear": int4_linear}


def predict(operator: str, gpu: Gpu, tokens: int, rows: int, columns: int) -> Prediction:
    """One cell of the table."""
    launches, seconds = PLANS[operator](gpu, tokens, rows, columns)
    spent = {"BLAS": seconds}
    for launch in launches:
        took, limit = duration(gpu, launch)
        spent[limit] = spent.get(limit, 0.0) + took
    total = sum(spent.values())
    least = int4_bytes(rows, columns) + 2 * tokens * (rows + columns)
    limit = max(spent, key=lambda reason: spent[reason])
    return Prediction(total, blas(gpu, tokens, rows, columns) / total, least / total / gpu.bandwidth, limit)


def table(operators: Sequence[str] = tuple(PLANS)) -> Iterator[str]:
    """Markdown: one row per operator, layer and M, one column per GPU."""
    yield f"| operator | weight | M | {' | '.join(gpu.name for gpu in GPUS)} |\n"
    yield f"|---|---|---|{'---|' * len(GPUS)}\n"
    for operator in operators:
        for rows, columns in LAYERS:
            for tokens in TOKENS:
                cells = [in_words(predict(operator, gpu, tokens, rows, columns)) for gpu in GPUS]
                yield f"| `{operator}` | {rows} x {columns} | {tokens} | {' | '.join(cells)} |\n"


def in_words(found: Prediction) -> str:
    """A cell: `12 µs, 3.1x, 81%, memory`."""
    return f"{found.seconds * 1e6:.3g} µs, {found.ratio:.2f}x, {found.share:.0%}, {found.limit}"


def with_table(text: str) -> str:
    """The README with today's table between its markers; raises ValueError if it has none."""
    head, found, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{README} has no line {BEGIN.strip()} followed by a line {END.strip()}")
    return head + BEGIN + "".join(table()) + END + tail


def main() -> int:
    """Print the table or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into kernels/README.md")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(*table(), sep="", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
