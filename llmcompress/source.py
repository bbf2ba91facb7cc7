"""Where a model comes from: a listed name, a local folder, a GGUF file or the Hugging Face Hub.

`open_source` answers from headers alone: config, tensor names, shapes and sizes, a fingerprint. Nothing is downloaded
but small files and no weight is read, so a plan costs a fraction of a second. `ModelSource.fetch` then makes the
weights local, and `ModelSource.load` reads the few tensors that are asked for.

Every safetensors header is checked when the source is opened (offsets in bounds, without gaps, sizes that match the
shapes), so a truncated file is reported before a run starts rather than an hour into it.

The fingerprint names the weights. For the Hub it is the commit. For local files it is a sha256 over the config, every
header, every file size and a sample of the data: the first and last 64 KiB of each file and 4 KiB from the middle of
each tensor. Copying or touching files does not change it, and fine-tuning does; reading every byte of a large model
would take longer than the plan. It identifies, it does not protect: a forger could change bytes between the samples.
"""

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress import files
from llmcompress.adapter import adapter_of
from llmcompress.cached import cached_folder, made_once
from llmcompress.catalog import MODELS, NewModel, PackagedFile
from llmcompress.errors import SourceError
from llmcompress.files import MANIFEST
from llmcompress.safetensors_file import TensorInfo, hash_file, header_bytes, read_header, read_tensors
from llmcompress.thresholds import FILE as THRESHOLDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmcompress.gguf_source import GGUFFile

Progress = Callable[[int, int], None]  # bytes done, bytes in all

CODE = "modeling_llmcompress.py"  # goes with models whose blocks differ
PREFIX = "PerLayer"  # of the names of its classes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CAUSAL = ("ForCausalLM", "LMHeadModel")
CONVERT_PICKLE = (
    "pickle files can run code when they are read, so they are refused; in an environment you trust, load the model "
    "with transformers and save_pretrained it, or use the converter at https://huggingface.co/spaces/safetensors/convert"
)
GGUF_LAYOUT = b"1"  # raise when write_checkpoint changes what it writes


@dataclass(frozen=True)
class ModelSource:
    """A model, found but not read. `folder` is None until `fetch` has made the weights local."""

    name: str  # as given
    hub_id: str | None  # the model on the Hub that this is, or was made from
    revision: str | None  # commit on the Hub
    fingerprint: str  # names the weights, see the module's text
    config: dict[str, Any] = field(repr=False)
    license: str | None
    tensors: dict[str, TensorInfo] = field(repr=False)  # by checkpoint name; for GGUF, as `fetch` will write them
    local: bool  # nothing has to be downloaded
    folder: Path | None = None  # holds config, safetensors and tokenizer
    gguf: "GGUFFile | None" = field(default=None, repr=False)
    new: NewModel | None = field(default=None, repr=False)  # `fetch` makes it
    pruned: dict[str, tuple[str, float]] = field(default_factory=dict, repr=False)
    # linear -> pattern and share of zeros, if the manifest of an earlier run says so

    @property
    def needs_remote_code(self) -> bool:
        """Whether the config asks for Python code from the repository; the caller decides if that may run."""
        asked, folder = self.config.get("auto_map"), self.folder
        missing = folder is None or not (folder / CODE).is_file()  # as in the plan of a stage that is yet to write it
        return bool(asked) and not (is_own_code(asked) if missing else has_own_code(folder))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored in the checkpoint."""
        return sum(t.bytes for t in self.tensors.values())

    @property
    def fetch_bytes(self) -> int:
        """Bytes that `fetch` will write to disk, about."""
        return 0 if self.folder else self.weight_bytes

    def fetch(self, progress: Progress | None = None) -> "ModelSource":
        """The same source with its weights local, in `folder`.

        Hub: downloads safetensors, config and tokenizer files into the Hub's cache, continuing an earlier attempt.
        GGUF: converts to float32 safetensors once, into ${LLMCOMPRESS_CACHE:-~/.cache/llmcompress}/gguf/.
        New: makes it once, into .../new/.
        progress: called with (bytes done, bytes in all). Raises SourceError: no network, no access, no space.
        """
        if self.folder:
            return self
        if self.gguf:
            return replace(self, folder=_convert_gguf(self.gguf, self.fingerprint, self.weight_bytes, progress))
        if self.new:
            from llmcompress.new_model import write_new

            made = partial(write_new, self.new)
            return replace(self, folder=made_once(cached_folder("new", self.fingerprint), self.weight_bytes, made))
        from llmcompress.hub_source import download

        folder = download(self, progress)
        return replace(self, folder=folder, tensors=_read_index(folder), local=True)

    def load(self, names: Iterable[str], *, dtype: "torch.dtype", device: Any = "cpu") -> dict[str, "Tensor"]:
        """Read just these tensors, floats cast to `dtype`, on `device`; no file stays open or mapped afterwards.

        Values are as stored: NaN and infinity are for the caller to check. Raises SourceError naming the file.
        """
        if self.folder is None:
            raise SourceError(f"{self.name}: the weights are not local yet; fetch the source before loading tensors")
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise SourceError(f"{self.name}: there is no tensor {name!r}{_closest(name, self.tensors)}")
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, members in by_file.items():
            found |= read_tensors(self.folder / file, members, dtype, device)
        return found


def has_own_code(folder: Path | None) -> bool:
    """Whether a local folder's only code is the file that goes with models whose blocks differ, byte for byte."""
    if folder is None or not (folder / CODE).is_file():
        return False
    same = (folder / CODE).read_bytes() == Path(__file__).with_name(CODE).read_bytes()
    return same and is_own_code(files.read_json(folder / "config.json").get("auto_map"))


def is_own_code(auto_map: Any) -> bool:
    """Whether a config.json asks for one class of that file and no other code; this package runs its own copy then."""
    asked = auto_map if isinstance(auto_map, dict) else {}
    name = asked.get("AutoModelForCausalLM")
    own = rf"{CODE.removesuffix('.py')}\.{PREFIX}[A-Za-z0-9]+"
    return set(asked) == {"AutoModelForCausalLM"} and isinstance(name, str) and bool(re.fullmatch(own, name))


def open_source(model: str, *, revision: str | None = None) -> ModelSource:
    """Find a model by listed name, local folder, .gguf file or Hub id; reads headers only.

    revision: branch, tag or commit of a Hub model; resolved to a commit.
    Raises SourceError if it cannot be found or read, or is not an unquantized causal LM in safetensors or GGUF.
    """
    path = Path(model).expanduser()
    local = model in MODELS or path.exists() or _looks_like_path(model)
    if local and revision is not None:
        raise SourceError(f"{model}: only Hub models have revisions, and revision {revision!r} was given; remove it")
    if model in MODELS:
        listed = MODELS[model]
        if listed.new:
            from llmcompress.new_model import open_new

            return open_new(model, listed)
        source = _open_gguf(model, packaged_file(listed.file, SourceError))
        return replace(source, hub_id=listed.hub_id, license=listed.license)
    if path.is_dir():
        return open_folder(model, path)
    if path.is_file():
        return _open_file(model, path)
    if local:
        raise SourceError(f"{model}: no such file or folder (from {Path.cwd()})")
    if "/" not in model and (close := _closest(model, MODELS)):
        raise SourceError(f"{model}: neither a listed model nor a folder{close}; a Hub model is written owner/name")
    from llmcompress.hub_source import open_hub

    return open_hub(model, revision)


def packaged_file(file: PackagedFile, error: type[Exception]) -> Path:
    """The data file inside an installed package, found without importing it; raises `error` if it is not there."""
    spec = importlib.util.find_spec(file.package)
    if spec is None or not spec.origin:
        raise error(f"the package {file.package} is not installed; get it with: {file.command}")
    found = sorted(Path(spec.origin).parent.glob(file.path))
    if not found:
        raise error(f"{Path(spec.origin).parent}: no {file.path} in it; get the right version with: {file.command}")
    return found[0]


def check_config(config: Any, where: str, *, quantized: bool = False) -> dict[str, Any]:
    """The config, if it is that of a causal LM, unquantized unless it may be; else SourceError saying what it is."""
    if not isinstance(config, dict):
        raise SourceError(f"{where}: config.json holds {type(config).__name__}, expected a mapping")
    architectures = config.get("architectures") or []
    if not any(str(name).endswith(CAUSAL) for name in architectures) or config.get("is_encoder_decoder"):
        found = ", ".join(map(str, architectures)) or "no architecture"
        raise SourceError(
            f"{where}: config.json names {found} (model_type {config.get('model_type')!r}), which is not a causal LM; "
            'expected "architectures" with a name that ends in ForCausalLM or LMHeadModel'
        )
    if "quantization_config" in config and not quantized:
        method = (config["quantization_config"] or {}).get("quant_method", "an unnamed method")
        raise SourceError(f"{where}: this checkpoint is already quantized ({method}); start from the unquantized model")
    return config


def _open_file(name: str, path: Path) -> ModelSource:
    """A model given as a single file."""
    if path.suffix == ".gguf":
        return _open_gguf(name, path)
    if path.suffix in PICKLES:
        raise SourceError(f"{path}: {CONVERT_PICKLE}")
    raise SourceError(f"{path}: give the folder that holds config.json and the safetensors files, or a .gguf file")


def _open_gguf(name: str, path: Path) -> ModelSource:
    """A GGUF file; its tensors are listed as the float32 safetensors that `fetch` makes of them."""
    from llmcompress.gguf_source import read_gguf

    found = read_gguf(path.resolve())
    tensors = {
        name: TensorInfo(name, tensor.shape, "F32", "model.safetensors", 4 * prod(tensor.shape))
        for name, tensor in found.tensors.items()
    }
    digest = hashlib.sha256()
    hash_file(digest, found.path, found.data_start, [t.start + t.size // 2 for t in found.tensors.values()])
    fingerprint = digest.hexdigest()
    folder = _gguf_folder(fingerprint)
    return ModelSource(
        name=name, hub_id=None, revision=None, fingerprint=fingerprint, config=found.config, license=found.license,
        tensors=tensors, local=True, folder=folder if folder.is_dir() else None, gguf=found,
    )  # fmt: skip


def open_folder(
    name: str, path: Path, hub_id: str | None = None, revision: str | None = None, *, quantized: bool = False
) -> ModelSource:
    """A folder with config.json and safetensors; quantized: it may be, and the tensors are those of its files."""
    config = check_config(read_json(path / "config.json"), str(path), quantized=quantized)
    if adapter := adapter_of(path):
        raise SourceError(
            f"{path}: has LoRA weights in {adapter.name}/, which a run would leave out; merge them into a dense model "
            "(peft: `merge_and_unload`), or move that folder away"
        )
    if (path / THRESHOLDS).is_file():
        raise SourceError(
            f"{path}: has activation thresholds in {THRESHOLDS}, which are for this model alone and which a run would "
            "leave out; take the model that it was made from, or move that file away"
        )
    tensors = _read_index(path)
    return ModelSource(
        name=name, hub_id=hub_id, revision=revision, fingerprint=revision or _fingerprint(path, config, tensors),
        config=config, license=_license(path / "README.md"), tensors=tensors, local=True, folder=path.resolve(),
        pruned=patterns_in(read_json(path / MANIFEST)) if (path / MANIFEST).is_file() else {},
    )  # fmt: skip


def patterns_in(manifest: Any) -> dict[str, tuple[str, float]]:
    """Pattern and share of zeros of every linear that an earlier run has pruned; what makes no sense is left out."""
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    found = {}
    for row in layers if isinstance(layers, list) else ():
        name, pattern, share = (
            row.get(key) if isinstance(row, dict) else None for key in ("name", "pattern", "sparsity")
        )
        if isinstance(name, str) and isinstance(pattern, str) and isinstance(share, float) and 0 <= share < 1:
            found[name] = (pattern, share)
    return found


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path.parent}: no {path.name} in it; a Hugging Face model folder has one") from None
    except (OSError, ValueError, RecursionError) as exc:
        raise SourceError(f"{path}: cannot read this file as JSON: {exc}") from None


def _read_index(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder: one model.safetensors, or the shards that the index names."""
    if (folder / "model.safetensors").is_file():
        return read_header(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise SourceError(f"{folder}: {_what_instead(folder)}")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    plain = isinstance(weight_map, dict) and all(isinstance(f, str) and Path(f).name == f for f in weight_map.values())
    if not isinstance(weight_map, dict) or not weight_map or not plain:
        raise SourceError(f"{index}: expected a weight_map from tensor names to file names in the same folder")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise SourceError(f"{folder}: {file} is missing, though {index.name} names it; download the model again")
        tensors |= read_header(folder / file)
    wrong = sorted(n for n in weight_map.keys() | tensors if n not in tensors or tensors[n].file != weight_map.get(n))
    if wrong:
        raise SourceError(f"{index}: {len(wrong)} tensors are not where it says, first {wrong[0]!r}; save it again")
    return tensors


def _what_instead(folder: Path) -> str:
    """Why a folder has no weights to read."""
    names = [p.name for p in folder.iterdir()]
    if any(name.endswith(PICKLES) for name in names):
        return f"only pickle weights here ({next(n for n in sorted(names) if n.endswith(PICKLES))}); {CONVERT_PICKLE}"
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return f"no safetensors here; give the GGUF file itself: {folder / ggufs[0]}"
    return "no model.safetensors and no model.safetensors.index.json in this folder; expected one of them"


def _license(card: Path) -> str | None:
    """The licence that a model card's front matter states."""
    import yaml

    try:
        text = card.read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):  # a card is prose: one that cannot be read states nothing
        return None
    value = front.get("license") if isinstance(front, dict) else None
    return value if isinstance(value, str) else None


def _fingerprint(folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> str:
    """sha256 over config, headers, sizes and samples of the data; see the module's text."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted({t.file for t in tensors.values()}):
        _, start = header_bytes(folder / file)
        middles, at = [], start
        for tensor in tensors.values():  # in order of position, without gaps: read_header checked that
            if tensor.file == file:
                middles.append(at + tensor.bytes // 2)
                at += tensor.bytes
        digest.update(file.encode())
        hash_file(digest, folder / file, start, middles)
    return digest.hexdigest()


def _gguf_folder(fingerprint: str) -> Path:
    """Where the converted model of a GGUF file lies, or will."""
    return cached_folder("gguf", fingerprint, GGUF_LAYOUT)


def _convert_gguf(found: "GGUFFile", fingerprint: str, size: int, progress: Progress | None) -> Path:
    """Convert a GGUF file into the cache, unless it is there already."""
    from llmcompress.gguf_source import write_checkpoint

    return made_once(
        _gguf_folder(fingerprint), size, lambda folder: write_checkpoint(found, folder, progress), found.path.name
    )


def _looks_like_path(model: str) -> bool:
    """Whether a string that names nothing on disk can only have been meant as a path."""
    return (
        model.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
        or model.endswith((".gguf", ".safetensors", *PICKLES))
    )


def _closest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
