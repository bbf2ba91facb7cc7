"""TEAL: inputs of linears that are small count as zero, and their columns are not read.

Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models" (TEAL), arXiv:2408.14690. For a linear
with weight W and input x, of which the share p is to count as zero:

    y = W s(x)          s(x)_k = x_k where |x_k| > t, else 0          t: the quantile p of |x| on calibration data

A greedy search spreads the share of a block over its linears (`allocation.py`).

- runtime: teal
  sparsity: 0.4
"""

from typing import ClassVar, Literal

from pydantic import Field

from llmcompress.options import Options
from llmcompress.shelf import Shelf


class Runtime(Options):
    """What all run-time steps have: the linears that they are for."""

    targets: list[str] = Field(["*"], min_length=1, description="globs on module names")


class Teal(Runtime):
    """Options of `runtime: teal`."""

    shelf: ClassVar[Shelf] = Shelf(
        "at run time",
        "inputs of linears that are small, and the columns that they meet",
        "bytes read for each token, with llmcompress.load",
        "achieved sparsity is near what was asked; the sparse product is the masked one; first tokens are dense",
    )

    sparsity: float = Field(0.4, ge=0, le=0.9, description="share of a block's weights that a token does not read")
    allocation: Literal["greedy", "uniform"] = Field("greedy", description="how it is spread over a block's linears")
    step: float = Field(0.02, gt=0, le=0.2, description="greedy: share of the block's weights that a raise leaves out")
    search_samples: int = Field(2, ge=1, description="greedy: calibration windows that outputs are compared on")
    dense_tokens: int = Field(16, ge=0, description="tokens at the start of every text that use all weights")
