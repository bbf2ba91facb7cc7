"""`teal_linear` on CPU: the kept columns, added up as they lie in memory.

Picking the columns first (`columns[kept]`) would write and read again all that is to be left out. `embedding_bag`, made
for sums of rows of a table, adds scaled rows in one pass, in float32 inside, with vector code for all three dtypes. It
works through a bag in one thread, so the columns are dealt out into as many bags as there are threads.
"""

import torch
from torch import Tensor

from .reference import teal_linear_reference

SUM = 0  # torch's number for this mode of a bag


def teal_linear_cpu(x: Tensor, columns: Tensor, threshold: float, bias: Tensor | None) -> Tensor:
    """Shapes as in `teal_linear`; for one token, columns of small inputs are not touched."""
    if x.numel() != x.shape[-1]:
        return teal_linear_reference(x, columns, threshold, bias)
    values = x.reshape(-1)
    kept = (values.float().abs() <= threshold).logical_not_().nonzero().view(-1)
    bags = max(1, min(torch.get_num_threads(), len(kept)))
    starts = torch.arange(bags) * len(kept) // bags
    scales = values.index_select(0, kept)
    y = torch.embedding_bag(columns.detach(), kept, starts, False, SUM, False, scales)[0]
    y = y[0] if bags == 1 else y.float().sum(0)
    if bias is not None:
        y = y.float() + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], columns.shape[1])
