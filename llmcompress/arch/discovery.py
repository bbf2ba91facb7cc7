"""From a model to its `Architecture`: what was found on a tiny copy, with the row maps of the full sizes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompress.arch.links import Heads, Link
from llmcompress.arch.modules import Linear, Module, block_linears, find_blocks, quiet_transformers
from llmcompress.arch.probe import FoundLink, Probe
from llmcompress.errors import FormatError, PlanError
from llmcompress.source import is_own_code


@dataclass(frozen=True, slots=True)
class Layout:
    """What a decoder block is made of, by module names below it."""

    linears: dict[str, Linear]
    shared: tuple[tuple[str, ...], ...]  # linears that get the same input, each linear exactly once
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where the decoder blocks are, and what each is made of."""

    blocks: str  # path of the blocks' ModuleList
    layouts: tuple[Layout, ...]  # of every block; mostly one and the same

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.layouts)

    def at(self, index: int) -> Layout:
        """What a block is made of."""
        return self.layouts[index]

    def block(self, index: int) -> str:
        """Module path of a block."""
        return f"{self.blocks}.{index}"


def skeleton(config: Any, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Module:
    """The model of `config` with its parameters on the meta device and its buffers real; costs no weight memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = model_of(config, dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # moving parameters to the meta device one by one has untied them
    return model.eval()


def model_of(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model of `config` as its class makes it."""
    from transformers import AutoModelForCausalLM

    if per_layer := per_layer_class(config):
        return per_layer._from_config(config, dtype=dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def random_model(config: Any, seed: int) -> Module:
    """The model of `config` in float32 with the random weights that its class begins with; by `seed`, on the CPU."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model: Module = model_of(config, torch.float32)
    return model.eval()


def per_layer_class(config: Any) -> Any | None:
    """The class for models whose blocks differ, if this configuration is of one that was made here; else None."""
    from llmcompress import modeling_llmcompress

    asked: Any = getattr(config, "auto_map", None)
    if not is_own_code(asked):
        return None
    return getattr(modeling_llmcompress, asked["AutoModelForCausalLM"].partition(".")[2])


def layer_config(config: Any, index: int) -> Any:
    """The configuration of one block, which differs from the model's where `per_layer_config` says so."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def match_names(model: Module, stored: Iterable[str]) -> dict[str, list[str]]:
    """Where each parameter of the model is in a checkpoint: parameter name -> the tensors that make it.

    Nearly always one tensor of the same name. Older checkpoints leave out the prefix of the base model, and
    transformers fuses some parameters (experts) from several tensors, see `fused.py`. Raises FormatError if a
    parameter has no tensor.
    """
    from llmcompress.fused import fused_sources

    available, prefix = set(stored), f"{model.base_model_prefix}."
    names: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in available]
        names[name] = found[:1]
    if not all(names.values()):
        fused = fused_sources(model, available)
        names |= {name: fused.get(name, []) for name, found in names.items() if not found}
    missing = [name for name, found in names.items() if not found]
    if missing:
        raise FormatError(
            f"the checkpoint lacks {len(missing)} of the model's {len(names)} tensors, such as {missing[0]}; "
            "is it complete, and of the architecture that its config.json names?"
        )
    return names


def ignored_linears(model: Module, stored: Mapping[str, list[str]], compressed: set[str]) -> list[str]:
    """All linears that are not among the `compressed` (checkpoint names), the output head included.

    stored: see `match_names`. By the names that engines match them with: the module's (transformers), the
    checkpoint's (vLLM).
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found = stored.get(f"{name}.weight", [f"{name}.weight"])[0].removesuffix(".weight")
            names += [] if found in compressed else [found] if found == name else [name, found]
    return names


def discover(model: Module) -> Architecture:
    """The architecture of `model` (a skeleton will do). Raises PlanError where blocks are unlike without a reason."""
    path, blocks = find_blocks(model)
    probe = Probe.of(model)
    found = list(probe.links())
    known: dict[tuple[Any, ...], Layout] = {}
    layouts = []
    for index, block in enumerate(blocks):
        linears, config = block_linears(block), layer_config(model.config, index)
        key = (*linears.items(), config.num_attention_heads)
        if known and key not in known and config is model.config:
            raise PlanError(
                f"{path}.{index} has other linears than {path}.0; models with unlike blocks are not supported"
            )
        if key not in known:
            known[key] = layout_of(block, linears, config, probe, found)
        layouts.append(known[key])
    return Architecture(path, tuple(layouts))


def layout_of(
    block: Module, linears: dict[str, Linear], config: Any, probe: Probe, found: Iterable[FoundLink]
) -> Layout:
    """What was found on the tiny model, with the sizes of one block; config: of that block."""
    gone = set(probe.linears) - set(linears)
    if set(linears) - set(probe.linears) or (gone and not getattr(config, "skip", None)):
        raise PlanError(f"{type(block).__name__}: in a small copy of the model it has other linears than in the model")
    here = [link for link in found if not gone & {link.producer, *link.consumers}]
    shared = (tuple(name for name in group if name not in gone) for group in probe.shared())
    links = tuple(lift(link, block, linears, Heads.of(config)) for link in here)
    return Layout(linears, tuple(group for group in shared if group), links)


def lift(found: FoundLink, block: Module, linears: dict[str, Linear], heads: Heads) -> Link:
    """A link that was found on the tiny model, with the row map of the full one."""
    columns = linears[found.consumers[0]].in_features
    producer = linears.get(found.producer)
    rows = producer.out_features if producer else len(block.get_submodule(found.producer).weight)
    index = found.row_map(rows, columns, heads)
    if index is None:
        raise PlanError(
            f"{found.producer} -> {', '.join(found.consumers)}: the link was found on a small copy of the model, but "
            f"{rows} rows do not match {columns} columns with {heads}"
        )
    return Link(found.producer, found.consumers, index, found.offset)
