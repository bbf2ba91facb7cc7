"""Time of a call whose weights come from memory, not from a cache, and without what Python and launches cost.

A model reads every weight once per token, so none of them is in the cache when its turn comes. Here as many copies of
the weights as fill the L2 cache several times are called one after another; x stays, as it does in a model. On a GPU,
all these calls are one CUDA graph. Implementations are sampled in turns, so that a clock that changes hurts all.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]

CACHES = 3  # the copies of the weights fill the L2 cache that many times
MAX_COPIES = 1024
SAMPLE_SECONDS = 0.01  # of one sample; shorter ones would show the clock's own steps


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in tuples, dataclasses and modules."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, torch.nn.Module):
        yield from tree.state_dict().values()
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors(part)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from tensors(getattr(tree, field.name))


def size(tree: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(tensor.nbytes for tensor in tensors(tree))


def copies(prepared: Any, cache_bytes: int) -> list[Any]:
    """`prepared` and as many copies of it as fill the cache CACHES times; at least two."""
    count = min(max(math.ceil(CACHES * cache_bytes / size(prepared)), 2), MAX_COPIES)
    return [prepared, *(copy.deepcopy(prepared) for _ in range(count - 1))]


def rounds(calls: Sequence[Run], device: torch.device) -> Run:
    """Something that does all the calls once; on a GPU a CUDA graph, after a first round that compiles and tunes."""

    def one_after_another() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        one_after_another()
        return one_after_another
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        one_after_another()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_after_another()
    return graph.replay


def elapsed(run: Run, times: int, device: torch.device) -> float:
    """Seconds of `times` runs."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def medians(runs: dict[str, Run], device: torch.device, samples: int) -> dict[str, float]:
    """Seconds of one run of each, the median of samples that are taken in turns."""
    times = {}
    for name, run in runs.items():
        once = max(elapsed(run, 1, device), 1e-9)
        times[name] = max(math.ceil(SAMPLE_SECONDS / once), 1)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            found[name].append(elapsed(run, times[name], device) / times[name])
    return {name: statistics.median(values) for name, values in found.items()}


def copy_bandwidth(device: torch.device, size: int, samples: int) -> float:
    """Bytes per second, read and written, of a copy from memory to memory: what any kernel can hope for."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = rounds([lambda: target.copy_(source)], device)
    return 2 * size / medians({"copy": run}, device, samples)["copy"]
