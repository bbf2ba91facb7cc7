"""A tiny model of the same class, run and observed: what shares an input, and which candidate links hold."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.arch.links import ROW_MAPS, Heads, Link, RowMap, scale_consumers, scale_producer, whole
from llmcompress.arch.modules import Module, address, block_linears, find_blocks, first, quiet_transformers
from llmcompress.errors import PlanError

TOLERANCE = 1e-5  # relative to the block's output: norms round to float32 inside (1e-7); a wrong link changes over 1e-3


@dataclass(frozen=True, slots=True)
class FoundLink:
    """A link as found on the tiny model."""

    producer: str
    consumers: tuple[str, ...]
    row_map: RowMap
    offset: bool


class Probe:
    """A tiny float64 model of the same class, its first block, and what went in and out of every module."""

    def __init__(self, model: Module) -> None:
        self.model = model
        self.block = find_blocks(model)[1][0]
        self.heads = Heads.of(model.config)
        self.linears = block_linears(self.block)
        self.tokens = torch.arange(12).reshape(2, 6)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.reference = self._run(observe=True)

    @classmethod
    def of(cls, original: Module) -> "Probe":
        """Build a tiny model of the same class; weights are random and large enough for every nonlinearity to show."""
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)
            tiny = tiny_config(original.config)
            tiny._experts_implementation = "eager"  # grouped kernels take no float64
            model: Any = type(original)._from_config(tiny, attn_implementation="eager").double().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.4)
        return cls(model)

    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Linears grouped by the tensor they were called with."""
        groups: dict[int, list[str]] = {}
        for name in self.linears:
            if name not in self.inputs:
                raise PlanError(f"{type(self.block).__name__}.{name} was not called in a forward pass")
            groups.setdefault(address(self.inputs[name]), []).append(name)
        return tuple(tuple(names) for names in groups.values())

    def links(self) -> Iterator[FoundLink]:
        """Every link that holds, one at most for each group of linears that share an input."""
        makers = {address(out): name for name, out in self.outputs.items() if name not in self.linears}
        for consumers in self.shared():
            norm = makers.get(address(self.inputs[consumers[0]]))
            producers = [norm] if norm else [name for name in self.linears if name not in consumers]
            yield from self._first_that_holds(producers, consumers)

    def _first_that_holds(self, producers: list[str], consumers: tuple[str, ...]) -> Iterator[FoundLink]:
        columns = self.linears[consumers[0]].in_features
        for producer in producers:
            linear = self.linears.get(producer)
            rows = linear.out_features if linear else len(self.block.get_submodule(producer).weight)
            for row_map in ROW_MAPS if linear else (whole,):
                index = row_map(rows, columns, self.heads)
                for offset in (False,) if linear else (False, True):
                    if index is not None and self._holds(Link(producer, consumers, index, offset)):
                        yield FoundLink(producer, consumers, row_map, offset)
                        return

    def _holds(self, link: Link) -> bool:
        """Whether rescaling by random factors leaves the block's output as it was, and half of it does not."""
        saved = copy.deepcopy(self.block.state_dict())
        scale = 0.5 + torch.rand(
            int(link.rows.max()) + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        try:
            scale_consumers(self.block, link, scale)
            half = self._distance()
            scale_producer(self.block, link, scale)
            return self._distance() < TOLERANCE < half
        finally:
            self.block.load_state_dict(saved)

    def _distance(self) -> float:
        """How far the block's output is from the reference, relative to it."""
        return float((self._run() - self.reference).norm() / self.reference.norm())

    def _run(self, *, observe: bool = False) -> Tensor:
        """Output of the first block; with `observe`, also note what went in and out of its modules."""
        output: list[Tensor] = []
        hooks = [self.block.register_forward_hook(lambda m, a, o: output.append(first(o).detach()))]
        for name, module in self.block.named_modules() if observe else ():
            weight = getattr(module, "weight", None)
            if name in self.linears or (isinstance(weight, nn.Parameter) and weight.ndim == 1):  # linears and norms
                hooks.append(module.register_forward_hook(self._note(name)))
        try:
            with torch.no_grad():
                self.model(self.tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return output[0]

    def _note(self, name: str) -> Callable[[Module, tuple[Any, ...], Any], None]:
        """A hook that keeps the tensors of a module alive, so that their addresses stay distinct."""

        def hook(module: Module, args: tuple[Any, ...], output: Any) -> None:
            self.inputs[name], self.outputs[name] = args[0], output

        return hook


def tiny_config(config: Any) -> Any:
    """`config` with one block and small sizes, all different, and the same ratio of query to key-value heads."""
    tiny = copy.deepcopy(config)
    tiny.per_layer_config = None  # blocks may differ; what they are made of is the same
    heads = Heads.of(tiny)
    kv = min(heads.kv, 2)
    query = kv * (heads.query // heads.kv)
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        "head_dim": 8,
        "hidden_size": query * 8,
        "intermediate_size": query * 8 + 24,
        "ffn_dim": query * 8 + 24,
        "n_inner": None,
        "word_embed_proj_dim": query * 8,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "sliding_window": 32,
        "num_local_experts": 4,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
    }
    for key, value in sizes.items():
        if getattr(tiny, key, None) is not None:
            setattr(tiny, key, value)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(tiny, key, None)
    if getattr(tiny, "layer_types", None):
        tiny.layer_types = tiny.layer_types[:1]
    rope = getattr(tiny, "rope_parameters", None)
    if rope:
        tiny.rope_parameters = plain_rope(rope)
    return tiny


def plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters without long-context scaling, whose factors are as long as the full model's heads."""
    if any(isinstance(value, dict) for value in rope.values()):  # one set of parameters per kind of layer
        return {kind: plain_rope(value) for kind, value in rope.items()}
    kept: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return {"rope_type": "default", **kept}
