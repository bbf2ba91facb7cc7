"""A LoRA adapter beside packed weights: y = W x + scaling * B A x in one call, with W never unpacked.

    adapter/    what `train: recover` keeps beside a quantized model, and what peft writes (llmcompress/adapter.py)

Linears of the adapter become `LoraLinear`, computed by `int4_lora_linear`. That holds for plain LoRA on 4-bit linears.
Much else that peft knows (DoRA, updates of embeddings, ranks by pattern) changes what is computed; so any setting that
is not known to change nothing leaves the adapter to peft, for which weights are unpacked, and the reason is said. Peft
computes updates in float32, the operator in the dtype of the weights.
"""

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from llmcompress_kernels import int4_lora_linear
from llmcompress_kernels.int4_lora_linear import MAX_RANK
from torch import Tensor, nn

from llmcompress.adapter import CONFIG, WEIGHTS, attach, unpack
from llmcompress.errors import FormatError
from llmcompress.files import read_json
from llmcompress.runtime.linears import PackedLinear
from llmcompress.runtime.mlp import GatedMLP
from llmcompress.runtime.operators import INT4, Shape
from llmcompress.runtime.swap import Accelerated
from llmcompress.safetensors_file import read_headers

logger = logging.getLogger(__name__)

MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
HARMLESS = {  # settings of peft that change nothing in a plain adapter that has been trained
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
EXPECTED: dict[str, tuple[Any, ...]] = {  # and what some of them must then be
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian"),  # others change the weights of the model too
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
}


class LoraLinear(PackedLinear):
    """A packed linear with an update; its dense form has the update added to the weight, and rounded with it."""

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, linear: PackedLinear, a: Tensor, b: Tensor, scaling: float) -> None:
        """linear: of `int4_linear`, [out, in].  a: [rank, in].  b: [out, rank]."""
        super().__init__(linear.operator, linear.packed(), linear.shape, linear.bias)
        self.scaling = scaling
        for name, matrix in (("lora_a", a), ("lora_b", b)):
            place = linear.packed()[0].device
            self.register_buffer(name, matrix.to(place, self.floats).contiguous(), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return int4_lora_linear(x, self.packed(), self.lora_a, self.lora_b, self.scaling, self.bias)

    def dense(self) -> Tensor:
        """W + scaling * B A, rounded once."""
        weight = super().dense()
        update = self.scaling * (self.lora_b.float() @ self.lora_a.float())
        return (weight.float() + update).to(weight.dtype)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{super().extra_repr()}, rank={len(self.lora_a)}"


def with_adapter(model: Any, adapter: Path, done: Accelerated, *, packed: bool) -> Any:
    """The model of a packed folder with the updates of its adapter.

    packed: beside packed weights, if all linears of the adapter are; else, and where one is not, by peft beside
    unpacked ones. done: what `accelerate` has told of the model; changed for linears that get an update.
    Raises FormatError if the adapter's files are damaged or of another model.
    """
    if packed:
        why = add_updates(model, adapter, done)
        if why is None:
            return model
        logger.warning("%s is left to peft, for which all weights are unpacked: %s", adapter, why)
    unpack(model)
    return attach(model, adapter)


def add_updates(model: Any, adapter: Path, done: Accelerated) -> str | None:
    """Let packed linears add the updates of an adapter, all of them or none; why none, or None if it is done."""
    settings = settings_of(adapter)
    if isinstance(settings, str):
        return settings
    updates = updates_of(adapter)
    if isinstance(updates, str):
        return updates
    rank, scaling = settings
    for name, (a, b) in updates.items():
        linear = linear_of(model, name, adapter)
        why = refusal_of(linear, rank)
        if why is not None:
            return f"{name}: {done.kept.get(name, why)}"
        check_matrices(f"{adapter}: {name}", linear.shape, rank, a, b)
    for name, (a, b) in updates.items():
        model.set_submodule(name, LoraLinear(model.get_submodule(name), a, b, scaling))
        done.packed[name] = "int4_lora_linear"
    split(model, done)
    model.hf_quantizer.has_updates = True
    return None


def settings_of(adapter: Path) -> tuple[int, float] | str:
    """Rank and factor of all updates; or the setting that makes this more than plain LoRA. Raises FormatError."""
    config: dict[str, Any] = read_json(adapter / CONFIG)
    for key, found in config.items():
        if (key not in HARMLESS and found) or found not in EXPECTED.get(key, (found,)):
            return f"{CONFIG} says {key}: {found!r}"
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or not math.isfinite(alpha):
        raise FormatError(f"{adapter / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}, expected numbers; save it anew")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def updates_of(adapter: Path) -> dict[str, tuple[Tensor, Tensor]] | str:
    """A and B by the name of their linear; or what else is in the file. Raises FormatError if it is damaged."""
    from safetensors.torch import load_file

    file = adapter / WEIGHTS
    found: dict[str, dict[str, str]] = {}
    for name in read_headers([file]):
        matrix = MATRIX.fullmatch(name)
        if matrix is None:
            return f"{WEIGHTS} has {name}, which is no update of a linear"
        found.setdefault(matrix[1], {})[matrix[2]] = name
    for module, names in found.items():
        if len(names) != 2:
            raise FormatError(f"{file}: {module} has lora_{min(names)} alone, the file is damaged; save it anew")
    tensors = load_file(file)
    return {module: (tensors[names["A"]], tensors[names["B"]]) for module, names in found.items()}


def linear_of(model: nn.Module, name: str, adapter: Path) -> Any:
    """The module of a name. Raises FormatError if the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise FormatError(f"{adapter}: the model has no module {name!r}; the adapter is of another model") from None


def refusal_of(linear: nn.Module, rank: int) -> str | None:
    """Why `int4_lora_linear` cannot compute a linear with an update, None if it can."""
    if not isinstance(linear, PackedLinear):
        return f"its linear is a {type(linear).__name__}, whose weight is not packed"
    if linear.operator is not INT4:
        return f"{linear.operator.name} adds no updates"
    return f"its rank is {rank}, the operator takes up to {MAX_RANK}" if rank > MAX_RANK else None


def check_matrices(where: str, shape: Shape, rank: int, a: Tensor, b: Tensor) -> None:
    """Raises FormatError unless A [rank, in] and B [out, rank] are finite floats that fit a linear [out, in]."""
    out, columns = shape
    if tuple(a.shape) != (rank, columns) or tuple(b.shape) != (out, rank):
        raise FormatError(
            f"{where}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, expected {[rank, columns]} and "
            f"{[out, rank]}; the adapter is of another model"
        )
    if not (a.is_floating_point() and b.is_floating_point() and torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise FormatError(f"{where}: lora_A or lora_B holds other things than finite numbers; save the adapter again")


def split(model: nn.Module, done: Accelerated) -> None:
    """Note gated MLPs that are two calls now, since one of their linears has an update."""
    for name in list(done.fused):
        mlp = model.get_submodule(name)
        assert isinstance(mlp, GatedMLP)
        if isinstance(mlp.gate_proj, LoraLinear) or isinstance(mlp.up_proj, LoraLinear):
            done.fused.remove(name)
            done.apart[name] = "an adapter has updates for it"
