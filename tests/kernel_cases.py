"""Int4 weights and cases for the tests of kernels, and how a case is run in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from llmcompress_kernels import Int4Weight
from llmcompress_kernels.int4_linear.layout import to_tiles
from torch import Tensor

ROOT = Path(__file__).parents[1]


def int4_weight(
    rows: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype, generator: torch.Generator
) -> Int4Weight:
    """A random weight as a model has it: codes of all 16 values, scales around 1 / sqrt(in)."""
    size = (columns // group, rows)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = ((torch.rand(size, generator=generator) + 0.5) / (8 * columns**0.5)).to(dtype)
    zero = None if symmetric else torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
    return Int4Weight(to_tiles(codes), scale, zero)


def case(
    operator: str, tokens: int, rows: int, columns: int, group: int, dtype: str = "bfloat16", **more: Any
) -> dict[str, Any]:
    """Input of interpreted_program.py."""
    shape = {"tokens": tokens, "rows": rows, "columns": columns, "group": group, "dtype": dtype}
    return {"operator": operator, "zero": True, "bias": True, "transposed": False} | shape | more


def interpreted(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of interpreted_program.py, one for each case."""
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests/interpreted_program.py")]
    ran = subprocess.run(
        program, input=json.dumps(cases), env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def assert_exact(found: dict[str, Any], asked: dict[str, Any]) -> None:
    """At most twice the error of torch, and the same bits where bits count. A NaN anywhere fails the comparison."""
    assert found["kernel"] <= 2 * found["torch"], (asked, found)
    assert found["unpacked"], asked
    assert found["repeated"], asked
    assert found["shape"] == [asked["tokens"], asked["rows"]]
    assert found["dtype"] == f"torch.{asked['dtype']}"


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth; NaN if anything is NaN."""
    if truth.numel() == 0:
        return 0.0
    return float((found.double() - truth).norm() / truth.norm())
