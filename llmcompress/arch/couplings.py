"""Couplings: which rows of which linears make which input columns of another linear, and nothing else.

An MLP channel is an input column of the down projection; it is made by one row of gate and one of up. An attention
head is a run of input columns of the output projection; it is made by its own query rows, and by key and value rows
that the heads of a group share. What is coupled like this can only be removed together.

As for links, no architecture is listed. Layouts (separate matrices, fused ones in order, interleaved ones) are index
tables; a table is accepted if it is seen to hold on a tiny model of the same class: noise on the rows of some units,
with the outputs of all other linears held as they were, changes the columns of exactly these units.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.arch.links import Heads
from llmcompress.arch.modules import Linear, Module, address
from llmcompress.arch.probe import Probe


@dataclass(frozen=True, slots=True)
class Channels:
    """Columns of a consumer that are independent of each other: the inner width of an MLP."""

    consumer: str
    rows: dict[str, Tensor]  # producer -> [columns, n] int64: its rows that make each column


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Columns of a consumer that come in heads: the output projection of attention."""

    consumer: str
    heads: Heads
    query: dict[str, Tensor]  # producer -> [query heads, n] int64: its rows that belong to each query head
    shared: dict[str, Tensor]  # producer -> [key-value heads, n] int64: its key and value rows


NOISE = 10.0  # standard deviation: large enough to reach the other side of a ReLU

ChannelRows = Callable[[int, int], Tensor | None]
HeadTables = tuple[Tensor | None, Tensor | None]  # of query heads, of key-value heads
HeadLayout = Callable[[int, Heads], HeadTables | None]


# --- layouts: which rows of a producer belong to which unit ----------------------------------------------------------


def one_each(rows: int, columns: int) -> Tensor | None:
    """Row i makes column i."""
    return torch.arange(columns)[:, None] if rows == columns else None


def two_halves(rows: int, columns: int) -> Tensor | None:
    """Fused gate and up (Phi-3): rows i and columns + i make column i."""
    return torch.arange(rows).reshape(2, columns).T if rows == 2 * columns else None


def query_only(rows: int, heads: Heads) -> HeadTables | None:
    """A query projection, or any of the three where no heads are shared."""
    return (by_head(0, heads.query, heads.size), None) if rows == heads.query * heads.size else None


def shared_only(rows: int, heads: Heads) -> HeadTables | None:
    """A key or a value projection."""
    return (None, by_head(0, heads.kv, heads.size)) if rows == heads.kv * heads.size else None


def fused_in_order(rows: int, heads: Heads) -> HeadTables | None:
    """Queries, then keys, then values (Phi-3, GPT-2)."""
    if rows != (heads.query + 2 * heads.kv) * heads.size:
        return None
    keys, values = ((heads.query + i * heads.kv) * heads.size for i in (0, 1))
    shared = [by_head(start, heads.kv, heads.size) for start in (keys, values)]
    return by_head(0, heads.query, heads.size), torch.cat(shared, 1)


def interleaved(rows: int, heads: Heads) -> HeadTables | None:
    """Query, key and value of a head, then of the next one (GPT-NeoX)."""
    if rows != 3 * heads.query * heads.size or heads.query != heads.kv:
        return None
    table = by_head(0, heads.query, 3 * heads.size)
    return table[:, : heads.size], table[:, heads.size :]


def by_head(start: int, heads: int, size: int) -> Tensor:
    """[heads, size] int64: rows of each head, one head after another from row `start` on."""
    return start + torch.arange(heads * size).reshape(heads, size)


CHANNEL_LAYOUTS: tuple[ChannelRows, ...] = (one_each, two_halves)
HEAD_LAYOUTS: tuple[HeadLayout, ...] = (query_only, shared_only, fused_in_order, interleaved)


# --- finding them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coupled:
    """A consumer whose columns are coupled, as seen on the tiny model: the layout of the rows of every producer."""

    consumer: str
    channels: dict[str, ChannelRows]  # by producer; empty for heads
    heads: dict[str, HeadLayout]  # by producer; empty for channels


def find_couplings(model: Module) -> tuple[Coupled, ...]:
    """The couplings of the decoder blocks of `model` (a skeleton will do), whatever their sizes are.

    A linear whose inputs are mixed in a way that no layout describes has no coupling.
    """
    probe = Watched(Probe.of(model))
    found = []
    for consumer in probe.probe.linears:
        producers = probe.producers(consumer)
        if not producers:
            continue
        if channels := probe.channel_layouts(consumer, producers):
            found.append(Coupled(consumer, channels, {}))
        elif heads := probe.head_layouts(consumer, producers):
            found.append(Coupled(consumer, {}, heads))
    return tuple(found)


def couplings_of(
    found: Iterable[Coupled], linears: Mapping[str, Linear], heads: Heads
) -> Iterator[Channels | HeadRows]:
    """The index tables for a block with these linears and heads; nothing for what it lacks."""
    for coupled in found:
        consumer = coupled.consumer
        if consumer not in linears:
            continue
        if coupled.channels:
            columns = linears[consumer].in_features
            rows = {name: layout(linears[name].out_features, columns) for name, layout in coupled.channels.items()}
            yield Channels(consumer, {name: table for name, table in rows.items() if table is not None})
        else:
            tables = {name: layout(linears[name].out_features, heads) for name, layout in coupled.heads.items()}
            query = {name: t[0] for name, t in tables.items() if t is not None and t[0] is not None}
            shared = {name: t[1] for name, t in tables.items() if t is not None and t[1] is not None}
            yield HeadRows(consumer, heads, query, shared)


class Watched:
    """A tiny model in which the outputs of linears can be disturbed one by one."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.outputs = {name: probe.outputs[name].clone() for name in probe.linears}
        self.inputs = {name: probe.inputs[name].clone() for name in probe.linears}
        made_by_norm = {address(out) for name, out in probe.outputs.items() if name not in probe.linears}
        self.normed = {name for name in probe.linears if address(probe.inputs[name]) in made_by_norm}

    def producers(self, consumer: str) -> list[str]:
        """Linears that reach the input of `consumer` through no other linear; none if it comes from a norm."""
        if consumer in self.normed:
            return []
        everything = {name: torch.arange(linear.out_features) for name, linear in self.probe.linears.items()}
        return [
            name
            for name in everything
            if name != consumer and bool(self.changed(consumer, name, everything[name]).any())
        ]

    def channel_layouts(self, consumer: str, producers: list[str]) -> dict[str, ChannelRows]:
        """The layout of every producer, if all have one with a unit per column."""
        columns = self.probe.linears[consumer].in_features
        units = torch.arange(columns)[:, None]
        found = {}
        for name in producers:
            for layout in CHANNEL_LAYOUTS:
                table = layout(self.probe.linears[name].out_features, columns)
                if table is not None and self.holds(consumer, name, table, units):
                    found[name] = layout
                    break
        return found if len(found) == len(producers) else {}

    def head_layouts(self, consumer: str, producers: list[str]) -> dict[str, HeadLayout]:
        """The layout of every producer, if all have one in heads."""
        heads = self.probe.heads
        if self.probe.linears[consumer].in_features != heads.query * heads.size:
            return {}
        own = by_head(0, heads.query, heads.size)
        groups = own.reshape(heads.kv, -1)
        found = {}
        for name in producers:
            for layout in HEAD_LAYOUTS:
                tables = layout(self.probe.linears[name].out_features, heads)
                if tables is None:
                    continue
                pairs = [
                    (table, units) for table, units in zip(tables, (own, groups), strict=True) if table is not None
                ]
                if all(self.holds(consumer, name, table, units) for table, units in pairs):
                    found[name] = layout
                    break
        return found if len(found) == len(producers) else {}

    def holds(self, consumer: str, producer: str, table: Tensor, units: Tensor) -> bool:
        """Whether rows table[u] of the producer change columns units[u] of the consumer's input, and no others.

        Every unit gets its own pattern of disturbed and undisturbed over the bits of its number, so that units which
        were mistaken for each other show. A column need not change every time: activations may be flat where it is.
        """
        ever = torch.zeros(self.probe.linears[consumer].in_features, dtype=torch.bool)
        for seed, chosen in enumerate(bit_patterns(len(table))):
            changed = self.changed(consumer, producer, table[chosen].flatten(), seed)
            allowed = torch.zeros_like(changed)
            allowed[units[chosen].flatten()] = True
            if bool((changed & ~allowed).any()):
                return False
            ever |= changed
        return bool(ever.all())

    def changed(self, consumer: str, producer: str, rows: Tensor, seed: int = 0) -> Tensor:
        """Which input columns of `consumer` change when noise is added to these rows of `producer`; [in] bool."""
        disturbed = self.outputs[producer].clone()
        noise = torch.randn(disturbed.shape, dtype=disturbed.dtype, generator=torch.Generator().manual_seed(seed))
        disturbed[..., rows] += NOISE * noise[..., rows]
        given = self.outputs | {producer: disturbed}
        seen: list[Tensor] = []
        hooks = [
            self.probe.block.get_submodule(name).register_forward_hook(lambda m, a, o, value=value: value)
            for name, value in given.items()
        ]
        watched = self.probe.block.get_submodule(consumer)
        hooks.append(watched.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())))
        try:
            with torch.no_grad():
                self.probe.model(self.probe.tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return (seen[0] != self.inputs[consumer]).flatten(0, -2).any(0)


def bit_patterns(count: int) -> Iterator[Tensor]:
    """Sets of units [n] int64, such that every unit is in another combination of them."""
    units = torch.arange(count)
    for bit in range(max(1, (count - 1).bit_length())):
        for side in (0, 1):
            chosen = units[(units >> bit) % 2 == side]
            if len(chosen):
                yield chosen
