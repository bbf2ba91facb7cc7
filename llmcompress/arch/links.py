"""Links: which rows of a producer make which input columns of its consumers, and rescaling along them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.arch.modules import Module, is_transposed, rows_of


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention layout: `query` heads in all, `kv` key-value heads, `size` features per head."""

    query: int
    kv: int
    size: int

    @classmethod
    def of(cls, config: Any) -> "Heads":
        """Read from a transformers config."""
        query = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // query
        return cls(query, getattr(config, "num_key_value_heads", None) or query, size)


@dataclass(frozen=True, slots=True)
class Link:
    """producer -> consumers, by module names below the block."""

    producer: str
    consumers: tuple[str, ...]
    rows: Tensor  # [in] int64: the producer's row that makes each input column of the consumers
    offset: bool  # the producer is a norm that multiplies by 1 + weight


RowMap = Callable[[int, int, Heads], Tensor | None]


# --- which rows of a producer make which columns of a consumer -------------------------------------------------------


def whole(rows: int, columns: int, heads: Heads) -> Tensor | None:
    """Row i makes column i: norms, MLPs, attention without shared heads."""
    return torch.arange(columns) if rows == columns else None


def second_half(rows: int, columns: int, heads: Heads) -> Tensor | None:
    """Fused gate and up, the gate first (Phi-3): row columns + i makes column i."""
    return torch.arange(columns, rows) if rows == 2 * columns else None


def value_heads(rows: int, columns: int, heads: Heads) -> Tensor | None:
    """Grouped-query attention: value head h feeds the query heads h r .. h r + r - 1."""
    if rows != heads.kv * heads.size or columns != heads.query * heads.size:
        return None
    return repeat_heads(heads)


def fused_value_heads(rows: int, columns: int, heads: Heads) -> Tensor | None:
    """Fused query, key, value, in this order (Phi-3, GPT-2): the value rows come last."""
    if rows != (heads.query + 2 * heads.kv) * heads.size or columns != heads.query * heads.size:
        return None
    return (heads.query + heads.kv) * heads.size + repeat_heads(heads)


def interleaved_value_heads(rows: int, columns: int, heads: Heads) -> Tensor | None:
    """Fused query, key, value per head (GPT-NeoX): head h has rows 3 h size .., the value in the last third."""
    if rows != 3 * columns or columns != heads.query * heads.size:
        return None
    head, feature = torch.arange(heads.query)[:, None], torch.arange(heads.size)
    return ((3 * head + 2) * heads.size + feature).flatten()


def repeat_heads(heads: Heads) -> Tensor:
    """[query size] int64: the value row that each attention output feature comes from."""
    head, feature = torch.arange(heads.query)[:, None], torch.arange(heads.size)
    return (head // (heads.query // heads.kv) * heads.size + feature).flatten()


ROW_MAPS: tuple[RowMap, ...] = (whole, second_half, value_heads, fused_value_heads, interleaved_value_heads)


# --- rescaling along a link ------------------------------------------------------------------------------------------


@torch.no_grad()
def scale_producer(block: Module, link: Link, scale: Tensor) -> None:
    """Divide the producer's rows by scale [max(rows) + 1], bias included, in place, in the precision of `scale`."""
    module = block.get_submodule(link.producer)
    factor = row_factors(link, scale, rows_of(module))
    if isinstance(getattr(module, "bias", None), Tensor):
        module.bias.copy_(module.bias.to(scale.dtype) / factor)
    weight = module.weight.to(scale.dtype)
    if link.offset:
        weight = (1 + weight) / factor - 1
    elif weight.ndim == 1 or is_transposed(module):
        weight = weight / factor
    else:
        weight = weight / factor[:, None]
    module.weight.copy_(weight)


@torch.no_grad()
def scale_consumers(block: Module, link: Link, scale: Tensor) -> None:
    """Multiply the consumers' columns by the factor of the producer's row that makes them, in place."""
    factor = scale[link.rows.to(scale.device)]
    for name in link.consumers:
        module = block.get_submodule(name)
        module.weight.copy_(module.weight.to(scale.dtype) * (factor[:, None] if is_transposed(module) else factor))


def row_factors(link: Link, scale: Tensor, rows: int) -> Tensor:
    """scale for all `rows` of the producer, 1 where a row makes no column of the consumers."""
    used = link.rows.unique().to(scale.device)
    factor = torch.ones(rows, dtype=scale.dtype, device=scale.device)
    factor[used] = scale[used]
    return factor
