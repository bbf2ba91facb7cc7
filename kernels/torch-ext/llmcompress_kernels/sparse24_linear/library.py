"""2:4 products by torch's own kernel for sparse tensor cores (CUTLASS), for many tokens at once.

torch keeps it behind `torch.sparse.SparseSemiStructuredTensor`. It wants the kept weights as they are stored, and the
positions of 16 columns as an int16, in an order that its loads ask for. Both come from the tensors of this package by
one pass over a weight of half the size, so the dense weight is never made.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import Sparse24Weight, to_sparse24

OUT_MULTIPLE, IN_MULTIPLE, TOKENS_MULTIPLE = 32, 64, 8  # of the sizes that the kernel takes, in 16-bit dtypes
OPERATORS = ("_sparse_semi_structured_mm", "_sparse_semi_structured_addmm")


def takes(x: Tensor, out_features: int) -> bool:
    """Whether torch has the kernel for this GPU and these sizes. It is compiled for compute capability 8 alone."""
    fits = x.shape[-1] % IN_MULTIPLE == 0 and out_features % OUT_MULTIPLE == 0
    if not (x.is_cuda and torch.version.hip is None and fits):
        return False
    return torch.cuda.get_device_capability(x.device)[0] == 8 and all(hasattr(torch, name) for name in OPERATORS)


def sparse_product(x: Tensor, weight: Sparse24Weight, bias: Tensor | None) -> Tensor:
    """x [M, in] -> [M, out]; the kernel computes W xᵀ."""
    values, order = cutlass_form(weight, x.shape[1])
    columns = pad(x, (0, 0, 0, -x.shape[0] % TOKENS_MULTIPLE)).contiguous().T
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, order, columns)
    else:
        y = torch._sparse_semi_structured_addmm(bias, values, order, columns)
    return y[:, : x.shape[0]].T.contiguous()


def cutlass_form(weight: Sparse24Weight, in_features: int) -> tuple[Tensor, Tensor]:
    """Kept weights [out, in / 2] and reordered positions int16 [out, in / 16]; out a multiple of 32, in of 64."""
    values, index = to_sparse24(weight, in_features)
    positions = index.view(torch.int16)
    return values, torch.empty_like(positions).view(-1).scatter_(0, places(positions), positions.view(-1)).view_as(
        positions
    )


def places(positions: Tensor) -> Tensor:
    """Where the kernel wants each of the words [out, in / 16], as int64 [out * in / 16].

    Within 32 rows, row 8 a + b goes to row 4 b + a. Then every 2 x 2 block is transposed, and the result is stored with
    columns outermost, two neighbouring ones together.
    """
    out, words = positions.shape
    row = torch.arange(out, device=positions.device)[:, None]
    column = torch.arange(words, device=positions.device)[None, :]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    block_row, block_column = row // 2 * 2, column // 2 * 2
    row, column = block_row + column % 2, block_column + row % 2
    return (column // 2 * out * 2 + row * 2 + column % 2).reshape(-1)
