"""Predict, without a GPU, how long an operator takes: from its machine code and what is published about GPUs.

    python kernels/tools/roofline.py            # prints the table
    python kernels/tools/roofline.py --write    # puts it into kernels/README.md, between its two markers

The model of a launch is gpu_model.py; GPUs and the sources of their numbers are gpus.py. Registers, shared memory and
instructions are those of kernels/resources/<operator>.json; grids and splits are those which the operator's `launch.py`
would choose (launches.py). Weights are symmetric, in groups of 128. `form` is `sparse24_linear` with a form of the
weight for torch's library; making it is not in the row, but below the table.

Each cell is microseconds, the time of the dense bfloat16 form over it, the share of the datasheet's bandwidth that
reading packed weights and x and writing y once makes of it, and what most of the time is spent on. The dense form is a
BLAS that is never short of bytes in flight, which is kinder to it than small layers are.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_model import duration
from gpus import GPUS, Gpu
from launches import MODELS, forming
from resources import KERNELS

README = KERNELS / "README.md"
BEGIN, END = "<!-- roofline: begin -->\n", "<!-- roofline: end -->\n"

LAYERS = ((4096, 4096), (28672, 8192))  # q of Llama 8B, gate of Llama 70B
TOKENS = (1, 4, 16, 64, 256, 4096)  # those of the benchmark


@dataclass(frozen=True)
class Prediction:
    """One cell."""

    seconds: float
    ratio: float
    share: float
    limit: str


def predict(operator: str, gpu: Gpu, tokens: int, rows: int, columns: int) -> Prediction:
    """One cell of the table."""
    model = MODELS[operator]
    does = model.spent(gpu, tokens, rows, columns)
    spent = {"BLAS": does.torch}
    for launch in does.launches:
        took, limit = duration(gpu, launch)
        spent[limit] = spent.get(limit, 0.0) + took
    total = sum(spent.values())
    share = (model.weight_bytes(rows, columns) + 2 * tokens * (rows + columns)) / total / gpu.bandwidth
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
                yield f"| {shown(operator)} | {rows} x {columns} | {tokens} | {' | '.join(cells)} |\n"
    for rows, columns in LAYERS:
        times = ", ".join(f"{forming(gpu, rows, columns) * 1e6:.3g} µs ({gpu.name})" for gpu in GPUS)
        yield f"\nMaking a form of {rows} x {columns}, once per weight: {times}.\n"


def shown(operator: str) -> str:
    """A name in Markdown: code up to the comma."""
    name, comma, use = operator.partition(",")
    return f"`{name}`{comma}{use}"


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
