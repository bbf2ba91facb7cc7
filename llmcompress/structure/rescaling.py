"""What a model needs when its residual stream loses channels: norms divide by a mean over fewer of them.

With S the sum of squares of the channels that stay (the others are zero), D channels before and D' after,

    full model      y = g x / sqrt(S / D  + eps)
    smaller model   y = g' x / sqrt(S / D' + eps')        the same for   eps' = eps r²,  g' = g r,  r = sqrt(D / D')

Where another norm shares eps (over each head, say), eps stays and the stream is divided by r, so that S is smaller by
as much: everything that writes to the stream is divided by r, norms over it still have g' = g r. Some models multiply
their embedding by sqrt(D), which must be made up for in the embedding; where that is also the output head, the final
norm makes up for it in turn. So every parameter is multiplied by a power of r, and there are four ways to choose them.

Which way a model needs, and whether any does, is tried: on two small float64 models of the same class, one with zeros
in some channels and one without them, whose eps is large enough to show. LayerNorm fits none: it subtracts a mean
over all channels, and removed channels change that mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.arch import Module, find_blocks, is_transposed, quiet_transformers
from llmcompress.arch.modules import address
from llmcompress.arch.probe import TOLERANCE, Probe, tiny_config
from llmcompress.errors import LLMCompressError, PlanError

WAYS = ((0, 0), (0, 1), (-1, -1), (-1, 0))  # powers of r for what blocks write, and for the embedding
WIDE, NARROW, SIZE = 12, 8, 8  # hidden size per query head of the small models, and the size of a head
EPS = 0.1  # of the small models
OTHERS = "mlp_channel and block work"


@dataclass(frozen=True, slots=True)
class Rescaling:
    """Powers of r = sqrt(D / D') that parameters are multiplied with, by names as in the first block."""

    powers: Mapping[str, int]
    offset: frozenset[str]  # gains of norms that multiply by 1 + weight
    eps: str | None  # attribute of the config that is multiplied by r²; None where it stays

    def applied(self, name: str, tensor: Tensor, ratio: float) -> Tensor:
        """The parameter for the smaller model, in its dtype; ratio: D / D'."""
        power = self.powers.get(name, 0)
        if power == 0:
            return tensor
        factor, shift = ratio ** (power / 2), 1.0 if name in self.offset else 0.0
        wide = tensor.double() if tensor.dtype is torch.float64 else tensor.float()
        return ((wide + shift) * factor - shift).to(tensor.dtype)


def find_rescaling(original: Module) -> Rescaling:
    """How models of this class (a skeleton will do) are made up for lost channels, tried on small copies.

    Raises PlanError that says why none of the ways is exact.
    """
    try:
        return try_ways(original)
    except LLMCompressError:
        raise
    except Exception as exc:  # stock code of a width that nobody trained fails in many ways: the cause is shown
        raise PlanError(
            f"{type(original).__name__}: its stock code cannot have another hidden size with heads as they are "
            f"({' '.join(str(exc).split())[:200]}); {OTHERS}"
        ) from exc


def try_ways(original: Module) -> Rescaling:
    """The first of WAYS that makes a narrow small copy compute what a wide one with zeros does."""
    wide, narrow = small_copy(original, WIDE), small_copy(original, NARROW)
    dims = dimensions(wide, narrow)
    roles = Roles.of(wide, dims)
    gone = 1 + 2 * torch.arange(wide.config.hidden_size - narrow.config.hidden_size)
    for name, dim in dims.items():
        wide.get_parameter(name).index_fill_(dim, gone, 0)
    expected = logits(wide)
    for stream, embedding in WAYS:
        eps = eps_of(wide.config) if stream == 0 else None
        found = Rescaling({name: roles.power(name, stream, embedding) for name in dims}, roles.offset, eps)
        narrow = small_copy(original, NARROW, EPS * WIDE / NARROW if eps else EPS)
        fill(narrow, wide, dims, gone, found)
        if float((logits(narrow) - expected).norm() / expected.norm()) < TOLERANCE:
            return found
    why = "no way of rescaling norms, embedding and writers makes a narrower model compute what zeros do"
    if roles.centred:
        why = "its norms subtract a mean over all channels, which lost ones change"
    raise PlanError(f"{type(original).__name__}: its hidden size cannot be reduced exactly: {why}; {OTHERS}")


def dimensions(wide: Module, narrow: Module) -> dict[str, int]:
    """Parameter -> its dimension that is the residual stream's, from two models that differ in hidden size alone.

    Raises PlanError if anything else changes with the hidden size.
    """
    sizes = (wide.config.hidden_size, narrow.config.hidden_size)
    after = {name: value.shape for name, value in narrow.named_parameters(remove_duplicate=False)}
    found: dict[str, int] = {}
    for name, value in wide.named_parameters(remove_duplicate=False):
        shape = tuple(after.get(name, (0,) * value.ndim))
        changed = [dim for dim, size in enumerate(value.shape) if shape[dim] != size]
        if len(changed) > 1 or any((value.shape[dim], shape[dim]) != sizes for dim in changed):
            there = f"is {list(shape)}" if name in after else "is not there"
            raise PlanError(
                f"{type(wide).__name__}: {name} is {list(value.shape)} for a hidden size of {sizes[0]} and {there} for "
                f"{sizes[1]}; the size of its heads or of an inner layer follows from the hidden size, so that this "
                f"cannot be reduced alone; {OTHERS}"
            )
        if changed:
            found[name] = changed[0]
    return found


def plain_name(parameter: str, blocks: str) -> str:
    """The name that a parameter of any block has in the first one; blocks: their module path."""
    if not parameter.startswith(blocks + "."):
        return parameter
    return f"{blocks}.0.{parameter[len(blocks) + 1 :].partition('.')[2]}"


@dataclass(frozen=True, slots=True)
class Roles:
    """What the parameters of a model have to do with its residual stream."""

    blocks: str  # module path
    readers: frozenset[str]  # weights of linears in the block that have the stream as their input
    raw: frozenset[str]  # those of them that read it without a norm between
    norms: frozenset[str]  # gains of norms over the stream
    writing: frozenset[str]  # those of them that norm what a linear returned, before it is added to the stream
    offset: frozenset[str]  # those of them that multiply by 1 + weight
    head: frozenset[str]  # the output head, where it is not the embedding
    centred: bool  # norms subtract a mean

    @classmethod
    def of(cls, model: Module, dims: Mapping[str, int]) -> "Roles":
        """Observed on a small model with real weights; dims: see `dimensions`."""
        probe, (blocks, _) = Probe(model), find_blocks(model)
        modules = {f"{name}.weight": module for name, module in model.named_modules() if f"{name}.weight" in dims}
        norms = {name: module for name, module in modules.items() if module.weight.ndim == 1}
        prefix, returned = f"{blocks}.0.", {address(probe.outputs[name]) for name in probe.linears}
        after = {f"{prefix}{name}.weight" for name, x in probe.inputs.items() if address(x) in returned}
        normed = {address(x) for name, x in probe.outputs.items() if f"{prefix}{name}.weight" in norms}
        readers = {n for n, m in modules.items() if n.startswith(prefix) and reads(m, dims[n])}
        raw = {n for n in readers if address(probe.inputs[n[len(prefix) : -len(".weight")]]) not in normed}
        head = model.get_output_embeddings().weight
        own = () if head is model.get_input_embeddings().weight else (n for n, m in modules.items() if m.weight is head)
        return cls(
            blocks,
            frozenset(readers),
            frozenset(raw),
            frozenset(norms),
            frozenset(after & set(norms)),
            frozenset(name for name, module in norms.items() if bool(answer(module, 0.0, zero=True).any())),
            frozenset(own),
            any(float((answer(norm, 1.0) - answer(norm, 0.0)).norm()) < TOLERANCE for norm in norms.values()),
        )

    def power(self, name: str, stream: int, embedding: int) -> int:
        """Of r, for a parameter of the first block or outside; given those for what blocks write, and the embedding."""
        inside = name.startswith(self.blocks + ".")
        if name in self.norms:
            if inside:
                return 1 + stream if name in self.writing else 1
            return 1 if self.head else 1 - embedding
        if name in self.head or name in self.readers:
            return -stream if name in self.raw else 0
        return stream if inside else embedding


def reads(module: Module, dim: int) -> bool:
    """Whether a module is a linear, and `dim` of its weight its input."""
    if not isinstance(module, nn.Linear) and not is_transposed(module):
        return False
    return dim == (0 if is_transposed(module) else 1)


def answer(norm: Module, shift: float, *, zero: bool = False) -> Tensor:
    """What a norm makes of a random vector plus `shift`, [1, width] float64; with `zero`, by parameters of zero."""
    width = norm.weight.shape[0]
    x = torch.randn(1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift
    values = {name: torch.zeros_like(p) if zero else p for name, p in norm.named_parameters()}
    found: Tensor = torch.func.functional_call(norm, values, (x,))
    return found


# --- the small copies ------------------------------------------------------------------------------------------------


def small_copy(original: Module, per_head: int, eps: float = EPS) -> Module:
    """A random float64 model of the same class and one block, `per_head` channels wide for each of its query heads."""
    config = tiny_config(original.config)
    config.hidden_size, config.head_dim = per_head * config.num_attention_heads, SIZE
    if key := eps_of(config):
        setattr(config, key, eps)
    config._experts_implementation = "eager"  # grouped kernels take no float64
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model: Any = type(original)._from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False).normal_(1.0 if parameter.ndim == 1 else 0.0, 0.4)
    return model


def eps_of(config: Any) -> str | None:
    """The one setting of a config that is the eps of norms."""
    found = [key for key, value in config.to_dict().items() if "eps" in key and isinstance(value, float)]
    return found[0] if len(found) == 1 else None


def fill(narrow: Module, wide: Module, dims: Mapping[str, int], gone: Tensor, found: Rescaling) -> None:
    """Give the narrow model what is left of the wide one."""
    stays = torch.ones(wide.config.hidden_size, dtype=torch.bool).index_fill_(0, gone, False).nonzero().flatten()
    for name, parameter in narrow.named_parameters():
        left = wide.get_parameter(name)
        if name in dims:
            left = found.applied(name, left.index_select(dims[name], stays), WIDE / NARROW)
        parameter.copy_(left)


def logits(model: Module) -> Tensor:
    """Of a few tokens, [2, 6, vocabulary]."""
    with torch.no_grad():
        found: Tensor = model(torch.arange(12).reshape(2, 6), use_cache=False).logits
    return found
