"""From how many tokens on one way of multiplying is faster than another: measured once per machine, and kept.

A weight that reads each row once per few tokens loses, at some number of tokens, to one that unpacks it first. The
number depends on the CPU and its threads, and on the weight: a small one stays in a cache, and what a call costs by
itself counts for more. So it is looked for on one random weight of each class of sizes in use, when the first weight of
the class meets several tokens, in less than a second, and kept beside the compiled libraries. It decides about speed,
not about what is right: a wrong one costs time only.

The search halves the range of tokens, so that few numbers are tried, each of them with both ways in turn several times,
whose medians are compared: what else the machine does falls on both.
"""

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .native import Unavailable, cache_folder, processor, sources

Way = Callable[[Tensor, Any, Tensor | None], Tensor]  # x, weight, bias -> y
Sample = Callable[[torch.dtype, int, int], Any]  # a weight [out, in]
CLASSES = {  # out, in of the weight that stands for others of its class
    "small": (576, 576),
    "medium": (1536, 576),
    "large": (2048, 2048),
}
MEDIUM, LARGE = 1 << 19, 1 << 20  # weights from which on one is of the class
CANDIDATES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens; none of them: 96
NONE = 96
TURNS = 9  # of both ways; the first does not count
FEWEST = 4  # turns when the time is up: of three that count, one may be disturbed
SECONDS = 0.5  # for one search


def crossover(name: str, dtype: torch.dtype, few: Way, many: Way, sample: Sample, shape: tuple[int, int]) -> int:
    """The smallest number of tokens at which `many` is at least as fast as `few`.

    name: of the two ways.  shape: out, in of the weight in question.
    """
    weights = shape[0] * shape[1]
    size = "large" if weights >= LARGE else "medium" if weights >= MEDIUM else "small"
    return found(name, size, torch.get_num_threads(), dtype, few, many, sample)


@functools.cache
def found(name: str, size: str, threads: int, dtype: torch.dtype, few: Way, many: Way, sample: Sample) -> int:
    about = (name, size, CLASSES[size], threads, torch.__version__, processor(), sources())
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    try:
        path = cache_folder() / f"crossover-{key}.json"
    except Unavailable:
        return measure(dtype, few, many, sample, CLASSES[size])  # once per process
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        if kept in (*CANDIDATES, NONE):
            return int(kept)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or damaged: measure
    tokens = measure(dtype, few, many, sample, CLASSES[size])
    keep(path, {"what": name, "size": size, "threads": threads, "torch": torch.__version__, "tokens": tokens})
    return tokens


def measure(dtype: torch.dtype, few: Way, many: Way, sample: Sample, shape: tuple[int, int]) -> int:
    """Halve the candidates until one is left."""
    weight, generator = sample(dtype, *shape), torch.Generator().manual_seed(0)
    end = time.perf_counter() + SECONDS
    low, high = 0, len(CANDIDATES)
    while low < high:
        middle = (low + high) // 2
        x = torch.randn(CANDIDATES[middle], shape[1], generator=generator).to(dtype)
        if seconds_more(many, few, x, weight, end) <= 0:
            high = middle
        else:
            low = middle + 1
    return CANDIDATES[low] if low < len(CANDIDATES) else NONE


def seconds_more(one: Way, other: Way, x: Tensor, weight: Any, end: float) -> float:
    """What the median call of one way takes longer than that of another; they take turns, fewer after `end`."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS):
        for way, taken in zip((one, other), times, strict=True):
            start = time.perf_counter()
            way(x, weight, None)
            taken.append(time.perf_counter() - start)
        if turn + 1 >= FEWEST and time.perf_counter() > end:
            break
    return median(times[0][1:]) - median(times[1][1:])


def keep(path: os.PathLike[str], content: dict[str, object]) -> None:
    """Write a small file whole or not at all. A folder that cannot be written costs a measurement per process."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError:
        return
