"""Models on the Hugging Face Hub: headers first, weights when they are asked for.

A revision (branch, tag or commit) is resolved to a commit at once, and everything after that is read at that commit, so
that a run which is continued next week reads the same weights. Without a network, a model that was downloaded before
is used from the Hub's cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmcompress.errors import SourceError
from llmcompress.files import MANIFEST
from llmcompress.safetensors_file import TensorInfo, parse_entries
from llmcompress.source import (
    CONVERT_PICKLE,
    PICKLES,
    ModelSource,
    Progress,
    check_config,
    open_folder,
    patterns_in,
    read_json,
)

TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*"]


def open_hub(repo: str, revision: str | None) -> ModelSource:
    """Config and tensor headers of a model on the Hub, at the commit that `revision` stands for.

    Raises SourceError: no such model or revision, no access, no network and not in the cache, no safetensors.
    """
    from huggingface_hub import HfApi, get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(repo, revision):
        try:
            info = HfApi().model_info(repo, revision=revision)
        except network_errors() as exc:
            if getattr(exc, "response", None) is not None:
                raise  # the Hub answered, and said no
            return _open_cached(repo, revision, exc)
        names = {sibling.rfilename for sibling in info.siblings or ()}
        if "config.json" not in names:
            raise SourceError(f"{repo}: no config.json on the Hub at {info.sha}; expected a transformers model")
        path = Path(hf_hub_download(repo, "config.json", revision=revision))
        commit = path.parent.name  # asking by branch makes the cache remember which commit the branch stood for
        config = check_config(read_json(path), repo)
        pruned = {}
        if MANIFEST in names:
            pruned = patterns_in(read_json(Path(hf_hub_download(repo, MANIFEST, revision=commit))))
        try:
            headers = get_safetensors_metadata(repo, revision=commit)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as exc:
            raise SourceError(f"{repo}: {_what_instead(names, exc)}") from None
    license_name = getattr(info.card_data, "license", None)
    return ModelSource(
        name=repo, hub_id=info.id, revision=commit, fingerprint=commit, config=config,
        license=license_name if isinstance(license_name, str) else None,
        tensors=_tensors(repo, headers), local=False, pruned=pruned,
    )  # fmt: skip


def download(source: ModelSource, progress: Progress | None) -> Path:
    """Download the weights, config and tokenizer of an opened model; returns the folder in the Hub's cache.

    Never pickle files; Python files only if the config needs them. progress: called after each file of weights.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, commit = str(source.hub_id), source.revision
    patterns = [*TEXT_FILES, *(["*.py"] if source.needs_remote_code else [])]
    done = 0
    with hub_errors(repo, commit):
        for file in sorted({tensor.file for tensor in source.tensors.values()}):
            hf_hub_download(repo, file, revision=commit)
            done += sum(tensor.bytes for tensor in source.tensors.values() if tensor.file == file)
            if progress:
                progress(done, source.weight_bytes)
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"]))


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a SourceError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(
            f"{repo}: this model is gated; accept its terms at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{repo}: no such model on the Hub, and no such folder here; check the name, or, if it is private, log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{repo}: the Hub has no revision {revision!r} of it; give a branch, tag or commit") from None
    except errors.HFValidationError as exc:
        raise SourceError(f"{repo}: not a Hub id (owner/name) and no such file or folder: {exc}") from None
    except (*network_errors(), errors.EntryNotFoundError) as exc:
        raise SourceError(
            f"{repo}: the Hub could not be read ({reason(exc)}); check the network and HF_HUB_OFFLINE, or "
            "give a local folder"
        ) from None


def network_errors() -> tuple[type[Exception], type[Exception]]:
    """What huggingface_hub raises when a request fails or is answered with an error."""
    from huggingface_hub import errors

    return (errors.HTTPError, OSError)  # type: ignore[attr-defined]  # HTTPError: of its HTTP library, whichever it is


def reason(exc: Exception) -> str:
    """An exception in one line."""
    return f"{type(exc).__name__}: {exc}".splitlines()[0]


def _open_cached(repo: str, revision: str | None, cause: Exception) -> ModelSource:
    """A model that was downloaded before, from the Hub's cache; raises `cause` if it was not."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # config.json stands for the rest: the headers tell if a shard is missing
        folder = Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)).parent
    except LocalEntryNotFoundError:
        raise cause from None
    return open_folder(repo, folder, hub_id=repo, revision=folder.name)


def _tensors(repo: str, headers: Any) -> dict[str, TensorInfo]:
    """TensorInfo of every tensor, from huggingface_hub's record of a repository's headers."""
    tensors: dict[str, TensorInfo] = {}
    for file, content in sorted(headers.files_metadata.items()):
        entries = {
            name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for name, t in content.tensors.items()
        }
        try:
            tensors |= parse_entries(entries, file, None)
        except ValueError as exc:
            raise SourceError(f"{repo}: {file} is not a valid safetensors file: {exc}") from None
    return tensors


def _what_instead(names: set[str], problem: Exception) -> str:
    """Why a repository has no safetensors to read."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return f"only pickle weights there ({pickles[0]}); {CONVERT_PICKLE}"
    return f"no safetensors weights that could be read ({problem})"
