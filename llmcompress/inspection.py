"""What is in a checkpoint folder: per tensor its format, bits, density and bytes; and which engines load it.

Works on any safetensors checkpoint. Reads one tensor at a time; density is the share of weights that are not zero.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.adapter import WEIGHTS, adapter_of
from llmcompress.engines import verdicts
from llmcompress.errors import FormatError
from llmcompress.formats import FORMATS, OWN, Format
from llmcompress.thresholds import Thresholds, thresholds_of


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight or other tensor."""

    name: str
    format: str
    shape: list[int]
    bits: float  # stored bits per element, scales included
    density: float
    bytes: int


def inspect(folder: Path) -> dict[str, Any]:
    """Everything about a folder, as `--json` prints it. Raises FormatError if it is not a readable checkpoint."""
    config = read_object(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    if quantization and quantization.get("format") not in FORMATS:
        raise FormatError(
            f"{folder}: quantization_config says format {quantization.get('format')!r}, expected {', '.join(FORMATS)}"
        )
    adapter, thresholds = adapter_of(folder), thresholds_of(folder)
    files = weight_files(folder) + ([adapter / WEIGHTS] if adapter else [])
    entries = [entry for path in files for entry in entries_of(path, config)]
    total = sum(entry.bytes for entry in entries)
    return {
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "format": quantization.get("format", "dense"),
        "bytes": total,
        "tensors": [asdict(entry) for entry in entries],
        "thresholds": None if thresholds is None else summary(thresholds),
        "engines": verdicts(config, adapter=adapter is not None, thresholds=thresholds is not None),
    }


def summary(thresholds: Thresholds) -> dict[str, Any]:
    """What thresholds do, as a few numbers."""
    linears = len(thresholds.modules)
    return {"sparsity": thresholds.sparsity, "dense_tokens": thresholds.dense_tokens, "linears": linears}


def entries_of(path: Path, config: dict[str, Any]) -> Iterator[Entry]:
    """Entries of one file; the tensors of a packed linear are one entry."""
    from safetensors import SafetensorError, safe_open

    packed_as = FORMATS[(config.get("quantization_config") or {}).get("format", "pack-quantized")]
    try:
        with safe_open(path, "pt") as file:
            modules: dict[str, list[str]] = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                modules.setdefault(name.rpartition(".")[0], []).append(name)
            for module, names in modules.items():
                packed = packed_as.name != "dense" and f"{module}.{packed_as.suffix}" in names
                mine = [n for n in names if packed and n.startswith(f"{module}.weight")]
                if mine:
                    tensors = {n[len(module) + 1 :]: file.get_tensor(n) for n in mine}
                    yield packed_entry(module, tensors, packed_as, config)
                for name in names:
                    if name not in mine:
                        yield dense_entry(name, file.get_tensor(name))
    except SafetensorError as exc:
        raise FormatError(f"{path}: cannot be read as safetensors ({exc}); the file is damaged or incomplete") from None


def packed_entry(module: str, tensors: dict[str, Tensor], packed_as: Format, config: dict[str, Any]) -> Entry:
    """A packed linear, unpacked to count its zeros."""
    scheme = {} if packed_as.name in OWN else scheme_of(module, config)
    try:
        values = packed_as.unpack(tensors, scheme, transposed=False)
    except FormatError as exc:
        raise FormatError(f"{module}: {exc}") from None
    except (KeyError, RuntimeError, ValueError, IndexError, AttributeError, AssertionError) as exc:
        raise FormatError(
            f"{module}: its packed tensors do not fit its scheme {scheme.get('weights')}: {exc}"
        ) from None
    stored = sum(t.nbytes for t in tensors.values())
    return Entry(
        module,
        packed_as.name,
        list(values.shape),
        8 * stored / values.numel(),
        int(values.count_nonzero()) / values.numel(),
        stored,
    )


def dense_entry(name: str, tensor: Tensor) -> Entry:
    """A tensor stored as it is."""
    density = int(tensor.count_nonzero()) / max(1, tensor.numel())
    kind = str(tensor.dtype).removeprefix("torch.")
    return Entry(name, kind, list(tensor.shape), 8.0 * tensor.itemsize, density, tensor.nbytes)


def scheme_of(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config group of a packed linear."""
    groups = list((config.get("quantization_config") or {}).get("config_groups", {}).values())
    for group in groups:
        if module in group["targets"]:
            return dict(group)
    for group in groups:
        if "Linear" in group["targets"]:
            return dict(group)
    raise FormatError(f"{module}: is packed, but no group of config.json's quantization_config targets it")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names; those that an index names must be there."""
    index = folder / "model.safetensors.index.json"
    weight_map = read_object(index).get("weight_map") if index.exists() else {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{index}: its weight_map does not name files; the index is damaged")
    named = set(weight_map.values())
    files = sorted({path.name for path in folder.glob("*.safetensors")} | named)
    missing = [name for name in files if not (folder / name).exists()]
    if missing or not files:
        raise FormatError(f"{folder}: {f'{missing[0]} is missing' if missing else 'holds no safetensors file'}")
    return [folder / name for name in files]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file that somebody else may have written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise FormatError(f"{path}: cannot be read ({exc.strerror}); expected a checkpoint folder") from None
    except ValueError as exc:
        raise FormatError(f"{path}: not valid JSON ({exc})") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
