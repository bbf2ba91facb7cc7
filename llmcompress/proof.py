"""Proof that a finished folder loads in stock libraries and computes what the methods decided.

A clean Python process runs `reload.py`, which imports nothing of llmcompress, unless the folder is in one of our own
formats, which `llmcompress.runtime` loads. What is checked:

- every compressed weight has the same bytes as the values the method chose, unpacked by the stock libraries;
- so has every LoRA matrix, if the folder has an adapter, which the peft library loads;
- logits on calibration tokens agree with those of the stream. The tolerance follows from the dtype: each of the 2 L
  additions to the residual stream is rounded with relative error up to eps, what is added is a sum of K products
  accumulated in float32, and independent errors add up to (eps + eps32 sqrt(K)) sqrt(2 L). Where the result rounds in
  more places than the stream (`Plan.roundings` for each addition), to as many times more under the root. A model that
  was cut to pieces may amplify such errors: where they are larger than that, the reloaded model is computed in float32
  too, and what rounding changes there, each of the two may differ by from what is exact.

Stock transformers unpacks the whole model into memory. Where that does not fit (the recipe's max_memory, or what the
machine has free), the model is reloaded with only its first blocks, and compared with what the stream had after them;
the weights of all other blocks are unpacked one by one.
"""

import hashlib
import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.cost import LIBRARIES, PROOF_SAMPLES, block_bytes, vocabulary
from llmcompress.errors import FormatError, PlanError
from llmcompress.formats import OWN
from llmcompress.lazy import Tensor, torch
from llmcompress.machine import gib
from llmcompress.plan import Plan
from llmcompress.source import has_own_code

POSITIONS = 64  # per sample, evenly spaced: logits of every position would be a gigabyte


def proof_blocks(plan: Plan) -> int:
    """How many blocks the reloaded model can have within the memory bound; all of them where they fit."""
    import psutil

    item = plan.itemsize
    budget = int(0.8 * psutil.virtual_memory().available)
    if plan.recipe.max_memory is not None:
        budget = min(budget, plan.recipe.max_memory - LIBRARIES)  # the run's own process waits beside it
    outside = sum(prod(info.shape) for info in plan.tensors_of(None)) * item
    block = block_bytes(plan)
    logits = PROOF_SAMPLES * POSITIONS * 4 * vocabulary(plan) * 4
    fitting = int((budget - LIBRARIES - 1.2 * outside - logits) // (1.5 * block))  # packed and unpacked at once
    if fitting < 1:
        raise PlanError(
            f"max_memory: stock transformers cannot reload even one block of this model within {gib(budget)}, so the "
            f"result could not be proved; allow {gib(int(2 * LIBRARIES + 1.2 * outside + logits + 1.5 * block))}"
        )
    return min(fitting, plan.count)


def digest(values: Tensor) -> str:
    """sha256 of the bytes of a weight."""
    return hashlib.sha256(values.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def positions(length: int) -> Tensor:
    """Positions whose logits are compared, [m] int64, the last one included."""
    count = min(POSITIONS, length)
    return torch.linspace(0, length - 1, count).round().long().unique()


def write_expected(path: Path, tokens: Tensor, at: Tensor, logits: Tensor, names: dict[str, Any]) -> None:
    """What the reloaded model must reproduce: logits [n, m, vocabulary] of tokens [n, length] at positions `at`.

    names: "blocks", module path of the decoder blocks; "digests", module path -> digest of its weight; "adapter",
    peft's name of a LoRA matrix -> its digest.
    """
    from safetensors.torch import save_file

    tensors = {"tokens": tokens.contiguous(), "positions": at, "logits": logits.contiguous()}
    save_file(tensors, path, {key: json.dumps(value) for key, value in names.items()})


def tolerance_of(plan: Plan, blocks: int) -> float:
    """Relative RMS that rounding explains: residual additions in the dtype, and sums of K products in float32."""
    widest = max(linear.shape[1] for linear in plan.linears)
    return (torch.finfo(plan.dtype).eps + torch.finfo(torch.float32).eps * widest**0.5) * (
        2 * blocks * plan.roundings
    ) ** 0.5


def prove(plan: Plan, folder: Path, expected: Path, blocks: int) -> dict[str, Any]:
    """Reload `folder` with its first `blocks` blocks in a clean process and compare; the proof for results.json.

    Raises FormatError if it cannot be loaded, or computes something else.
    """
    script = Path(__file__).with_name("reload.py")
    tolerance = tolerance_of(plan, blocks)
    command = [sys.executable, "-I", str(script), str(folder.absolute()), str(expected.absolute())]
    command += [str(blocks), str(tolerance)]
    command += ["trust"] if plan.recipe.trust_remote_code or has_own_code(folder) else []
    done = subprocess.run(command, capture_output=True, input="", text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode} and no message"])[-1]
        raise FormatError(f"{folder}: stock transformers cannot load the result: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    tolerance = max(tolerance, 2 * (found["rounding_rms"] or 0.0))
    different, rms = found.pop("weights_different"), found["relative_rms"]
    if different:
        raise FormatError(
            f"{folder}: {len(different)} weights differ after reloading in {found['engine']}, the first is "
            f"{different[0]}"
        )
    if found["imported_llmcompress"] and plan.format_name not in OWN:
        raise FormatError(f"{folder}: the process that should prove stock loading imported llmcompress")
    if not rms <= tolerance:  # also refuses NaN
        raise FormatError(
            f"{folder}: logits after reloading in {found['engine']} differ by {rms:.2g} (relative RMS) from what was "
            f"compressed, {tolerance:.2g} is what rounding to {plan.recipe.dtype} explains"
        )
    return {"passed": True, "tolerance": tolerance} | found
