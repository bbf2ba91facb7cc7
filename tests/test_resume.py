"""Killed runs: they continue where they were and end with the same bytes; other runs are refused."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_tiny
from tiny_runs import digests, proof_inside, recipe, run_die_at, values, write_text

from llmcompress.checkpoint import partial_folder
from llmcompress.errors import ResumeError
from llmcompress.progress import Silent
from llmcompress.run import run

STEP = {"method": "gptq", "group_size": 32}
FILES = [  # in the order in which a run of three blocks makes them
    "run.json",
    "model-00001-of-00004.safetensors", "hidden-00000.safetensors", "block-00000.json",
    "model-00002-of-00004.safetensors", "hidden-00001.safetensors", "block-00001.json",
    "model-00003-of-00004.safetensors", "hidden-00002.safetensors", "block-00002.json",
    "model-00004-of-00004.safetensors", "config.json", "model.safetensors.index.json", "recipe.yaml", "results.json",
    "llmcompress.json", "out",
]  # fmt: skip
QUICK = {  # moment -> blocks that are finished by then
    ("before", "run.json"): 0,
    ("before", "model-00001-of-00004.safetensors"): 0,
    ("after", "hidden-00000.safetensors"): 0,
    ("after", "block-00000.json"): 1,
    ("after", "model-00003-of-00004.safetensors"): 2,
    ("before", "config.json"): 3,
    ("before", "out"): 3,
}


class Interrupt(Silent):
    """Stops a run, as Ctrl-C does, when it comes to the block `index`."""

    def __init__(self, index: int) -> None:
        self.index = index

    def advance(self, done: int, detail: str = "") -> None:
        if detail.endswith(f".{self.index}"):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three blocks."""
    return write_tiny(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=3)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The proof of loading stays in this process."""
    with proof_inside(monkeypatch):
        yield


@pytest.fixture(scope="module")
def killed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Output folder of a killed run, by moment; under None that of a run that nobody killed."""
    folders = {moment: tmp_path_factory.mktemp("killed") / "out" for moment in (None, *QUICK)}
    moments = [{"folder": str(folders[moment]), "side": moment[0], "file": moment[1]} for moment in QUICK]
    run_die_at(moments, folders[None], values(model, text, STEP))
    return folders


@pytest.fixture(scope="module")
def uninterrupted(killed: dict[Any, Path]) -> dict[str, str]:
    """Digests of the run that nobody killed."""
    return digests(killed[None])


def stamps(folder: Path) -> dict[str, int]:
    """Time at which each shard was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("moment", QUICK, ids=" ".join)
def test_killed_run_continues_to_the_same_bytes(moment, killed, model, text, uninterrupted, inside):
    folder, finished = killed[moment], QUICK[moment]
    assert not folder.exists()
    before = stamps(partial_folder(folder))
    run(recipe(model, text, STEP), folder)
    after = stamps(folder)
    done = [f"model-{i + 1:05d}-of-00004.safetensors" for i in range(finished)]
    assert [after[name] for name in done] == [before[name] for name in done]
    assert digests(folder) == uninterrupted
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]
    assert not list(folder.rglob(".*"))


OTHERS = {
    "awq": ([{"method": "awq", "group_size": 32}], ["block-00000.json"]),
    "owl": (
        [{"method": "wanda", "sparsity": 0.6, "budget": "owl"}, {"method": "gptq", "group_size": 32}],
        ["survey.json", "block-00000.json"],
    ),
    "taylor": (
        [{"method": "taylor", "sparsity": 0.5, "pattern": "global"}],
        ["00001.safetensors", "gradients-00001.safetensors", "survey.json", "block-00000.json"],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "owl" else name for name in OTHERS]
)
def test_other_methods_and_surveys_continue_to_the_same_bytes(name, model, text, inside, tmp_path):
    """Norms that absorbed scales, budgets and gradients of the dense model: all is on disk, or made again."""
    steps, files = OTHERS[name]
    folders = {file: tmp_path / file / "out" for file in files}
    for folder in folders.values():
        folder.parent.mkdir()
    moments = [{"folder": str(folder), "side": "after", "file": file} for file, folder in folders.items()]
    run_die_at(moments, tmp_path / "whole", values(model, text, *steps))
    expected = digests(tmp_path / "whole")
    for folder in folders.values():
        assert not folder.exists()
        run(recipe(model, text, *steps), folder)
        assert digests(folder) == expected
        assert not list(folder.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["before", "after"])
def test_killed_at_every_file(side, model, text, uninterrupted, inside, tmp_path):
    folders = {file: tmp_path / file / "out" for file in FILES if (side, file) != ("after", "out")}
    for folder in folders.values():
        folder.parent.mkdir()
    moments = [{"folder": str(folder), "side": side, "file": file} for file, folder in folders.items()]
    run_die_at(moments, tmp_path / "whole", values(model, text, STEP))
    found = {}
    for file, folder in folders.items():
        assert not folder.exists()
        try:
            run(recipe(model, text, STEP), folder)
            found[file] = digests(folder) == uninterrupted
        except ResumeError as exc:
            found[file] = str(exc)
    assert found == dict.fromkeys(folders, True)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["calibrating", "block-00000.json", "model-00003-of-00004.safetensors"])
def test_command_killed_from_outside_and_given_again(after, model, text, uninterrupted, tmp_path):
    """The command line, a real SIGKILL as soon as a file is seen, and the proof in its own process."""
    path, folder = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(values(model, text, STEP)))
    command = [sys.executable, "-m", "llmcompress", "run", str(path), "--output", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    if after == "calibrating":
        time.sleep(3)
    else:
        while not list(partial_folder(folder).rglob(after)) and time.monotonic() < deadline:
            time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digests(folder) == uninterrupted


# refusals


@pytest.fixture
def partial(model: Path, text: Path, tmp_path: Path) -> Path:
    """Folder of a run that was interrupted in its second block."""
    with pytest.raises(KeyboardInterrupt):
        run(recipe(model, text, STEP), tmp_path / "out", progress=Interrupt(1))
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [STEP | {"bits": 8}]},
        {"keep": ["lm_head", "*.down_proj"]},
        {"dtype": "float32"},
        {"output": {"format": "dense"}},
        {"calibration.seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_on_a_partial_folder_is_refused(change, partial, model, text):
    before = {path: path.read_bytes() for path in partial_folder(partial).rglob("*") if path.is_file()}
    changed = values(model, text, STEP)
    for key, value in change.items():
        changed |= {"calibration": changed["calibration"] | {"seed": value}} if "." in key else {key: value}
    with pytest.raises(ResumeError, match=r"out\.partial: holds an unfinished run of another.*--overwrite"):
        run(recipe(model, text, **{k: v for k, v in changed.items() if k != "model"}), partial)
    assert {path: path.read_bytes() for path in partial_folder(partial).rglob("*") if path.is_file()} == before


def test_overwrite_starts_another_recipe_anew(partial, model, text, inside):
    results = run(recipe(model, text, STEP | {"bits": 8}), partial, overwrite=True)
    assert {row["bits"] for row in results["layers"]} == {8}
    assert not partial_folder(partial).exists()


@pytest.mark.parametrize(
    "change", [{"max_memory": "64GiB"}, {"evaluate": {"suite": "quick"}}], ids=["max_memory", "evaluate"]
)
def test_what_does_not_change_the_bytes_may_change(change, partial, model, text, uninterrupted, inside):
    run(recipe(model, text, STEP, **change), partial, evaluate=False)
    assert digests(partial) == uninterrupted


def test_an_existing_folder_is_left_as_it_is(model, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ResumeError, match="exists; give --overwrite"):
        run(recipe(model, text, STEP), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_ready(model, text, tmp_path, uninterrupted, inside):
    folder = tmp_path / "out"
    run(recipe(model, text, {"method": "rtn", "group_size": 32}), folder)
    old = digests(folder)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(model, text, STEP), folder, overwrite=True, progress=Interrupt(1))
    assert digests(folder) == old
    run(recipe(model, text, STEP), folder, overwrite=True)
    assert digests(folder) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_removes_a_folder_that_no_run_made(model, text, tmp_path, inside):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ResumeError):
        run(recipe(model, text, {"method": "rtn", "group_size": 32}), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
