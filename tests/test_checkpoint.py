"""The folder on its way: what is there after each step, and what refuses to continue."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.checkpoint import (
    Checkpoint,
    partial_folder,
    safetensors_header,
    write_tensors,
)
from llmcompress.errors import ResumeError
from llmcompress.files import read_json, replacing, write_json

HIDDEN = torch.arange(6, dtype=torch.bfloat16).view(1, 2, 3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A new folder of two blocks and one shard for the rest."""
    made = Checkpoint(tmp_path / "out", 3, "f" * 64)
    assert made.open(overwrite=False) == 0
    return made


def continued(before: Checkpoint, fingerprint: str = "f" * 64, **options) -> tuple[int, Checkpoint]:
    """Finished blocks, and the folder as a later process sees it."""
    before.close()
    after = Checkpoint(before.folder, 3, fingerprint)
    return after.open(**{"overwrite": False} | options), after


def finish(checkpoint: Checkpoint, index: int) -> None:
    checkpoint.write_shard(index, {f"layers.{index}.weight": torch.full((2, 2), float(index))})
    checkpoint.finish_block(index, HIDDEN + index, {"block": index})


def test_a_block_is_done_when_its_record_is_there(checkpoint):
    finish(checkpoint, 0)
    checkpoint.write_shard(1, {"layers.1.weight": torch.zeros(1)})
    count, again = continued(checkpoint)
    assert count == 1
    assert again.records() == [{"block": 0}]
    assert torch.equal(again.hidden(1), HIDDEN)


def test_only_the_last_hidden_states_are_kept(checkpoint):
    finish(checkpoint, 0)
    finish(checkpoint, 1)
    assert [path.name for path in checkpoint.state.glob("hidden-*")] == ["hidden-00001.safetensors"]
    assert torch.equal(checkpoint.hidden(2), HIDDEN + 1)


def test_records_after_a_gap_do_not_count(checkpoint):
    finish(checkpoint, 0)
    finish(checkpoint, 1)
    (checkpoint.state / "block-00000.json").unlink()
    assert continued(checkpoint)[0] == 0


def test_another_fingerprint_is_refused(checkpoint):
    finish(checkpoint, 0)
    with pytest.raises(ResumeError, match=r"out\.partial: .*fingerprint ffffffffffff, this run is 000000000000"):
        continued(checkpoint, "0" * 64)
    assert continued(checkpoint, "0" * 64, overwrite=True)[0] == 0
    assert [path.name for path in checkpoint.partial.rglob("*")] == [".state", "run.json"]


def test_index_lists_every_tensor_and_its_bytes(checkpoint):
    for index in (0, 1):
        finish(checkpoint, index)
    checkpoint.write_shard(2, {"norm": torch.ones(3, dtype=torch.bfloat16)})
    checkpoint.write_index()
    index = json.loads((checkpoint.partial / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 16 + 16 + 6}
    assert index["weight_map"] == {
        "layers.0.weight": "model-00001-of-00003.safetensors",
        "layers.1.weight": "model-00002-of-00003.safetensors",
        "norm": "model-00003-of-00003.safetensors",
    }


def test_complete_gives_the_final_name_and_removes_the_state(checkpoint):
    finish(checkpoint, 0)
    checkpoint.complete(overwrite=False)
    assert not partial_folder(checkpoint.folder).exists()
    assert [path.name for path in checkpoint.folder.iterdir()] == ["model-00001-of-00003.safetensors"]


def test_complete_leaves_folders_of_others_alone(checkpoint):
    finish(checkpoint, 0)
    for name in ("out.old", "out.state"):
        checkpoint.folder.with_name(name).mkdir()
        (checkpoint.folder.with_name(name) / "mine.txt").write_text("mine")
    checkpoint.complete(overwrite=True)
    assert all((checkpoint.folder.with_name(name) / "mine.txt").exists() for name in ("out.old", "out.state"))


def test_a_partial_folder_of_somebody_else_is_never_removed(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(ResumeError, match="was not made by llmcompress"):
        Checkpoint(tmp_path / "out", 3, "f" * 64).open(overwrite=True)
    assert (tmp_path / "out.partial" / "mine.txt").exists()


def test_details_are_those_of_the_run_that_began(tmp_path):
    begun = Checkpoint(tmp_path / "out", 3, "f" * 64)
    begun.open(overwrite=False, details={"proof_blocks": 4})
    assert continued(begun, details={"proof_blocks": 2})[1].details == {"proof_blocks": 4}


def test_two_processes_never_work_in_one_folder(checkpoint):
    finish(checkpoint, 0)
    for overwrite in (False, True):
        with pytest.raises(ResumeError, match=r"out\.partial: another process is working in this folder"):
            Checkpoint(checkpoint.folder, 3, "f" * 64).open(overwrite=overwrite)
    assert (checkpoint.state / "block-00000.json").exists()
    assert continued(checkpoint)[0] == 1, "the lock goes with the process that held it"


def test_complete_does_not_replace_a_folder_that_appeared(checkpoint):
    finish(checkpoint, 0)
    checkpoint.folder.mkdir()
    with pytest.raises(ResumeError, match="appeared while the run was going"):
        checkpoint.complete(overwrite=False)
    assert list(checkpoint.folder.iterdir()) == []
    assert continued(checkpoint)[0] == 1, "the run can be completed under this name later"


# single files


def test_a_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_and_fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tensors_are_written_as_they_are(tmp_path):
    tensors = {"turned": torch.arange(6.0).view(2, 3).T, "slice": torch.arange(10)[::2], "half": HIDDEN}
    write_tensors(tmp_path / "t.safetensors", tensors)
    for name, found in load_file(tmp_path / "t.safetensors").items():
        assert torch.equal(found, tensors[name]), name
    assert set(safetensors_header(tmp_path / "t.safetensors")) == set(tensors)


def test_same_tensors_make_the_same_bytes(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64), "c": HIDDEN}
    write_tensors(tmp_path / "1", tensors)
    write_tensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("content", [None, "", "{", "[1]"], ids=["absent", "empty", "cut", "list"])
def test_json_that_is_not_an_object_reads_as_empty(content, tmp_path):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    assert read_json(tmp_path / "x.json") == {}


def test_json_goes_round(tmp_path):
    write_json(tmp_path / "x.json", {"ü": [1, None, 0.5]})
    assert read_json(tmp_path / "x.json") == {"ü": [1, None, 0.5]}
