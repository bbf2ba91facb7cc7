"""Coupled groups: what must be removed together so that a smaller model computes what the masked one does.

A group is a list of slices of parameters. Unit u of a group is, for every member, the indices `index[u]` along one
dimension of one parameter: an MLP channel is a row of gate, a row of up and a column of down; a KV group is its key and
value rows, the rows of its query heads, their biases, and the columns of the output projection.

    masked    the slices of removed units are zero
    removed   the slices are cut out, and config.json says so

Both compute the same, because what the removed units feed, nothing else feeds: tests compare them for every kind and
architecture. All tables are explicit index tensors; nothing is inferred from a ratio of shapes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from llmcompress.arch import (
    Architecture,
    Channels,
    HeadRows,
    Heads,
    Module,
    couplings_of,
    find_couplings,
    is_transposed,
    layer_config,
    rows_of,
)

MLP, KV, QUERY = "mlp_channel", "kv_group", "query_head"
ATTENTION_LAYER, MLP_LAYER = "attention", "mlp"  # whole sub-layers: groups of one unit


@dataclass(frozen=True, slots=True)
class Member:
    """A share of one parameter in every unit of a group."""

    parameter: str  # below the block
    dim: int
    index: Tensor  # [units, n] int64: positions along dim that belong to each unit


@dataclass(frozen=True, slots=True)
class Group:
    """Units of one kind in a decoder block, all alike."""

    kind: str
    rows: dict[str, Tensor]  # producer -> [units, n] int64: its rows, of its weight as [out, in]
    consumer: str
    columns: Tensor  # [units, n] int64: its columns
    members: tuple[Member, ...]  # the same as slices of parameters, with biases

    @property
    def units(self) -> int:
        """How many there are in a block."""
        return len(self.columns)

    @property
    def linears(self) -> tuple[str, ...]:
        """Producers and consumer, each once."""
        return tuple(dict.fromkeys((*self.rows, self.consumer)))

    def parameters_per_unit(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Parameters that go with one unit; shapes: of the block's parameters."""
        slices = ((m.index.shape[1], shapes[m.parameter], m.dim) for m in self.members)
        return sum(count * prod(shape) // shape[dim] for count, shape, dim in slices)


def groups_of(model: Module, architecture: Architecture, kind: str) -> dict[int, Group]:
    """The group of a kind in every block that has it."""
    return all_groups(model, architecture).get(kind, {})


def all_groups(model: Module, architecture: Architecture) -> dict[str, dict[int, Group]]:
    """Every kind of group, in every block that has it; blocks that are alike share one."""
    coupled = find_couplings(model)
    known: dict[int, dict[str, Group]] = {}  # by identity of the layout
    found: dict[str, dict[int, Group]] = {}
    for index, layout in enumerate(architecture.layouts):
        if id(layout) not in known:
            heads = Heads.of(layer_config(model.config, index))
            block = model.get_submodule(architecture.block(index))
            known[id(layout)] = find_groups(block, couplings_of(coupled, layout.linears, heads))
        for kind, group in known[id(layout)].items():
            found.setdefault(kind, {})[index] = group
    return found


def find_groups(block: Module, couplings: Iterable[Channels | HeadRows]) -> dict[str, Group]:
    """Every kind of group that the linears of a block have; block: a decoder block, on the meta device or not."""
    found: dict[str, Group] = {}
    for coupling in couplings:
        if isinstance(coupling, Channels):
            columns = torch.arange(len(next(iter(coupling.rows.values()))))[:, None]
            found[MLP] = group_of(MLP, block, coupling.consumer, columns, coupling.rows)
            found[MLP_LAYER] = whole(MLP_LAYER, block, coupling.consumer, coupling.rows)
        else:
            found |= head_groups(block, coupling)
            found[ATTENTION_LAYER] = whole(
                ATTENTION_LAYER, block, coupling.consumer, {**coupling.query, **coupling.shared}
            )
    return found


def head_groups(block: Module, coupling: HeadRows) -> dict[str, Group]:
    """KV groups with their query heads; and query heads of the same place in every group, where groups have several."""
    heads = coupling.heads
    repeat = heads.query // heads.kv
    columns = torch.arange(heads.query * heads.size).reshape(heads.query, heads.size)

    def per_group(table: Tensor) -> Tensor:
        return table.reshape(heads.kv, -1)

    def per_place(table: Tensor) -> Tensor:
        return table.reshape(heads.kv, repeat, -1).transpose(0, 1).reshape(repeat, -1)

    whole = {name: per_group(table) for name, table in coupling.query.items()}
    for name, table in coupling.shared.items():
        whole[name] = torch.cat([whole[name], table], 1) if name in whole else table
    found = {KV: group_of(KV, block, coupling.consumer, per_group(columns), whole)}
    if repeat > 1:
        places = {name: per_place(table) for name, table in coupling.query.items()}
        found[QUERY] = group_of(QUERY, block, coupling.consumer, per_place(columns), places)
    return found


def group_of(kind: str, block: Module, consumer: str, columns: Tensor, rows: Mapping[str, Tensor]) -> Group:
    """A group from the rows of producers and the columns of their consumer; biases of the rows go with them."""
    members = []
    for name, table in rows.items():
        module = block.get_submodule(name)
        members.append(Member(f"{name}.weight", 1 if is_transposed(module) else 0, table))
        if getattr(module, "bias", None) is not None:
            members.append(Member(f"{name}.bias", 0, table))
    module = block.get_submodule(consumer)
    members.append(Member(f"{consumer}.weight", 0 if is_transposed(module) else 1, columns))
    return Group(kind, dict(rows), consumer, columns, tuple(members))


def whole(kind: str, block: Module, consumer: str, producers: Iterable[str]) -> Group:
    """A sub-layer as a group of one unit: all rows and columns of its linears, and all other parameters beside them."""

    def everything(size: int) -> Tensor:
        return torch.arange(size)[None]

    names = (*producers, consumer)
    rows = {name: everything(rows_of(block.get_submodule(name))) for name in names[:-1]}
    columns = everything(prod(block.get_submodule(consumer).weight.shape) // rows_of(block.get_submodule(consumer)))
    members = tuple(
        Member(name, 0, everything(len(parameter)))
        for name, parameter in block.named_parameters()
        if name.partition(".")[0] in modules_of(names)
    )
    return Group(kind, rows, consumer, columns, members)


def modules_of(linears: Iterable[str]) -> tuple[str, ...]:
    """The children of a block that these linears are in, or are."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in linears))


@torch.no_grad()
def mask_units(block: Module, group: Group, removed: Tensor) -> None:
    """Set everything of the removed units [n] int64 to zero, in place."""
    for member in group.members:
        parameter = block.get_parameter(member.parameter)
        index = member.index[removed].flatten().to(parameter.device)
        parameter.index_fill_(member.dim, index, 0)


@torch.no_grad()
def zero_units(block: Module, group: Group) -> Tensor:
    """Which units are as `mask_units` leaves them: everything of them is zero; [units] bool."""
    zero = torch.ones(group.units, dtype=torch.bool)
    for member in group.members:
        parameter = block.get_parameter(member.parameter)
        used = (parameter != 0).movedim(member.dim, 0).flatten(1).any(1) if parameter.ndim > 1 else parameter != 0
        zero &= ~used.cpu()[member.index].any(1)
    return zero


def kept_positions(
    group: Group, removed: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, int], Tensor]:
    """(parameter, dimension) -> positions [n] int64 that stay, in order, for every parameter that the group touches."""
    found = {}
    for member in group.members:
        stays = torch.ones(shapes[member.parameter][member.dim], dtype=torch.bool)
        stays[member.index[removed].flatten()] = False
        found[member.parameter, member.dim] = stays.nonzero().flatten()
    return found


def cut(name: str, tensor: Tensor, kept: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """What stays of the parameter `name`."""
    for (parameter, dim), positions in kept.items():
        if parameter == name:
            tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor
