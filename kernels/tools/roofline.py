"""Predict, without a GPU, how long an operator takes: from its machine code and what is published about GPUs.

    python kernels/tools/roofline.py            # prints the table
    python kernels/tools/roofline.py --write    # puts it into kernels/README.md, between its two markers, and prints
                                                # which targets of benchmarks/cases.py the model says are met

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
from typing import Any

from gpu_model import duration
from gpus import GPUS, Gpu
from launches import MODELS, Spent, forming, int4_linear, two_calls
from resource_files import KERNELS, README, between

sys.path.insert(0, str(KERNELS / "benchmarks"))

BEGIN, END = "<!-- roofline: begin -->\n", "<!-- roofline: end -->\n"

LAYERS = ((4096, 4096), (28672, 8192))  # q of Llama 8B, gate of Llama 70B
TOKENS = (1, 4, 16, 64, 256, 4096)  # those of the benchmark
OTHERS = {"int4_linear": int4_linear, "two calls": two_calls}  # what targets compare with beside the dense form


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


@dataclass(frozen=True)
class Worst:
    """Of all layers and M that a target speaks of, the least ratio on one GPU."""

    ratio: float
    tokens: int
    rows: int
    columns: int
    met: bool


def worst(target: Any, gpu: Gpu) -> Worst:
    """What the model says of a target, a `cases.Target`."""
    from cases import OPERATORS, int4_bytes

    (operator,) = (one for one in OPERATORS if one.name == target.operator)
    shapes = {(s.rows, s.columns) for s in operator.shapes() if int4_bytes(s.rows, s.columns) >= target.int4_bytes}
    ratio, tokens, (rows, columns) = min(
        (against(target, gpu, tokens, *shape), tokens, shape) for tokens in target.tokens for shape in sorted(shapes)
    )
    return Worst(ratio, tokens, rows, columns, ratio >= target.at_least)


def against(target: Any, gpu: Gpu, tokens: int, rows: int, columns: int) -> float:
    """Time of what a target compares with over that of the operator."""
    model = MODELS[target.operator]
    ours = seconds(gpu, model.spent(gpu, tokens, rows, columns))
    if target.against == "bf16":
        return model.dense(gpu, tokens, rows, columns) / ours
    return seconds(gpu, OTHERS[target.against](gpu, tokens, rows, columns)) / ours


def seconds(gpu: Gpu, does: Spent) -> float:
    """Of all that an operator does."""
    return does.torch + sum(duration(gpu, launch)[0] for launch in does.launches)


def targets() -> Iterator[str]:
    """Markdown: one row per target, one column per GPU, and how many of the targets are met."""
    from cases import TARGETS

    found = {target.text(): [worst(target, gpu) for gpu in GPUS] for target in TARGETS}
    yield f"\n| target, and the worst case in the model | {' | '.join(gpu.name for gpu in GPUS)} |\n"
    yield f"|---|{'---|' * len(GPUS)}\n"
    for text, row in found.items():
        yield f"| {text} | {' | '.join(map(as_verdict, row))} |\n"
    met = [f"{sum(row[i].met for row in found.values())} of {len(found)} on {g.name}" for i, g in enumerate(GPUS)]
    yield f"\nTargets that the model says are met: {', '.join(met)}.\n"


def as_verdict(found: Worst) -> str:
    """A cell: `2.41x, missed (M = 1, 8192 x 8192)`."""
    return (
        f"{found.ratio:.2f}x, {'met' if found.met else 'missed'} (M = {found.tokens}, {found.rows} x {found.columns})"
    )


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
    yield from targets()


def shown(operator: str) -> str:
    """A name in Markdown: code up to the comma."""
    name, comma, use = operator.partition(",")
    return f"`{name}`{comma}{use}"


def in_words(found: Prediction) -> str:
    """A cell: `12 µs, 3.1x, 81%, memory`."""
    return f"{found.seconds * 1e6:.3g} µs, {found.ratio:.2f}x, {found.share:.0%}, {found.limit}"


def with_table(text: str) -> str:
    """The README with today's table between its markers; raises ValueError if it has none."""
    return between(text, BEGIN, END, "".join(table()))


def main() -> int:
    """Print the table or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into kernels/README.md")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
        print(*targets(), sep="", end="")
    else:
        print(*table(), sep="", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
