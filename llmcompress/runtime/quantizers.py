"""What transformers asks while it loads a packed folder, by the `quant_method` of its config.json.

    llmcompress          our own formats
    compressed-tensors   stock loading, and `accelerate` after it in place of unpacking
    gptq, awq            native layouts, without optimum or gptqmodel; what is not read here stays with those

Each quantizer keeps in `accelerated` what has been packed and what has not.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_awq import AwqQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.errors import FormatError
from llmcompress.formats import METHOD, OWN, VERSION
from llmcompress.formats.pack_quantized import words
from llmcompress.runtime.checks import check_modules, check_sizes
from llmcompress.runtime.linears import StoredLinear, compressed_linears, unpack_linears
from llmcompress.runtime.native import layout_of, place_natives
from llmcompress.runtime.swap import Accelerated, accelerate
from llmcompress.safetensors_file import TensorInfo, read_headers

logger = logging.getLogger(__name__)

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class PackedQuantizer(HfQuantizer):
    """What all of ours share."""

    requires_calibration = True
    accelerated: Accelerated | None = None  # after loading
    has_updates = False  # of an adapter, beside packed weights

    @property
    def is_trainable(self) -> bool:
        """Packed weights stay as they are."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Operators are registered with torch."""
        return True

    def is_serializable(self) -> bool:
        """A state dict has the tensors of the file."""
        return may_be_saved(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Pack what was loaded."""
        self.accelerated = accelerate(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Ordinary linears with the same values."""
        unpack_linears(model, dtype)
        return model


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
class LLMCompressQuantizer(PackedQuantizer):
    """Our own formats."""

    quantization_config: LLMCompressConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Replace the linears that config.json names, whose tensors must all be in the files.

        Packed tensors keep the dtype of the file, whatever the model computes in: their values are defined by it.
        """
        config, stored = self.quantization_config, headers_of(kwargs)
        leaves = set(OWN[config.format].placeholders((8, 8), model.dtype))
        unsized = {f"{name}.{leaf}" for name in config.modules for leaf in leaves}
        dtypes = [FLOATS[info.dtype] for info in stored.values() if info.name in unsized and info.dtype in FLOATS]
        for name in config.modules:
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                continue  # a checkpoint's name for it, where that differs from the model's
            if not isinstance(linear, nn.Linear):
                raise FormatError(f"config.json: {name} is a {type(linear).__name__} in this model, expected a linear")
            dtype = dtypes[0] if dtypes else linear.weight.dtype
            model.set_submodule(name, StoredLinear(linear, config.format, dtype))
        if stored:
            check_modules(stored, config.modules, leaves)
            mine = {f"{name}.{leaf}" for name, linear in compressed_linears(model) for leaf in linear.stored()}
            check_sizes(model, stored, unsized=unsized | mine)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Look at what was loaded before it is packed: files are somebody else's until they are checked."""
        for name, linear in compressed_linears(model):
            assert isinstance(linear, StoredLinear)
            try:
                OWN[linear.format_name].check(linear.stored(), linear.shape)
            except FormatError as exc:
                raise FormatError(f"{name}: {exc}") from None
        return super()._process_model_after_weight_loading(model, **kwargs)


class CompressedTensorsQuantizer(CompressedTensorsHfQuantizer):
    """compressed-tensors folders: what no operator takes is unpacked at the first forward pass, as ever."""

    accelerated: Accelerated | None = None  # after loading
    has_updates = False  # of an adapter, beside packed weights

    def is_serializable(self) -> bool:
        """A state dict has the tensors of the file."""
        return may_be_saved(self)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Sizes by config.json must be those of the files."""
        super()._process_model_before_weight_loading(model, **kwargs)
        if self.quantization_config.is_quantization_compressed and (stored := headers_of(kwargs)):
            check_sizes(model, stored, sizes=zero_point_sizes(model))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Pack what was loaded, unless it has been unpacked as the caller asked."""
        super()._process_model_after_weight_loading(model, **kwargs)
        transforms = getattr(self.compressor, "transform_config", None)
        if not self.quantization_config.dequantize and not transforms:
            self.accelerated = accelerate(model)
        elif transforms:
            logger.warning("its weights have transforms, which no operator computes: all of them are unpacked")
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Ordinary linears with the same values; those that were never packed too."""
        unpack_linears(model, dtype)
        if hasattr(model, "ct_decompress_hook"):  # gone when a forward pass has unpacked the rest
            self.compressor.decompress_model(model=model)
        return model


class NativeQuantizer(PackedQuantizer):
    """GPTQ and AWQ folders in the layouts of native.py."""

    def is_serializable(self) -> bool:
        """The tensors in memory are no longer those of the file."""
        return False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Placeholders for what the files have."""
        config: Any = self.quantization_config
        stored, layout = headers_of(kwargs), layout_of(config)
        assert layout is not None
        if not stored:
            raise FormatError("a GPTQ or AWQ folder without safetensors files; convert its weights to safetensors")
        sizes = {name: info.shape for name, info in stored.items()}
        place_natives(model, sizes, layout, config.group_size)
        check_sizes(model, stored)
        return model


def may_be_saved(quantizer: Any) -> bool:
    """Whether the tensors of the file are all that the model computes with. If not, transformers points to the log."""
    if quantizer.has_updates:
        logger.warning(
            "saving this model would leave the updates of its adapter out; copy its folder, or let dequantize() add "
            "them to the weights first"
        )
    return not quantizer.has_updates


def native_quantizer(stock: type[HfQuantizer]) -> Any:
    """In place of a stock quantizer class: ours for what native.py reads, the stock one for the rest."""

    def make(config: QuantizationConfigMixin, **options: Any) -> HfQuantizer:
        if options.get("pre_quantized", True) and layout_of(config):
            return NativeQuantizer(config, **options)
        return stock(config, **options)

    return make


def zero_point_sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Sizes of packed zero points by name; before loading, compressed-tensors has them unpacked."""
    sizes: dict[str, tuple[int, ...]] = {}
    module: Any
    for name, module in model.named_modules():
        if all(hasattr(module, leaf) for leaf in ("out_features", "weight_packed", "weight_zero_point")):
            rows = words(module.out_features, module.quantization_scheme.weights.num_bits)
            sizes[f"{name}.weight_zero_point"] = (rows, module.weight_scale.shape[1])
    return sizes


def headers_of(options: dict[str, Any]) -> dict[str, TensorInfo]:
    """Headers of the files that are being loaded, where they are safetensors."""
    files: Iterable[str | Path] = options.get("checkpoint_files") or []
    return read_headers(files) if all(Path(file).suffix == ".safetensors" for file in files) else {}


QUANTIZERS: dict[str, Any] = {
    "compressed-tensors": CompressedTensorsQuantizer,
    "gptq": native_quantizer(GptqHfQuantizer),
    "awq": native_quantizer(AwqQuantizer),
}
AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)
