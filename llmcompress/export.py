"""Export: a finished folder in another storage format that holds the same values.

    pack-quantized  <->  sparse24-int4        2:4 weights on a symmetric 4-bit grid
    dense           <->  sparse24, bitmask    pruned weights
    any              ->  dense

Shard by shard; every weight is read back from the new file and compared bit for bit before the folder gets its name.
Scores and errors of the run stand, as the values are the same; size, format and engines are those of the new folder.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.adapter import FOLDER, adapter_of, weight_bytes
from llmcompress.arch import ignored_linears, match_names, quiet_transformers, skeleton
from llmcompress.checkpoint import Checkpoint, read_tensors
from llmcompress.engines import verdicts
from llmcompress.errors import FormatError, PlanError
from llmcompress.files import MANIFEST, read_json, write_json
from llmcompress.formats import FORMATS, OWN, Format
from llmcompress.inspection import read_object, weight_files
from llmcompress.layout import CONV1D_MODELS
from llmcompress.mask import Pattern
from llmcompress.report import write_report
from llmcompress.safetensors_file import read_headers
from llmcompress.thresholds import thresholds_of
from llmcompress.weight import CompressedWeight, Kind

MADE_ANEW = {"config.json", MANIFEST, "results.json", "README.md", "report.html", "model.safetensors.index.json"}


def export(folder: Path, format_name: str, output: Path) -> dict[str, Any]:
    """Write `folder` to `output` in another format; returns name, format and bytes before and after.

    Raises PlanError if `output` exists or a weight has no such form, FormatError if the folder is damaged.
    """
    results = opened(folder, output)
    if adapter_of(folder) and format_name in OWN:
        raise PlanError(f"{folder}: has LoRA weights, which peft cannot add to linears of {format_name!r}; try dense")
    try:
        rows = {row["name"]: row for row in results["layers"]}
        kinds = {name: kind_of_row(row) for name, row in rows.items()}
        shown = f"export {format_name} of {results['name']} {results['created']}"
        old = FORMATS[results["format"]].name
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise FormatError(f"{folder}/results.json: is damaged ({exc!r}); run the recipe again") from None
    files = weight_files(folder)
    read_headers(files)
    transposed = read_object(folder / "config.json").get("model_type") in CONV1D_MODELS
    with new_folder(output, len(files), shown) as checkpoint:
        names: set[str] = set()
        for number, path in enumerate(files):
            names |= export_shard(checkpoint, number, path, old, format_name, kinds, rows, transposed)
        if missing := sorted(set(rows) - names):
            raise FormatError(f"{folder}: the weight of {missing[0]} is missing")
        write_json(checkpoint.partial / "config.json", config_of(folder, format_name, kinds, names))
        finish(folder, checkpoint, results | {"format": format_name, "layers": list(rows.values())})
    return {"folder": str(output), "format": format_name, "bytes": read_json(output / "results.json")["size"]}


@contextmanager
def new_folder(output: Path, shards: int, shown: str) -> Iterator[Checkpoint]:
    """A folder that gets its name when this is left, and of which nothing stays if that is by an error.

    shown: what is being made, by which the folder is known meanwhile.
    """
    checkpoint = Checkpoint(output, shards, shown)
    checkpoint.open(overwrite=True)
    try:
        yield checkpoint
        checkpoint.complete(overwrite=False)
    except BaseException:
        shutil.rmtree(checkpoint.partial, ignore_errors=True)
        raise
    finally:
        checkpoint.close()


def opened(folder: Path, output: Path) -> dict[str, Any]:
    """results.json of a folder that a run has made. Raises PlanError if it is none, or if `output` exists."""
    results = read_json(folder / "results.json")
    if not (folder / MANIFEST).is_file() or "layers" not in results:
        raise PlanError(f"{folder}: holds no {MANIFEST} and results.json; expected a folder that a run has made")
    if output.exists():
        raise PlanError(f"{output}: exists; give another --output")
    return results


def kind_of_row(row: dict[str, Any]) -> Kind:
    """What a linear's record says of its weight."""
    pattern = Pattern.parse(row["pattern"]) if row.get("pattern") else None
    sparsity = row.get("sparsity", 0.0)
    if row.get("bits") is None:
        return Kind(pattern=pattern, sparsity=sparsity)
    return Kind(row["bits"], row["group_size"], row["symmetric"], pattern, sparsity)


def export_shard(
    checkpoint: Checkpoint,
    number: int,
    path: Path,
    before: str,
    after: str,
    kinds: dict[str, Kind],
    rows: dict[str, dict[str, Any]],
    transposed: bool,
) -> set[str]:
    """Convert the linears of one file and copy its other tensors; the linears' names. `rows` get their new sizes."""
    old, new = FORMATS[before], FORMATS[after]
    tensors = read_tensors(path)
    mine = {name for name in kinds if f"{name}.{old.suffix}" in tensors}
    packed: dict[str, Tensor] = {}
    for name in sorted(mine):
        stored = {k.removeprefix(f"{name}."): tensors.pop(k) for k in list(tensors) if k.startswith(f"{name}.weight")}
        weight = read_checked(name, old, stored, kinds[name], transposed)
        shape = (weight.values.shape[0], weight.values.shape[1])
        if reason := new.refuses(kinds[name], shape, transposed=transposed):
            raise PlanError(f"{name}: cannot be stored as {after!r}: {reason}")
        if new.suffix == "weight_packed" and weight.codes is None:
            raise PlanError(f"{name}: {before!r} does not hold the codes that {after!r} stores; run the recipe with it")
        row = rows[name]  # of a linear that a structure step has made smaller, it says the shape
        if list(row["shape"]) != list(shape) if "shape" in row else weight.values.nbytes != row["before_bytes"]:
            raise FormatError(f"{name}: {list(shape)} in the files, which is not the size that results.json says")
        try:
            parts = new.pack(weight, transposed=transposed)
        except FormatError as exc:
            raise FormatError(f"{name}: {exc}") from None
        if not torch.equal(new.read(parts, kinds[name], transposed=transposed).values, weight.values):
            raise FormatError(f"{name}: {after!r} gave back other values; this is an error in the format")
        rows[name]["after_bytes"] = sum(part.nbytes for part in parts.values())
        packed |= {f"{name}.{leaf}": part for leaf, part in parts.items()}
    checkpoint.write_shard(number, packed | tensors)
    return mine


def read_checked(name: str, form: Format, stored: dict[str, Tensor], kind: Kind, transposed: bool) -> CompressedWeight:
    """A linear out of files that somebody else may have changed. Raises FormatError."""
    try:
        return form.read(stored, kind, transposed=transposed)
    except FormatError as exc:
        raise FormatError(f"{name}: {exc}") from None
    except (KeyError, RuntimeError, ValueError, IndexError, AttributeError, AssertionError) as exc:
        raise FormatError(f"{name}: its tensors do not fit what results.json says of it: {exc}") from None


def config_of(folder: Path, format_name: str, kinds: dict[str, Kind], names: set[str]) -> dict[str, Any]:
    """config.json for the new format."""
    from transformers import AutoConfig

    config = read_object(folder / "config.json")
    config.pop("quantization_config", None)
    with quiet_transformers():
        model = skeleton(AutoConfig.for_model(**config))
    stored = match_names(model, [f"{name}.weight" for name in names] + other_parameters(model, names))
    module = {found[0].removesuffix(".weight"): name.removesuffix(".weight") for name, found in stored.items()}
    both = {alias: kinds[name] for name in names for alias in {name, module.get(name, name)}}
    quantization = FORMATS[format_name].config(both, ignored_linears(model, stored, names))
    return config | ({"quantization_config": quantization} if quantization else {})


def other_parameters(model: Any, names: set[str]) -> list[str]:
    """Parameters of the model that are none of the weights of `names`, by the model's own names."""
    prefix = f"{model.base_model_prefix}."
    taken = {f"{name}.weight" for name in names} | {f"{prefix}{name}.weight" for name in names}
    return [name for name, _ in model.named_parameters() if name not in taken]


def finish(folder: Path, checkpoint: Checkpoint, results: dict[str, Any], without: Collection[str] = ()) -> None:
    """Everything but weights and config.json: copied (`without` these), or made anew where it says what this is."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in {*MADE_ANEW, *without} and path.suffix != ".safetensors":
            shutil.copyfile(path, checkpoint.partial / path.name)
    adapter = adapter_of(folder)  # what is computed is the same in every format, so it fits this one too
    if adapter:
        shutil.copytree(adapter, checkpoint.partial / adapter.name)
    checkpoint.write_index()
    size = weight_bytes(checkpoint.partial)
    thresholds = thresholds_of(folder) is not None  # copied above, and of the same inputs
    config = read_json(checkpoint.partial / "config.json")
    engines = verdicts(config, adapter=adapter is not None, thresholds=thresholds)
    before = results["size"]["before_bytes"]
    saved = {"after_bytes": size, "ratio": size / before, "parts": new_parts(results)}
    old = read_json(folder / "results.json")
    source = old.get("exported_from") or {"name": old["name"], "format": old["format"]}
    results = results | {"name": checkpoint.folder.name, "engines": engines, "size": results["size"] | saved}
    results["exported_from"] = source
    write_json(checkpoint.partial / "results.json", results)
    manifest = read_json(folder / MANIFEST)
    kept = {key: results[key] for key in (*manifest, "exported_from") if key in results}
    write_json(checkpoint.partial / MANIFEST, manifest | kept | {"fingerprint": checkpoint.fingerprint})
    write_report(checkpoint.partial)


def new_parts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Sizes by part of the model, from the linears' new sizes; an adapter's is the same in every format."""
    from llmcompress.results import part_of

    change: dict[str, int] = {}
    for row in results["layers"]:
        part = part_of(row["name"])
        change[part] = change.get(part, 0) + row["after_bytes"] - row["before_bytes"]
    return [
        part if part["part"] == FOLDER else part | {"after_bytes": part["before_bytes"] + change.get(part["part"], 0)}
        for part in results["size"]["parts"]
    ]
