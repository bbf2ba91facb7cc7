"""What a decoder block is made of: its linears, which of them share an input, and the links between modules.

A *link* joins a producer (a norm, or rows of a linear) to the consumers of its output: dividing the producer's row i
by s_i and multiplying the consumers' columns that come from it by s_i leaves the model as it is. Methods that move
scale between modules (AWQ) and methods that remove channels need these.

Nothing here is a table of architectures. A tiny model of the same class and configuration is built with random
weights in float64, run, and observed: which linears were called with the same tensor, which of those tensors a norm
returned. Candidate links are then *tested*: the tiny block is rescaled, and the link is accepted if its output stays
the same to 1e-5. Candidates differ only in which rows of the producer make which columns of the consumer; that map is
a function of the head layout, so what is found on the tiny model holds for the full one.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import FormatError, PlanError

TOLERANCE = 1e-5  # relative to the block's output: norms round to float32 inside (1e-7); a wrong link changes over 1e-3


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
class Linear:
    """A matrix multiplication of a block."""

    out_features: int
    in_features: int
    transposed: bool  # the module keeps [in, out] (transformers' Conv1D)


Module = Any  # an nn.Module; what attributes a model has, no type checker can know
RowMap = Callable[[int, int, Heads], Tensor | None]


@dataclass(frozen=True, slots=True)
class Link:
    """producer -> consumers, by module names below the block."""

    producer: str
    consumers: tuple[str, ...]
    rows: Tensor  # [in] int64: the producer's row that makes each input column of the consumers
    offset: bool  # the producer is a norm that multiplies by 1 + weight


@dataclass(frozen=True, slots=True)
class Architecture:
    """One decoder block, and where the blocks are."""

    blocks: str  # path of the blocks' ModuleList
    count: int
    linears: dict[str, Linear]  # by module name below the block
    shared: tuple[tuple[str, ...], ...]  # linears that get the same input, each linear exactly once
    links: tuple[Link, ...]

    def block(self, index: int) -> str:
        """Module path of a block."""
        return f"{self.blocks}.{index}"


def skeleton(config: Any, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Module:
    """The model of `config` with its parameters on the meta device and its buffers real; costs no weight memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # moving parameters to the meta device one by one has untied them
    return model.eval()


def find_blocks(model: Module) -> tuple[str, Module]:
    """The ModuleList of decoder blocks and its path: the one whose length is num_hidden_layers."""
    count = model.config.num_hidden_layers
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise PlanError(
            f"{type(model).__name__}: no list of {count} decoder blocks found (num_hidden_layers is {count}); "
            "encoder-decoder models and models with unlike stacks are not supported"
        )
    return min(found, key=lambda item: item[0].count("."))  # the outermost: experts may be as many as layers


def block_linears(block: Module) -> dict[str, Linear]:
    """Every linear of a block, by its name below it."""
    from transformers.pytorch_utils import Conv1D

    linears = {}
    for name, module in block.named_modules():
        if isinstance(module, Conv1D):
            linears[name] = Linear(module.weight.shape[1], module.weight.shape[0], transposed=True)
        elif isinstance(module, nn.Linear):
            linears[name] = Linear(module.out_features, module.in_features, transposed=False)
    return linears


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


def discover(model: Module) -> Architecture:
    """The architecture of `model` (a skeleton will do). Raises PlanError where blocks are unlike."""
    path, blocks = find_blocks(model)
    linears = block_linears(blocks[0])
    for index, block in enumerate(blocks):
        if block_linears(block) != linears:
            raise PlanError(
                f"{path}.{index} has other linears than {path}.0; models with unlike blocks are not supported"
            )
    probe = Probe.of(model.config)
    if set(probe.linears) != set(linears):
        raise PlanError(f"{type(model).__name__}: a small copy of the model has other linears than the model itself")
    links = [link for found in probe.links() if (link := lift(found, blocks[0], linears, Heads.of(model.config)))]
    return Architecture(path, len(blocks), linears, probe.shared(), tuple(links))


def lift(found: "FoundLink", block: Module, linears: dict[str, Linear], heads: Heads) -> Link:
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


# --- observing a tiny model -----------------------------------------------------------------------------------------


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
    def of(cls, config: Any) -> "Probe":
        """Build the tiny model; weights are random and large enough for every nonlinearity to show."""
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)
            tiny = tiny_config(config)
            tiny._experts_implementation = "eager"  # grouped kernels take no float64
            model = AutoModelForCausalLM.from_config(tiny, attn_implementation="eager").double().eval()
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
    tiny, heads = copy.deepcopy(config), Heads.of(config)
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


def rows_of(module: Module) -> int:
    """Output features of a norm or linear."""
    return int(module.weight.shape[1] if is_transposed(module) else module.weight.shape[0])


def is_transposed(module: Module) -> bool:
    """Whether the module keeps its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def first(output: Any) -> Tensor:
    """The hidden states of what a block returned: a tensor, or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


def address(tensor: Tensor) -> int:
    """Where the data are; equal for views of one tensor that is still alive."""
    return tensor.untyped_storage().data_ptr()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence advice that is about training or generation and not about what happens here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
