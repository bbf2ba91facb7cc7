"""Linears that hold packed tensors and compute with them; importing this module teaches transformers our formats.

    import llmcompress.runtime
    model = AutoModelForCausalLM.from_pretrained(folder)        # or: llmcompress.load(folder)

A folder written by `llmcompress` in one of its own formats says in config.json

    "quantization_config": {"quant_method": "llmcompress", "version": 1, "format": "sparse24", "modules": [names]}

and every linear in `modules` becomes a `CompressedLinear`. Its tensors are checked after loading; `save_pretrained`
writes the same tensors back, and `model.dequantize()` gives ordinary linears with the same values.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.adapter import adapter_of, attach, unpack
from llmcompress.errors import FormatError, SourceError
from llmcompress.formats import METHOD, OWN, VERSION
from llmcompress.safetensors_file import TensorInfo, read_header
from llmcompress.teal import apply_thresholds
from llmcompress.thresholds import thresholds_of

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CompressedLinear(nn.Module):
    """A linear [out, in] whose weight is stored in one of our formats.

    The packed tensors are its parameters, by the names that the format gives them; none can be trained.
    """

    def __init__(self, linear: nn.Linear, format_name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format_name = linear.in_features, linear.out_features, format_name
        shape = (self.out_features, self.in_features)
        for name, tensor in OWN[format_name].placeholders(shape, dtype).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = linear.bias

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors."""
        return {name: parameter.data for name, parameter in self.named_parameters() if name != "bias"}

    def dense(self) -> Tensor:
        """The weight [out, in] in the dtype of the file. The tensors were checked when they were loaded."""
        return OWN[self.format_name].values(self.packed())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedLinear":
        """Packed tensors go where the model goes, but keep their dtype: rounded scales would be another weight."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if tensor is self.bias or result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format_name}"


@register_quantization_config(METHOD)
class LLMCompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a folder in one of our formats. Raises FormatError if it is not one that is known."""

    def __init__(self, format: str = "", version: int = 0, modules: list[str] | None = None, **unknown: Any) -> None:
        unknown.pop("quant_method", None)
        if format not in OWN or version != VERSION:
            raise FormatError(
                f"config.json: format {format!r} version {version!r} is not known; this llmcompress reads version "
                f"{VERSION} of {', '.join(OWN)}: get the version that wrote the folder"
            )
        if unknown or not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise FormatError(f"config.json: quantization_config holds {sorted(unknown)}, expected a list `modules`")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version, self.format, self.modules = version, format, modules


@register_quantizer(METHOD)
class LLMCompressQuantizer(HfQuantizer):
    """What transformers asks while it loads such a folder."""

    requires_calibration = True
    quantization_config: LLMCompressConfig

    @property
    def is_trainable(self) -> bool:
        """Packed weights stay as they are."""
        return False

    def is_serializable(self) -> bool:
        """The tensors in memory are those of the file."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Replace the linears that config.json names, whose tensors must all be in the files.

        Packed tensors keep the dtype of the file, whatever the model computes in: their values are defined by it.
        """
        stored = headers(kwargs.get("checkpoint_files") or [])
        leaves = set(OWN[self.quantization_config.format].placeholders((8, 8), model.dtype))
        packed = {f"{name}.{leaf}" for name in self.quantization_config.modules for leaf in leaves}
        dtypes = [FLOATS[info.dtype] for info in stored.values() if info.name in packed and info.dtype in FLOATS]
        for name in self.quantization_config.modules:
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                continue  # a checkpoint's name for it, where that differs from the model's
            if not isinstance(linear, nn.Linear):
                raise FormatError(f"config.json: {name} is a {type(linear).__name__} in this model, expected a linear")
            dtype = dtypes[0] if dtypes else linear.weight.dtype
            model.set_submodule(name, CompressedLinear(linear, self.quantization_config.format, dtype))
        if stored:
            check_stored(stored, self.quantization_config.modules, leaves)
            check_dense(model, stored, packed)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Look at what was loaded: files are somebody else's until they are checked."""
        for name, linear in compressed_linears(model):
            try:
                OWN[linear.format_name].check(linear.packed(), (linear.out_features, linear.in_features))
            except FormatError as exc:
                raise FormatError(f"{name}: {exc}") from None
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Ordinary linears with the same values."""
        for name, packed in list(compressed_linears(model)):
            weight = packed.dense()
            linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
            linear.bias = packed.bias
            model.set_submodule(name, linear)
        return model


def headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Tensors of safetensors files by name. Raises FormatError if one is truncated or contradicts itself."""
    stored: dict[str, TensorInfo] = {}
    for file in files:
        try:
            stored |= read_header(Path(file))
        except SourceError as exc:
            raise FormatError(str(exc)) from None
    return stored


def check_stored(stored: Collection[str], modules: list[str], leaves: set[str]) -> None:
    """Every module must have all tensors of its format; what is missing would be filled with anything.

    A module has two names where the checkpoint's differ from the model's; then one is the end of the other.
    """
    found = {name for name in modules if any(f"{name}.{leaf}" in stored for leaf in leaves)}
    for name in found:
        if missing := sorted(leaf for leaf in leaves if f"{name}.{leaf}" not in stored):
            raise FormatError(f"{name}: {missing[0]} is not in the files; they are damaged, or not of this config.json")
    for name in modules:
        if name not in found and not any(f".{a}".endswith(f".{b}") for f in found for a, b in ((f, name), (name, f))):
            raise FormatError(f"{name}: none of its tensors is in the files, though config.json lists it")


def check_dense(model: Any, stored: Mapping[str, TensorInfo], packed: Collection[str]) -> None:
    """Shape and presence of everything that is not packed; transformers looks at neither once a quantizer is there.

    A parameter that is missing is an error if all tensors of the files have found theirs; else the model may convert
    the others into it while loading, as it does with experts.
    """
    prefix = f"{model.base_model_prefix}."
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    mine = {f"{name}.{leaf}" for name, linear in compressed_linears(model) for leaf in linear.packed()}
    missing, left = [], set(stored) - set(packed)
    for name, parameter in model.named_parameters():
        if name in mine:
            continue
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in stored), None)
        if found is None:
            missing += [] if name in tied else [name]
        elif stored[found].shape != tuple(parameter.shape):
            raise FormatError(f"{found}: shape {list(stored[found].shape)}, the model expects {list(parameter.shape)}")
        left.discard(str(found))
    if missing and not left:
        raise FormatError(f"{missing[0]}: is not in the files; they are damaged, or not of this config.json")


def compressed_linears(model: nn.Module) -> Iterator[tuple[str, CompressedLinear]]:
    """Every linear of ours, by its name."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            yield name, module


def load(folder: str | Path, **options: Any) -> Any:
    """The model of a folder, packed weights as they are. options: of transformers' `from_pretrained`.

    If the folder has an adapter, the model computes with it, and its weights are unpacked, as peft needs them. If it
    has activation thresholds, the model leaves out what they say.
    Raises FormatError if a packed tensor is damaged, and what transformers raises for a folder that it cannot load.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options).eval()
    if thresholds := thresholds_of(Path(folder)):
        apply_thresholds(model, thresholds)
    adapter = adapter_of(Path(folder))
    if adapter is None:
        return model
    unpack(model)
    return attach(model, adapter)
