"""From how many tokens on one way of multiplying is faster than another: measured once per machine, and kept.

A weight that reads each row once per few tokens loses, at some number of tokens, to one that unpacks it first. The
number depends on the CPU and its threads. It is looked for on a small random weight, in a fraction of a second, and
kept beside the compiled libraries. It decides about speed, not about what is right: a wrong one costs time only.
"""

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .native import Unavailable, cache_folder, processor, sources

Way = Callable[[Tensor, Any, Tensor | None], Tensor]  # x, weight, bias -> y
Sample = Callable[[torch.dtype], Any]  # a weight of SIDE by SIDE
SIDE = 1024
CANDIDATES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens; none of them: 96
NONE = 96
REPEATS = 5  # the fastest of them counts
SECONDS = 1.0  # after which the search ends with what it has


def crossover(name: str, dtype: torch.dtype, few: Way, many: Way, sample: Sample) -> int:
    """The smallest number of tokens at which `many` is at least as fast as `few`. `name`: of the two ways."""
    return found(name, torch.get_num_threads(), dtype, few, many, sample)


@functools.cache
def found(name: str, threads: int, dtype: torch.dtype, few: Way, many: Way, sample: Sample) -> int:
    key = hashlib.sha256(repr((name, threads, torch.__version__, processor(), sources())).encode()).hexdigest()[:32]
    try:
        path = cache_folder() / f"crossover-{key}.json"
    except Unavailable:
        return measure(dtype, few, many, sample(dtype))  # once per process
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        if kept in (*CANDIDATES, NONE):
            return int(kept)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or damaged: measure
    tokens = measure(dtype, few, many, sample(dtype))
    keep(path, {"what": name, "threads": threads, "torch": torch.__version__, "tokens": tokens})
    return tokens


def measure(dtype: torch.dtype, few: Way, many: Way, weight: Any) -> int:
    """Time both ways for rising numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    end = time.perf_counter() + SECONDS
    for tokens in CANDIDATES:
        x = torch.randn(tokens, SIDE, generator=generator).to(dtype)
        if fastest(many, x, weight) <= fastest(few, x, weight):
            return tokens
        if time.perf_counter() > end:
            break
    return NONE


def fastest(way: Way, x: Tensor, weight: Any) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        way(x, weight, None)
        times.append(time.perf_counter() - start)
    return min(times)


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
