"""Packed models that compute without being unpacked; importing this package teaches transformers to load them.

    import llmcompress.runtime
    model = AutoModelForCausalLM.from_pretrained(folder)        # or: llmcompress.load(folder)

Linears of `pack-quantized` folders (compressed-tensors, whoever wrote them) and of native GPTQ and AWQ folders become
`PackedLinear`: 4-bit weights in groups of 32, 64 or 128, in the layout of the operators of llmcompress_kernels. They
get from file to layout without ever being dense. Whatever no operator takes is unpacked as stock transformers does it,
and is named in one line of the log; `accelerated(model)` says it again.

A folder written by `llmcompress` in one of its own formats says in config.json

    "quantization_config": {"quant_method": "llmcompress", "version": 1, "format": "sparse24", "modules": [names]}

and every linear in `modules` becomes a `StoredLinear`, or a `PackedLinear` where its format has an operator.

`save_pretrained` writes the tensors of the file back, and `model.dequantize()` gives ordinary linears with the same
values. A model that stock transformers has loaded is packed by `accelerate(model)`. A LoRA adapter in `adapter/` is
added by the packed linears themselves (`LoraLinear`), if `load` is what loads the folder.
"""

from pathlib import Path
from typing import Any

from torch import nn

from llmcompress.adapter import adapter_of, attach, unpack
from llmcompress.runtime.linears import CompressedLinear, PackedLinear, StoredLinear, compressed_linears
from llmcompress.runtime.lora import LoraLinear, with_adapter
from llmcompress.runtime.mlp import GatedMLP
from llmcompress.runtime.quantizers import LLMCompressConfig
from llmcompress.runtime.swap import Accelerated, accelerate
from llmcompress.teal import apply_thresholds
from llmcompress.thresholds import thresholds_of

__all__ = [
    "Accelerated",
    "CompressedLinear",
    "GatedMLP",
    "LLMCompressConfig",
    "LoraLinear",
    "PackedLinear",
    "StoredLinear",
    "accelerate",
    "accelerated",
    "compressed_linears",
    "load",
]


def load(folder: str | Path, *, packed: bool = True, **options: Any) -> Any:
    """The model of a folder, in eval mode. options: of transformers' `from_pretrained`.

    packed: linears that compute with their packed weights, where an operator takes them; False: ordinary linears with
    the same values. If the folder has an adapter, the model computes with it: beside packed weights where `lora.py`
    can, else beside unpacked ones, as peft needs them, which one line of the log then explains. If it has activation
    thresholds, the model leaves out what they say.
    Raises FormatError if a packed tensor or the adapter is damaged or of another size than config.json says, and what
    transformers raises for a folder that it cannot load.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options).eval()
    quantized, adapter = getattr(model, "hf_quantizer", None) is not None, adapter_of(Path(folder))
    if adapter and quantized:
        model = with_adapter(model, adapter, accelerated(model), packed=packed)
    elif adapter:
        model = attach(model, adapter)
    elif quantized and not packed:
        unpack(model)
    if thresholds := thresholds_of(Path(folder)):  # last: linears that take the place of others have no hooks
        apply_thresholds(model, thresholds)
    return model


def accelerated(model: nn.Module) -> Accelerated:
    """What was packed when a model was loaded, and what was not, and why; empty for a dense model."""
    found = getattr(getattr(model, "hf_quantizer", None), "accelerated", None)
    return found if isinstance(found, Accelerated) else Accelerated()
