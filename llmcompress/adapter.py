"""LoRA weights that stay beside a model: DIR/adapter, in the form that the peft library writes and reads.

    adapter/adapter_config.json            rank, scale, and which linears
    adapter/adapter_model.safetensors      for each linear [out, in]: lora_A [rank, in] and lora_B [out, rank]

A linear with an update computes W x + (alpha / rank) B A x (Hu et al. 2021, arXiv:2106.09685). W is never touched, so
packed weights stay as they are, byte for byte.
"""

from pathlib import Path
from typing import Any

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def adapter_of(folder: Path) -> Path | None:
    """The adapter of a model folder, if it has one."""
    found = folder / FOLDER
    return found if (found / CONFIG).is_file() and (found / WEIGHTS).is_file() else None


def weight_bytes(folder: Path) -> int:
    """Bytes of all safetensors files of a model folder, its adapter's included."""
    files = [*folder.glob("*.safetensors"), *folder.glob(f"{FOLDER}/*.safetensors")]
    return sum(path.stat().st_size for path in files)


def parameter_name(module: str, matrix: str) -> str:
    """Peft's name for `matrix` (lora_A, lora_B) of the linear at a module path."""
    return f"base_model.model.{module}.{matrix}.weight"


def unpack(model: Any) -> None:
    """Have packed weights unpacked, which compressed-tensors does at a model's first forward pass.

    Linears that compute with packed weights (`llmcompress.runtime`) become ordinary ones.
    """
    import torch

    if hasattr(getattr(model, "hf_quantizer", None), "accelerated"):
        model.dequantize()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)


def attach(model: Any, adapter: Path) -> Any:
    """The same transformers model, whose linears add the updates of an adapter; weights must be unpacked by now."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).get_base_model().eval()
