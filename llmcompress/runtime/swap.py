"""`accelerate`: packed linears in place of those that would be unpacked, one after the other.

Stock transformers loads a `pack-quantized` folder as it is stored and unpacks all of it at the first forward pass, and
so does no better than the dense model. Here each such linear becomes a `PackedLinear`: its weight is repacked, its
stored tensors are dropped, and only then comes the next one. Of a file that is mapped, they stay in memory until all of
the model is packed, as pages that the system may take back at any time.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llmcompress.errors import FormatError
from llmcompress.heap import return_heap
from llmcompress.runtime.linears import PackedLinear, StoredLinear, compressed_linears
from llmcompress.runtime.mlp import fuse_gated
from llmcompress.runtime.native import NativeLinear
from llmcompress.runtime.operators import Shape, dtype_name
from llmcompress.runtime.table import OPERATORS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accelerated:
    """What `accelerate` did, by module names."""

    packed: dict[str, str] = field(default_factory=dict)  # the operator that multiplies
    kept: dict[str, str] = field(default_factory=dict)  # why the linear is unpacked as before
    fused: list[str] = field(default_factory=list)  # gated MLPs whose first two linears are one call
    apart: dict[str, str] = field(default_factory=dict)  # why those of a gated MLP are two calls

    def __bool__(self) -> bool:
        """Whether there was anything to do."""
        return bool(self.packed or self.kept)

    def in_words(self) -> str:
        """One line: how many linears are packed, how many are not, and why."""
        operators = sorted(set(self.packed.values()))
        words = [f"{len(self.packed)} linears packed" + (f" ({', '.join(operators)})" if operators else "")]
        if self.fused:
            words.append(f"{len(self.fused)} gated MLPs fused")
        words += [f"gated but not fused: {reason}" for reason in by_reason(self.apart)]
        words += [f"unpacked: {reason}" for reason in by_reason(self.kept)]
        return "; ".join(words)


def by_reason(found: Mapping[str, str]) -> list[str]:
    """Names and why, for each reason its first name alone."""
    lines = []
    for why in dict.fromkeys(found.values()):
        names = [name for name, reason in found.items() if reason == why]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more} ({why})")
    return lines


@dataclass(frozen=True, slots=True)
class Stored:
    """A linear as its file has it."""

    form: str  # a key of OPERATORS, if its operator is there
    tensors: Mapping[str, Tensor]
    shape: Shape
    bias: nn.Parameter | None
    refusal: str | None = None  # why no operator can take it, whatever its tensors are


def accelerate(model: nn.Module) -> Accelerated:
    """Let a loaded model compute with its packed weights, in place.

    Takes linears that compressed-tensors has not unpacked yet, those of our own formats, and those of native GPTQ and
    AWQ folders. What no operator takes stays as it is, and is named in the result and in one line of the log.
    Raises FormatError if the tensors of a linear contradict each other.
    """
    done = Accelerated()
    for name in [name for name, module in model.named_modules() if may_be_packed(module)]:
        module = model.get_submodule(name)
        try:
            packed = packed_or_why_not(module)
        except (ValueError, KeyError) as exc:
            raise FormatError(f"{name}: its packed tensors contradict each other: {exc}; download it again") from None
        if isinstance(packed, PackedLinear):
            done.packed[name] = packed.operator.name
            model.set_submodule(name, packed)
            continue
        done.kept[name] = packed
        if isinstance(module, NativeLinear):  # nobody else could compute with it
            model.set_submodule(name, module.unpacked())
    for name, why in fuse_gated(model).items():
        if why is None:
            done.fused.append(name)
        else:
            done.apart[name] = why
    drop_hook(model)
    if done.packed:
        let_files_go(model)
    if done:
        logger.log(logging.WARNING if done.kept else logging.INFO, "%s", done.in_words())
    return done


def let_files_go(model: nn.Module) -> None:
    """Copy what else was loaded, so that no tensor is left in the memory that the files are mapped to.

    A file is mapped as a whole: the pages of its stored weights stay in memory for as long as one norm lies there.
    """
    packed = {id(tensor) for _, linear in compressed_linears(model) for tensor in linear.buffers(recurse=False)}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and id(tensor) not in packed:
            tensor.data = tensor.data.clone()
    return_heap()


def packed_or_why_not(module: nn.Module) -> PackedLinear | str:
    """The packed form of a linear, or why no operator takes it. Raises ValueError if its tensors do not fit."""
    if is_foreign(module):
        return "another library's kernel has it; load the folder with llmcompress.load"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which would be lost; set them after packing"
    stored = stored_of(module)
    if stored.refusal is not None:
        return stored.refusal
    operator = OPERATORS.get(stored.form)
    if operator is None:
        return f"no operator takes {stored.form}"
    why = operator.refuses(stored.tensors, stored.shape)
    if why is not None:
        return why
    check_shape(stored)
    return PackedLinear(operator, operator.pack(stored.tensors, stored.shape), stored.shape, stored.bias)


def may_be_packed(module: nn.Module) -> bool:
    """Whether a module has a packed weight that it would unpack."""
    scheme = getattr(module, "quantization_scheme", None)
    ours = isinstance(module, StoredLinear | NativeLinear) or getattr(scheme, "weights", None) is not None
    return ours or is_foreign(module)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is a linear of a GPTQ or AWQ library."""
    return not isinstance(module, NativeLinear) and all(hasattr(module, name) for name in ("qweight", "scales"))


def stored_of(module: nn.Module) -> Stored:
    """What a module that `may_be_packed` has."""
    if isinstance(module, NativeLinear):
        return Stored("pack-quantized", module.tensors(), module.shape, module.bias, module.refusal)
    if isinstance(module, StoredLinear):
        return Stored(module.format_name, module.stored(), module.shape, module.bias, other_dtype(module))
    why = refusal_of(module)
    tensors = {name: tensor.data for name, tensor in module.named_parameters() if name.startswith("weight_")}
    shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (0, 0)
    return Stored("pack-quantized", tensors, shape, getattr(module, "bias", None), why)


def other_dtype(linear: StoredLinear) -> str | None:
    """Why an operator is of no use to a linear whose inputs are of another dtype than its file; None if they are not.

    Its tensors keep the dtype of the file, since their values are defined by it, and operators take only one.
    """
    if linear.stored_in == linear.computes_in:
        return None
    return f"the model computes in {dtype_name(linear.computes_in)}, it is stored in {dtype_name(linear.stored_in)}"


def refusal_of(module: Any) -> str | None:
    """Why a linear of compressed-tensors is none of ours by its scheme, None if it may be."""
    scheme = module.quantization_scheme
    weights = scheme.weights
    found = str(getattr(scheme.format, "value", scheme.format))
    if found != "pack-quantized":
        return f"its format is {found}"
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}"
    if not hasattr(module, "weight_packed"):
        return "a forward pass has unpacked it; load the folder again"
    if weights.num_bits != 4:
        return f"{weights.num_bits} bits"
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "its activations are quantized too"
    if str(getattr(weights.actorder, "value", weights.actorder)) == "group":
        return "its columns are in an order of their own (actorder)"
    return "a hook of accelerate moves its weight" if hasattr(module, "_hf_hook") else None


def check_shape(stored: Stored) -> None:
    """Raises ValueError if the shape that a file states is not the model's."""
    stated = stored.tensors.get("weight_shape")
    if stated is not None and tuple(stated.tolist()) != stored.shape:
        raise ValueError(f"weight_shape says {stated.tolist()}, the model expects {list(stored.shape)}")


def drop_hook(model: nn.Module) -> None:
    """Take away the hook with which compressed-tensors unpacks at the first forward pass, if there is nothing left."""
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None and not any(hasattr(module, "quantization_scheme") for module in model.modules()):
        hook.remove()
        del model.ct_decompress_hook
