"""Tiles, splits and launches of `sparse24_linear` on a GPU. Imports triton through kernel.py, so it is imported late.

    tokens M     kernel             why
    1            sparse24_gemv      a tensor core would do nothing in 15 of its 16 columns
    2 .. 256     sparse24_gemm      the packed weight is expanded in registers, once per BM tokens
    above        sparse24_expand    the weight is expanded once, and the BLAS does the rest
    above 64     library.py         sparse tensor cores through torch, where a form for them was given

Tiles are chosen by what the compiler reports (kernels/resources/sparse24_linear.json): no spills, weight loads of 128
bits. The limits follow from the model of kernels/tools/roofline.py; nothing was measured.

- Programs of all tokens of the same rows run side by side, so the packed weight comes from memory once whatever M is.
  What grows with M is the instructions that expand it, 7 per weight and 32 tokens.
- Expanding in memory costs 25 bits per weight before the BLAS begins. On GPUs of compute capability 8 and 9, the
  packed form takes a quarter of that way's time at 64 tokens, half at 128 and about the same at 256. On capability 10,
  whose tensor cores and memory are twice as fast while its processors issue no more instructions, they meet at 96.
- The library multiplies at twice the dense peak. The model gives it the lead from 33 tokens on, on all but one GPU, but
  such products are short, and it knows nothing of what a library's tiles do with few tokens: so from 65 on.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..configuration import ARCHITECTURES, Configuration
from ..launching import Plan, Tiles, capability_of, configured, device_of, interpreted, planned, rows_of_tokens, summed
from .kernel import sparse24_expand, sparse24_gemm, sparse24_gemv
from .layout import TILE, Sparse24Weight
from .library import library_of, library_product

GEMV = Tiles(rows=64, tokens=1, warps=2, stages=3)
# Two warps: four would split the tokens and expand every weight twice, and on sm_100 Triton makes kernels of them that
# only trap. 64 tokens a program do not fit into registers.
GEMM = (  # by rising tokens; the last one serves all that is larger
    Tiles(rows=64, tokens=16, warps=2, stages=3),
    Tiles(rows=64, tokens=32, warps=2, stages=3, float16=ARCHITECTURES),
)
# The last of GEMM takes all registers there are, and spills where it stores float32 sums, on sm_90 and sm_100. With
# half of its rows and three stages, ptxas spills on sm_100 to have 128 registers and more programs on a processor.
SPLIT = (GEMM[0], Tiles(rows=32, tokens=32, warps=2, stages=2, float16=ARCHITECTURES))
EXPAND = Tiles(rows=64, tokens=0, warps=4, stages=1)
LIBRARY_TOKENS = 64  # above this M a form for torch's library is used, if there is one
BLAS_TOKENS = 256  # above this M the weight is expanded for the BLAS
BLAS_TOKENS_10 = 96  # the same from compute capability 10 on


def sparse24_linear_triton(
    x: Tensor, weight: Sparse24Weight, bias: Tensor | None, processors: int, form: Tensor | None = None
) -> Tensor:
    """x [..., in] with any strides -> [..., out].

    processors: streaming multiprocessors of the GPU; form: of the same weight, by `sparse24_form`.
    """
    rows = weight.values.shape[1]
    if x.numel() == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)  # a grid must not be empty
    tokens = aligned_rows(x)
    with device_of(x):
        name = None if form is None or tokens.shape[0] <= LIBRARY_TOKENS else library_of(x.device)
        if form is not None and name is not None:
            y = library_product(tokens, form, rows, bias, name)
        elif tokens.shape[0] <= blas_tokens(capability_of(x)):
            y = product(tokens, weight, bias, processors)
        else:
            y = torch.nn.functional.linear(tokens, expand(weight, tokens.shape[1]), bias)
    return y.view(*x.shape[:-1], rows)


def blas_tokens(capability: int) -> int:
    """The most tokens that the packed weight is multiplied with, by the first number of a compute capability."""
    return BLAS_TOKENS_10 if capability >= 10 else BLAS_TOKENS


def aligned_rows(x: Tensor) -> Tensor:
    """x [..., in] as [tokens, in] whose rows start at multiples of 8 bytes: kernels read four columns at once."""
    tokens = rows_of_tokens(x)
    aligned = tokens.data_ptr() % 8 == 0 and (tokens.stride(0) % 4 == 0 or tokens.shape[0] == 1)
    return tokens if aligned else tokens.clone(memory_format=torch.contiguous_format)


def product(x: Tensor, weight: Sparse24Weight, bias: Tensor | None, processors: int) -> Tensor:
    """x [M, in] -> [M, out]."""
    rows = weight.values.shape[1]
    plan = plan_of(x.shape[0], rows, weight.positions.shape[0], processors)
    return summed(plan, x, rows, bias, lambda bias, target: start(plan, x, weight, bias, target))


def plan_of(tokens: int, rows: int, inner: int, processors: int) -> Plan:
    """Of a product; inner: tiles of columns. Where those are split it is by other tiles."""
    plan = planned((GEMV, *GEMM), tokens, rows, inner, processors)
    return plan if plan.splits == 1 else planned((GEMV, *SPLIT), tokens, rows, inner, processors)


def start(plan: Plan, x: Tensor, weight: Sparse24Weight, bias: Tensor | None, target: Tensor) -> None:
    """Start the kernel that the plan names."""
    (tokens, columns), rows = x.shape, weight.values.shape[1]
    pointers = (x, weight.values, weight.positions, bias, target)
    if tokens == 1:
        sparse24_gemv[plan.grid](*pointers, rows, columns, plan.span, **plan.options)
    else:
        options = plan.options | {"BM": plan.tiles.tokens, "INTERPRETED": interpreted()}
        sparse24_gemm[plan.grid](*pointers, tokens, rows, columns, x.stride(0), plan.span, **options)


def expand(weight: Sparse24Weight, columns: int) -> Tensor:
    """The weight [out, in], zeros where nothing is stored."""
    tiles, rows, _ = weight.positions.shape
    values = torch.empty(rows, columns, dtype=weight.values.dtype, device=weight.values.device)
    sparse24_expand[(triton.cdiv(rows, EXPAND.rows), tiles)](
        *weight, values, rows, columns, BN=EXPAND.rows, num_warps=EXPAND.warps, num_stages=EXPAND.stages
    )
    return values


def configurations() -> Iterator[Configuration]:
    """With a bias, and parts of splits; the reduce of splits is that of `int4_linear`, and compiled there."""
    yield configured("sparse24_expand", EXPAND, TILE)
    yield configured("sparse24_gemm", GEMM[-1], TILE)
    for parts in (False, True):
        yield configured("sparse24_gemv", GEMV, TILE, parts)
        for tiles in SPLIT:
            yield configured("sparse24_gemm", tiles, TILE, parts)
