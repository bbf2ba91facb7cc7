"""Random 2:4 weights as checkpoints have them, and what they mean, without the package whose kernels are tested."""

import itertools

import torch
from torch import Tensor

PAIRS = torch.tensor(list(itertools.combinations(range(4), 2)), dtype=torch.uint8)  # the six pairs of rising positions


def stored_sparse24(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """weight, weight_index, and all values [rows, columns]. A quarter of what is stored is zero."""
    kept = torch.randn(rows, columns // 2, generator=generator) / (columns / 2) ** 0.5
    kept = (kept * (torch.rand(kept.shape, generator=generator) > 0.25)).to(dtype)
    index, position = random_positions(rows, columns, generator)
    return kept, index, spread(kept, position)


def stored_sparse24_int4(
    rows: int, columns: int, group: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, weight_index, weight_scale, and all values [rows, columns] in float64. Every code is used."""
    codes = torch.randint(0, 16, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scale = ((torch.rand(rows, columns // group, generator=generator) + 0.5) / (8 * columns**0.5)).to(dtype)
    index, position = random_positions(rows, columns, generator)
    values = spread(codes.double() - 8, position) * scale.double().repeat_interleave(group, 1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, index, scale, values


def random_positions(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """weight_index [rows, columns / 8], and the positions [rows, columns / 4, 2]."""
    position = PAIRS[torch.randint(0, len(PAIRS), (rows, columns // 4), generator=generator)]
    p = position.reshape(rows, columns // 8, 4)
    return p[..., 0] | p[..., 1] << 2 | p[..., 2] << 4 | p[..., 3] << 6, position.long()


def spread(kept: Tensor, position: Tensor) -> Tensor:
    """[rows, columns / 2] at their places in [rows, columns]."""
    whole = torch.zeros(*position.shape[:2], 4, dtype=kept.dtype)
    return whole.scatter(-1, position, kept.view(position.shape)).flatten(1)
