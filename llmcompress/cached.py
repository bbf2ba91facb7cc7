"""Models that this machine makes once and keeps: new ones, and what a GGUF file becomes.

They lie below ${LLMCOMPRESS_CACHE:-~/.cache/llmcompress} in folders that are named by what they are made from, so the
same model is found again and another one never taken for it. Two processes that want the same folder wait for each
other; a folder has its name only when it is whole.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llmcompress.errors import SourceError


def cached_folder(kind: str, fingerprint: str, layout: bytes = b"1") -> Path:
    """Where a model that is made here lies, or will; layout: what changes when it would be made otherwise."""
    cache = Path(os.environ.get("LLMCOMPRESS_CACHE") or "~/.cache/llmcompress").expanduser()
    return cache / kind / hashlib.sha256(layout + fingerprint.encode()).hexdigest()[:16]


def made_once(folder: Path, size: int, write: Callable[[Path], None], name: str = "the model") -> Path:
    """A folder of the cache that `write` fills, unless it is there already; a kill leaves no half folder."""
    from filelock import FileLock

    unfinished = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():  # made before, or by another process while we waited
                return folder
            shutil.rmtree(unfinished, ignore_errors=True)
            _check_space(folder.parent, size)
            unfinished.mkdir()
            try:
                write(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as exc:
        raise SourceError(
            f"{unfinished}: cannot convert {name}: {exc}; set LLMCOMPRESS_CACHE to a folder with space"
        ) from None
    return folder


def _check_space(folder: Path, size: int) -> None:
    """Raise SourceError if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SourceError(
            f"{folder}: {free / 2**30:.1f} GiB free, the converted model takes {size / 2**30:.1f} GiB; "
            "make room, or set LLMCOMPRESS_CACHE to a folder on another disk"
        )
