"""Proof of loading, run as a script in a clean process: `python -I reload.py FOLDER EXPECTED BLOCKS TOLERANCE [trust]`.

Imports transformers and compressed-tensors, and nothing of llmcompress unless the folder is in one of its own formats,
which `llmcompress.runtime` loads. Loads FOLDER with its first BLOCKS decoder blocks as any user would, FOLDER/adapter
through peft if there is one, and compares with what the run decided (EXPECTED, a safetensors file):

    tokens [n, length] int64, positions [m] int64, logits [n, m, vocabulary]
    metadata, in JSON: "blocks": module path of the blocks; "digests": module path -> sha256 of the weight's bytes;
    "adapter": peft's name of a LoRA matrix -> sha256 of its bytes

Weights of later blocks are unpacked one by one with the compressed-tensors library. If the logits differ by more than
TOLERANCE (relative RMS), it is measured how much rounding changes those of this very model: they are computed in
float32 too, which takes twice the memory. Prints one JSON object.
"""

import hashlib
import importlib
import json
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

ADAPTER = "adapter"  # folder of LoRA weights


def main(folder: str, expected: str, blocks: int, tolerance: float, trust: bool) -> dict[str, Any]:
    """Load, run, compare; `trust` lets the folder's own Python code run, as the recipe asked."""
    torch.set_grad_enabled(False)
    with safe_open(expected, "pt") as file:
        tokens, positions, wanted = (file.get_tensor(name) for name in ("tokens", "positions", "logits"))
        names = {key: json.loads(value) for key, value in file.metadata().items()}
    digests, path = names["digests"], names["blocks"] + "."
    model = load(folder, blocks, wanted.dtype, trust)
    found = logits(model, tokens, positions)
    different, rest = [], {}
    for name, digest in digests.items():
        if block_of(name, path) >= blocks:
            rest[name] = digest
        elif digest != sha256(weight_of(model.get_submodule(name))):
            different.append(name)
    different += stored_differently(Path(folder), rest)
    if names["adapter"]:
        different += adapted_differently(model, Path(folder) / ADAPTER, names["adapter"], path, blocks)
    difference = found.float() - wanted.float()
    rms = relative_rms(found, wanted)
    return {
        "engine": f"transformers {transformers.__version__}",
        "compressed_tensors": version("compressed_tensors"),
        "peft": version("peft"),
        "blocks": blocks,
        "tokens": found.shape[0] * found.shape[1],
        "max_abs_difference": float(difference.abs().max()),
        "relative_rms": rms,
        "rounding_rms": None if rms <= tolerance else relative_rms(found, logits(in_float32(model), tokens, positions)),
        "top1_agreement": float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "weights": len(digests),
        "adapter_matrices": len(names["adapter"]),
        "weights_different": different,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "imported_llmcompress": "llmcompress" in sys.modules,
    }


def logits(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of tokens [n, length] at some positions [m], [n, m, vocabulary]."""
    return torch.cat([model(row[None], use_cache=False).logits[:, positions] for row in tokens])


def in_float32(model: Any) -> Any:
    """The model with its unpacked weights in float32. The `float` of transformers refuses quantized models."""
    return torch.nn.Module.float(model)


def relative_rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def load(folder: str, blocks: int, dtype: torch.dtype, trust: bool) -> Any:
    """The model as stock transformers loads it, cut after `blocks` blocks."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust}
    if quantization(Path(folder)).get("quant_method") == "llmcompress":
        importlib.import_module("llmcompress.runtime")
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    if blocks < config.num_hidden_layers:
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
        config.num_hidden_layers = blocks
    if not (Path(folder) / ADAPTER).is_dir():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **options)
        return model.eval()
    if quantization(Path(folder)):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():  # that the folder has a quantization_config of its own, which is meant
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **options)
    peft = importlib.import_module("peft")
    return peft.PeftModel.from_pretrained(model, folder, subfolder=ADAPTER).eval().get_base_model()


def weight_of(linear: Any) -> torch.Tensor:
    """The weight [out, in] that a linear computes with; LoRA keeps it in its base layer."""
    linear = getattr(linear, "base_layer", linear)
    weight: torch.Tensor = linear.dense() if hasattr(linear, "dense") else linear.weight
    return weight


def adapted_differently(model: Any, adapter: Path, digests: dict[str, str], path: str, blocks: int) -> list[str]:
    """Those LoRA matrices that have another digest: in the model, or for blocks that it lacks in the file.

    Peft computes with them in float32, so they go back to the dtype of the file, which loses nothing.
    """
    different = []
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
        for name, digest in digests.items():
            if name not in stored:
                different.append(name)
                continue
            matrix = file.get_tensor(name)
            linear, kind, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            if block_of(linear, path) < blocks:
                loaded = getattr(model.get_submodule(linear), kind)["default"].weight
                matrix = loaded.to(matrix.dtype)
            if sha256(matrix) != digest:
                different.append(name)
    return different + sorted(stored - set(digests))


def block_of(module: str, path: str) -> int:
    """Number of the block that a module is in; path: of the blocks, with a dot at its end."""
    return int(module.removeprefix(path).split(".", 1)[0])


def quantization(folder: Path) -> dict[str, Any]:
    """`quantization_config` of a folder; empty if there is none."""
    return json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config") or {}


def stored_differently(folder: Path, digests: dict[str, str]) -> list[str]:
    """Those of `digests` whose stored weight, unpacked, has another digest."""
    if not digests:
        return []
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    config = quantization(folder)
    return [name for name, digest in digests.items() if sha256(unpacked(folder, name, weight_map, config)) != digest]


def unpacked(folder: Path, module: str, weight_map: dict[str, str], config: dict[str, Any]) -> torch.Tensor:
    """One weight, read from its file, where its name may lack the prefix of the base model."""
    if not any(name.startswith(f"{module}.") for name in weight_map):
        module = module.partition(".")[2]
    tensors = {}
    for name in (n for n in weight_map if n.startswith(f"{module}.weight")):
        with safe_open(folder / weight_map[name], "pt") as file:
            tensors[name.removeprefix(f"{module}.")] = file.get_tensor(name)
    if config.get("quant_method") == "llmcompress":
        own = importlib.import_module("llmcompress.formats").OWN[config["format"]]
        return own.unpack(tensors, None, transposed=False)
    if "weight" in tensors:
        return tensors["weight"]
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = next(g for g in config["config_groups"].values() if module in g["targets"] or "Linear" in g["targets"])
    return PackedQuantizationCompressor.decompress(tensors, QuantizationScheme.model_validate(group))["weight"]


def sha256(tensor: torch.Tensor) -> str:
    """Digest of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().data).hexdigest()


def version(module: str) -> str | None:
    """Version of a module that was imported on the way."""
    return getattr(sys.modules.get(module), "__version__", None)


if __name__ == "__main__":
    record = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), "trust" in sys.argv[5:])
    sys.stdout.write(json.dumps(record) + "\n")
