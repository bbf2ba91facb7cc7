"""Speed and memory of one model, measured in the process that this module is the main program of.

    python -m llmcompress.speed JSON        the fields of Case; prints the fields of Measured as one JSON object

Memory is that of the process beyond what it had with all libraries imported and no model, or on a GPU what torch
allocated there. The tokens are random.
"""

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from llmcompress.generation import Clock, generate, load_to_generate
from llmcompress.runtime import accelerated

STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Case:
    """What to measure."""

    folder: str
    packed: bool
    prompt: int  # tokens
    new: int  # tokens, at least 2
    dtype: str = "bfloat16"
    device: str = "auto"
    compiled: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found."""

    load_seconds: float
    prefill_seconds: float  # reads the prompt and makes one token
    decode_seconds: float  # per token after the first one, median
    weight_bytes: int
    read_bytes: int  # of weights, for each token
    resident_bytes: int  # after generating, beyond the libraries
    peak_bytes: int  # while loading and generating, beyond the libraries
    libraries_bytes: int
    threads: int
    device: str
    linears: str  # what was packed


def measure(case: Case) -> Measured:
    """Load, generate once to warm up, and once for the clock."""
    import compressed_tensors.compressors  # noqa: F401  # before memory is looked at, whether or not it is needed
    import transformers  # noqa: F401

    before, start = resident(), time.perf_counter()
    model = load_to_generate(
        Path(case.folder), packed=case.packed, dtype=case.dtype, device=case.device,
        trust_remote_code=case.trust_remote_code,
    )  # fmt: skip
    load_seconds = time.perf_counter() - start
    clock = timed(model, case)
    return Measured(
        load_seconds=load_seconds,
        prefill_seconds=clock.steps[0],
        decode_seconds=median(clock.steps[1:]),
        weight_bytes=sum(tensor_bytes(model).values()),
        read_bytes=read_bytes(model),
        resident_bytes=torch.cuda.memory_allocated() if model.device.type == "cuda" else resident() - before,
        peak_bytes=torch.cuda.max_memory_allocated() if model.device.type == "cuda" else peak() - before,
        libraries_bytes=before,
        threads=torch.get_num_threads(),
        device=str(model.device),
        linears=accelerated(model).in_words(),
    )


def timed(model: Any, case: Case) -> Clock:
    """The clock of a second generation; a compiled step is compiled in the first one, at its full length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.get_text_config().vocab_size, (1, case.prompt), generator=generator)
    model.generation_config.eos_token_id = None  # as many tokens as were asked for
    generate(model, tokens, case.new if case.compiled else 2, compiled=case.compiled)
    gc.collect()
    clock = Clock()
    generate(model, tokens, case.new, compiled=case.compiled, streamer=clock)
    return clock


def tensor_bytes(model: Any) -> dict[str, int]:
    """Bytes of every weight, by name; a weight that two modules share counts once."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.nbytes for name, tensor in tensors}


def read_bytes(model: Any) -> int:
    """Bytes of weights that one token needs: all of them, but of an embedding that is not the head too, one row."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(tensor_bytes(model).values())
    weight = embedding.weight
    shared = head is not None and getattr(head, "weight", None) is weight
    return total if shared else total - weight.nbytes + weight.nbytes // len(weight)


def resident() -> int:
    """Bytes of this process in memory."""
    return psutil.Process().memory_info().rss


def peak() -> int:
    """The most that was resident at any time. The kernel's own mark: `getrusage` has that of the parent too."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text("ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: str) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(asdict(measure(Case(**json.loads(arguments))))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
