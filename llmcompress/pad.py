"""Pad to uniform: a model whose blocks differ, with zeros where the narrower ones lack something.

The result computes the same, is as large as if every block were as wide as the widest, and loads anywhere: nothing of
this project is needed, as config.json says one width for all blocks. It is for engines that know no other models.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.adapter import adapter_of
from llmcompress.arch import (
    Heads,
    Linear,
    block_linears,
    couplings_of,
    find_blocks,
    find_couplings,
    skeleton,
)
from llmcompress.checkpoint import read_tensors, safetensors_header
from llmcompress.errors import FormatError, PlanError
from llmcompress.export import finish, new_folder, opened
from llmcompress.files import read_json, write_json
from llmcompress.inspection import read_object, weight_files
from llmcompress.source import CODE, PREFIX
from llmcompress.structure.groups import KV, MLP, QUERY, find_groups, kept_positions
from llmcompress.structure.reshape import MLP_KEYS, PER_LAYER
from llmcompress.structure_budget import resized
from llmcompress.thresholds import FILE

Positions = dict[tuple[str, int], Tensor]  # (parameter below the block, dimension) -> where what is left belongs


def pad(folder: Path, output: Path) -> dict[str, Any]:
    """Write `folder`, whose blocks differ, to `output` with zeros in the gaps; returns name, format and bytes.

    Raises PlanError if its blocks do not differ, its weights are packed, or `output` exists.
    """
    results = opened(folder, output)
    config = read_object(folder / "config.json")
    if "per_layer_config" not in config:
        raise PlanError(f"{folder}: its blocks are all alike, so there is nothing to pad")
    if adapter_of(folder):
        raise PlanError(f"{folder}: has LoRA weights, which fit its narrow blocks; merge them before padding")
    if (folder / FILE).is_file():
        raise PlanError(f"{folder}: has activation thresholds, which fit its narrow blocks; move {FILE} away first")
    if results["format"] != "dense":
        raise PlanError(f"{folder}: its weights are stored as {results['format']}; only dense ones can be padded")
    uniform, files = uniform_config(config), weight_files(folder)
    stored = [name for path in files for name in safetensors_header(path)]
    wide = {as_stored(name, stored): where for name, where in padded_shapes(config, uniform)}
    lacking = {name for name in wide if name not in stored}
    if odd := [name for name in sorted(lacking) if wide[name][1]]:
        raise FormatError(f"{folder}: the tensor {odd[0]} is missing")
    with new_folder(output, len(files), f"pad {results['name']} {results['created']}") as checkpoint:
        for number, path in enumerate(files):
            tensors = {name: widened(name, value, wide) for name, value in read_tensors(path).items()}
            if number == len(files) - 1:  # what blocks lack as a whole
                dtype = next(iter(tensors.values())).dtype
                tensors |= {name: torch.zeros(wide[name][0], dtype=dtype) for name in sorted(lacking)}
            checkpoint.write_shard(number, tensors)
        write_json(checkpoint.partial / "config.json", uniform)
        rows = [row | padded_row(row, wide) for row in results["layers"]]
        finish(folder, checkpoint, results | {"layers": rows, "code": None}, without={CODE})
    return {"folder": str(output), "format": "dense", "bytes": read_json(output / "results.json")["size"]}


def as_stored(name: str, stored: Collection[str]) -> str:
    """The name in the checkpoint of a module's tensor in a block: old ones lack the prefix of the base model."""
    short = name.partition(".")[2]
    blocks = re.split(r"\.\d+\.", short)[0] + "."
    return short if any(other.startswith(blocks) for other in stored) else name


def uniform_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that gives every block the sizes at its top, which are the largest."""
    names = [name.removeprefix(PREFIX) for name in config.get("architectures", [])]
    return {key: value for key, value in config.items() if key not in PER_LAYER} | {"architectures": names}


def padded_shapes(
    config: Mapping[str, Any], uniform: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[tuple[int, ...], Positions]]]:
    """Name of every tensor in a block that becomes wider -> its new shape, and where what is left of it belongs."""
    from transformers import AutoConfig

    model = skeleton(AutoConfig.for_model(**uniform))
    path, blocks = find_blocks(model)
    found = find_couplings(model)
    heads, linears = Heads.of(model.config), block_linears(blocks[0])
    shapes = {name: tuple(value.shape) for name, value in blocks[0].named_parameters()}
    for index, own in config["per_layer_config"].items():
        positions = places(blocks[0], found, linears, heads, own)
        for name, shape in shapes.items():
            inside = {key: value for key, value in positions.items() if key[0] == name}
            if name.partition(".")[0] in own.get("skip", ()):
                yield f"{path}.{index}.{name}", (shape, {})
            elif inside:
                yield f"{path}.{index}.{name}", (shape, inside)


def places(block: Any, found: Any, linears: Mapping[str, Linear], heads: Heads, own: Mapping[str, Any]) -> Positions:
    """Where the slices that a narrower block still has belong in a block of full width; own: what its config says."""
    shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
    positions: Positions = {}
    kv = own.get("num_key_value_heads", heads.kv)
    width = next((own[key] for key in MLP_KEYS if key in own), None)
    query = own.get("num_attention_heads", kv * heads.query // heads.kv) // kv
    for kind, kept in ((KV, kv), (QUERY, query), (MLP, width)):
        group = find_groups(block, couplings_of(found, linears, heads)).get(kind)
        if group is None or kept is None or kept == group.units:
            continue
        for key, still in kept_positions(group, torch.arange(kept, group.units), shapes).items():
            positions[key] = positions[key][still] if key in positions else still
            shapes[key[0]] = resized(shapes[key[0]], key[1], len(still))
        linears = {name: narrowed(linear, f"{name}.weight", shapes) for name, linear in linears.items()}
        heads = Heads(kept * heads.query // heads.kv, kept, heads.size) if kind == KV else heads
        heads = Heads(kept * heads.kv, heads.kv, heads.size) if kind == QUERY else heads
    return positions


def narrowed(linear: Linear, weight: str, shapes: Mapping[str, tuple[int, ...]]) -> Linear:
    """The linear with the sizes that its weight has now."""
    rows, columns = shapes[weight][::-1] if linear.transposed else shapes[weight]
    return Linear(rows, columns, linear.transposed)


def widened(name: str, value: Tensor, wide: Mapping[str, tuple[tuple[int, ...], Positions]]) -> Tensor:
    """A tensor at its places in a larger one of zeros, if it has to become larger."""
    for (_, dim), positions in wide[name][1].items() if name in wide else ():
        larger = torch.zeros(resized(tuple(value.shape), dim, wide[name][0][dim]), dtype=value.dtype)
        value = larger.index_copy_(dim, positions, value)
    return value


def padded_row(row: Mapping[str, Any], wide: Mapping[str, tuple[tuple[int, ...], Positions]]) -> dict[str, Any]:
    """What changes in a linear's row of results.json."""
    shape = wide.get(f"{row['name']}.weight", (None, {}))[0]
    if shape is None:
        return {}
    return {"shape": list(shape), "after_bytes": row["after_bytes"] * prod(shape) // prod(row["shape"])}
