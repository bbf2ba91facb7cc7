"""A checkpoint on its way: written block by block into DIR.partial, renamed to DIR when it is complete.

What is in DIR.partial at any moment, a kill included, is a prefix of the run:

    model-00007-of-00032.safetensors   a finished shard (written under another name, then renamed)
    .state/run.json                    fingerprint of the run; a different one refuses to continue
    .state/block-00006.json            the record of a finished block, written after its shard and hidden states
    .state/hidden-00006.safetensors    inputs of the next block; the previous one is removed afterwards
    .state/survey.json, gradients-*    what was found out of the dense model before the first block, if anything was
    .state/proof.safetensors, expected inputs and outputs that the reloaded model must reproduce

Everything is renamed into place only when its bytes are on disk, in the order shard, hidden states, record; so a
block counts as done exactly when its record exists. `.state` is moved away before the final
rename, so a partial folder with a manifest and without `.state` lacks only its name.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmcompress.errors import ResumeError
from llmcompress.files import MANIFEST, read_json, replacing, write_json
from llmcompress.lazy import Tensor

STATE = ".state"
NO_SPACE = "os error 28"  # how the safetensors library spells ENOSPC


class Checkpoint:
    """The output folder of one run.

    folder: the final name.  shards: how many there will be.  fingerprint: of model, data, recipe and versions.
    """

    def __init__(self, folder: Path, shards: int, fingerprint: str) -> None:
        self.folder = folder
        self.partial = partial_folder(folder)
        self.state = self.partial / STATE
        self.shards = shards
        self.fingerprint = fingerprint
        self.details: dict[str, Any] = {}
        self._lock: int | None = None

    def open(self, *, overwrite: bool, details: Mapping[str, Any] | None = None) -> int:
        """Create the partial folder, or continue with the one that is there; returns the number of finished blocks.

        details: what a continued run must not decide anew; `self.details` are those of the run that began.
        The folder is locked until `close`. Raises ResumeError if the partial folder belongs to a different run, which
        `overwrite` starts anew, or to none, or if another process is working in it.
        """
        try:
            return self._open(overwrite, details)
        except BaseException:
            self.close()
            raise

    def _open(self, overwrite: bool, details: Mapping[str, Any] | None) -> int:
        if self.partial.exists():
            self._take_lock()
            begun = read_json(self.state / "run.json")
            found = begun.get("fingerprint")
            if found == self.fingerprint or self.finished():
                self.details = begun.get("details", {})
                for unfinished in self.partial.rglob(".*.tmp"):
                    unfinished.unlink()
                return self._finished_blocks()
            stranger = found is None and any(path.name != STATE for path in self.partial.iterdir())
            if stranger and not (self.partial / MANIFEST).is_file():
                raise ResumeError(f"{self.partial}: was not made by llmcompress and is in the way; move it")
            if (self._progress() or (self.partial / MANIFEST).is_file()) and not overwrite:
                raise ResumeError(
                    f"{self.partial}: holds an unfinished run of another model, data, recipe or version (fingerprint "
                    f"{str(found)[:12]}, this run is {self.fingerprint[:12]}); "
                    "give --overwrite to start anew, or another --output"
                )
            shutil.rmtree(self.partial)  # another run, but one that had not got anywhere
        self.state.mkdir(parents=True)
        self._take_lock()
        self.details = dict(details or {})
        write_json(self.state / "run.json", {"fingerprint": self.fingerprint, "details": self.details})
        return 0

    def _progress(self) -> bool:
        """Whether anything took time: finished blocks, a survey, scores, lessons, a state of training."""
        found = {path.name for path in self.state.iterdir()} if self.state.is_dir() else set()
        return any(name != "run.json" and not name.startswith(".") for name in found)

    def close(self) -> None:
        """Let other processes work in the folder; the system does so too when this one ends."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Lock the partial folder itself: it leaves no file behind, and a killed process holds no lock."""
        self.close()
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ResumeError(
                f"{self.partial}: another process is working in this folder; wait for it, or give another --output"
            ) from None

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number` (from 0)."""
        write_tensors(self.partial / self.shard_name(number), tensors)

    def finish_block(self, index: int, hidden: Tensor, record: dict[str, Any]) -> None:
        """Note that block `index` is done; hidden [samples, length, width] are the inputs of the next one."""
        write_tensors(self.state / f"hidden-{index:05d}.safetensors", {"hidden": hidden})
        write_json(self.state / f"block-{index:05d}.json", record)
        self._hidden(index - 1).unlink(missing_ok=True)

    def hidden(self, finished: int) -> Tensor:
        """Inputs of block number `finished`, as `finish_block` stored them."""
        return read_tensors(self._hidden(finished - 1))["hidden"]

    def records(self) -> list[dict[str, Any]]:
        """Records of the finished blocks, in order."""
        return [read_json(self.state / f"block-{i:05d}.json") for i in range(self._finished_blocks())]

    def write_index(self) -> None:
        """model.safetensors.index.json over the shards that are there."""
        weight_map, total = {}, 0
        for number in range(self.shards):
            name = self.shard_name(number)
            for tensor, entry in safetensors_header(self.partial / name).items():
                weight_map[tensor] = name
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.partial / "model.safetensors.index.json", index)

    def finished(self) -> bool:
        """Whether a run was killed in `complete`, so that only the final name is missing."""
        made = read_json(self.partial / MANIFEST).get("fingerprint")
        return made == self.fingerprint and not self.state.exists()

    def complete(self, *, overwrite: bool) -> None:
        """Give the folder its final name. With `overwrite`, what had that name goes once the new one is ready.

        A kill between any two of these steps leaves a folder that `finished` knows.
        """
        if self.folder.exists() and not overwrite:
            raise ResumeError(f"{self.folder}: appeared while the run was going; the result is in {self.partial}")
        hidden = f".{self.folder.name}.llmcompress-{self.fingerprint[:12]}"  # nobody else's files have such names
        old, state = (self.folder.with_name(hidden + suffix) for suffix in (".old", ".state"))
        shutil.rmtree(state, ignore_errors=True)
        if self.state.exists():
            self.state.rename(state)
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        self.partial.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(state, ignore_errors=True)

    def shard_name(self, number: int) -> str:
        """File name of shard `number` (from 0)."""
        return f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.state / f"hidden-{index:05d}.safetensors"

    def _finished_blocks(self) -> int:
        count = 0
        while (self.state / f"block-{count:05d}.json").exists():
            count += 1
        return count


def partial_folder(folder: Path) -> Path:
    """Where a run works until it is complete."""
    return folder.with_name(folder.name + ".partial")


def stages_folder(folder: Path) -> Path:
    """Where the results of all stages but the last are kept until that one is done."""
    return folder.with_name(folder.name + ".stages")


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Say what to do when the disk fills up while `folder` is being written."""
    try:
        yield
    except Exception as exc:
        if getattr(exc, "errno", None) != errno.ENOSPC and NO_SPACE not in str(exc):
            raise
        raise ResumeError(
            f"{folder}: the disk is full ({exc}); free some space and give the same command again, it continues"
        ) from exc


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, complete or absent."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, {"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote."""
    from safetensors.torch import load_file

    return load_file(path)


def safetensors_header(path: Path) -> dict[str, Any]:
    """Entries of a safetensors file that this program wrote, without the metadata."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(header)
