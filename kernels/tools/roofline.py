"""Predict, without a GPU, how long an operator takes: from its machine code and what is published about GPUs.

    python kernels/tools/roofline.py            # prints the table
    python kernels/tools/roofline.py --write    # puts it into kernels/README.md, between its two markers

The model of a launch is gpu_model.py; GPUs and the sources of their numbers are gpus.py. Registers, shared memory and
instructions are those of kernels/resources/<operator>.json; grids and splits are those which the operator's `launch.py`
would choose. Weights are symmetric, in groups of 128. To add an operator: a function as `int4_linear` below, and a row
in MODELS.

Each cell is microseconds, the time of the dense bfloat16 form over it, the share of the datasheet's bandwidth that
reading packed weights and x and writing y once makes of it, and what most of the time is spent on. The dense form is a
BLAS that is never short of bytes in flight, which is kinder to it than small layers are.
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_model import Code, Launch, blas, duration, stream
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


@dataclass(frozen=True)
class Spent:
    """What an operator does: launches of its own kernels, and seconds in the BLAS and elsewhere in torch."""

    launches: list[Launch]
    torch: float = 0.0


@dataclass(frozen=True)
class Modelled:
    """An operator: what it does, what the dense form of it takes, and the least traffic in bytes.

    All three take M, rows and columns of each weight; the first two a GPU before them.
    """

    spent: Callable[[Gpu, int, int, int], Spent]
    dense: Callable[[Gpu, int, int, int], float]
    bytes: Callable[[int, int, int], float]


def int4_bytes(rows: int, columns: int) -> float:
    """Packed symmetric weight with 16-bit scales."""
    return rows * columns * (0.5 + 2 / GROUP)


def packed_product(
    operator: str, kernels: tuple[str, str, str], gpu: Gpu, tokens: int, rows: int, columns: int, **constants: Any
) -> list[Launch]:
    """Launches for one token or few: the kernel that multiplies, and the reduce if the inner dimension is split.

    kernels: for one token, for more, and the reduce, which gets `constants` as far as it has them.
    """
    from llmcompress_kernels.int4_linear.layout import TILE
    from llmcompress_kernels.launching import planned

    launch = importlib.import_module(f"llmcompress_kernels.{operator}.launch")
    inner = -(-columns // TILE)
    plan = planned((launch.GEMV, *launch.GEMM), tokens, rows, inner, gpu.processors)
    shape = {} if tokens == 1 else {"BM": plan.tiles.tokens}
    made = code_of(operator, gpu.architecture, kernels[tokens > 1], GROUP=GROUP, **shape, **constants)
    matrices = made.weights // (plan.tiles.rows * TILE)  # two in a gated MLP
    packed = matrices * int4_bytes(rows, columns)
    reads = 1 if packed <= gpu.cache else plan.grid[1]  # a weight that fits in L2 stays there for the next tokens
    results = 2 * tokens * rows if plan.splits == 1 else 4 * plan.splits * matrices * tokens * rows
    padded = plan.grid[0] * plan.tiles.rows * plan.grid[1] * plan.tiles.tokens
    flops = 2.0 * matrices * padded * columns if tokens > 1 else 0.0
    programs = plan.grid[0] * plan.grid[1] * plan.splits
    launches = [Launch(made, programs, made.weights * plan.span, reads * packed + 2 * tokens * columns, results, flops)]
    if plan.splits > 1:
        programs = -(-rows // launch.REDUCE.rows) * tokens
        activation = {name: value for name, value in constants.items() if name == "ACTIVATION"}
        reduce = code_of(operator, gpu.architecture, kernels[2], **activation)
        launches.append(Launch(reduce, programs, 0, results, 2 * tokens * rows))
    return launches


def unpacked(gpu: Gpu, rows: int, columns: int) -> Launch:
    """Writing the dense weight."""
    from llmcompress_kernels.int4_linear.launch import DEQUANTIZE
    from llmcompress_kernels.int4_linear.layout import TILE

    made = code_of("int4_linear", gpu.architecture, "int4_dequantize", GROUP=GROUP, zero_ptr=None)
    programs = -(-rows // DEQUANTIZE.rows) * -(-columns // TILE)
    return Launch(made, programs, made.weights, int4_bytes(rows, columns), 2.0 * rows * columns)


def int4_linear(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """On symmetric weights."""
    from llmcompress_kernels.int4_linear.launch import BLAS_TOKENS

    if tokens > BLAS_TOKENS:
        return Spent([unpacked(gpu, rows, columns)], blas(gpu, tokens, rows, columns))
    kernels = ("int4_gemv", "int4_gemm", "reduce_splits")
    return Spent(packed_product("int4_linear", kernels, gpu, tokens, rows, columns, zero_ptr=None))


def int4_gated_mlp(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """On two symmetric weights, with SwiGLU."""
    from llmcompress_kernels.int4_gated_mlp.launch import BLAS_TOKENS

    if tokens > BLAS_TOKENS:
        return Spent([unpacked(gpu, rows, columns)] * 2, dense_gated(gpu, tokens, rows, columns))
    symmetric = {"gate_zero_ptr": None, "up_zero_ptr": None, "parts_ptr": None, "ACTIVATION": "silu"}
    kernels = ("gated_gemv", "gated_gemm", "reduce_gated")
    return Spent(packed_product("int4_gated_mlp", kernels, gpu, tokens, rows, columns, **symmetric))


def dense_gated(gpu: Gpu, tokens: int, rows: int, columns: int) -> float:
    """Two linears, an activation and a product; the latter two read and write five times M x rows."""
    return 2 * blas(gpu, tokens, rows, columns) + stream(gpu, 2, 5 * 2.0 * tokens * rows)


MODELS = {
    "int4_linear": Modelled(int4_linear, blas, lambda m, n, k: int4_bytes(n, k) + 2 * m * (n + k)),
    "int4_gated_mlp": Modelled(int4_gated_mlp, dense_gated, lambda m, n, k: 2 * int4_bytes(n, k) + 2 * m * (n + k)),
}


def predict(operator: str, gpu: Gpu, tokens: int, rows: int, columns: int) -> Prediction:
    """One cell of the table."""
    model = MODELS[operator]
    does = model.spent(gpu, tokens, rows, columns)
    spent = {"BLAS": does.torch}
    for launch in does.launches:
        took, limit = duration(gpu, launch)
        spent[limit] = spent.get(limit, 0.0) + took
    total = sum(spent.values())
    share = model.bytes(tokens, rows, columns) / total / gpu.bandwidth
    limit = max(spent, key=lambda reason: spent[reason])
    return Prediction(total, model.dense(gpu, tokens, rows, columns) / total, share, limit)


def table(operators: Sequence[str] = tuple(MODELS)) -> Iterator[str]:
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
