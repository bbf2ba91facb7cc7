"""From recipe to published folder in one command.

The first run is in processes of its own, as a user's would be, and many tests read what it left. What is not about
processes runs here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_client import turn_to
from hub_server import HubServer
from huggingface_hub.utils import close_session
from tiny_runs import proof_inside, values

from llmcompress.cli import main

SPARSE = [{"method": "magnitude", "pattern": "2:4"}]
PACKED = [{"method": "rtn", "group_size": 32}]


@dataclass(frozen=True)
class Whole:
    """A finished run and the hub that it published to."""

    format_name: str
    folder: Path
    done: subprocess.CompletedProcess[str]
    hub: HubServer


def write_recipe(folder: Path, model: Path, text: Path, steps: list[dict[str, Any]], format_name: str) -> Path:
    """A recipe that scores a text and publishes."""
    suite = {"name": "texts", "version": 1, "tasks": [], "divergence": {"text": "prose", "windows": 2}}
    suite |= {"perplexity": [{"name": "prose", "source": str(text), "length": 32, "windows": 4}]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    more = {
        "output": {"format": format_name},
        "evaluate": {"suite": str(folder / "suite.yaml")},
        "publish": {"repo_id": "me/tiny", "private": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(model, text, *steps, **more)))
    return path


@pytest.fixture(
    scope="module",
    params=[pytest.param((SPARSE, "sparse24"), marks=pytest.mark.slow), (PACKED, "pack-quantized")],
    ids=["sparse24", "pack-quantized"],
)
def whole(request: Any, tiny_folders: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Compressed in a new interpreter, proved in another one, scored and published."""
    steps, format_name = request.param
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, tiny_folders("llama"), text, steps, format_name)
    command = [sys.executable, "-m", "llmcompress", "run", str(recipe), "--output", str(folder / "out"), "--json"]
    with HubServer() as hub:
        hub.add_user("hf_write", "me")
        offline = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_write", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        offline |= {"HF_HOME": str(folder / "hf"), "LLMCOMPRESS_CACHE": str(folder / "cache")}
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield Whole(format_name, folder / "out", done, hub)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that the client of this process knows."""
    with HubServer() as server:
        server.add_user("hf_write", "me")
        server.add_user("hf_read", "me", role="read")
        turn_to(server, "hf_write", tmp_path, monkeypatch)
        yield server
        close_session()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; exit code, stdout and stderr."""

    def go(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with proof_inside(monkeypatch), pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return int(stop.value.code or 0), *capsys.readouterr()

    return go


def test_stdout_is_one_json_object_and_stderr_says_where_it_went(whole):
    """And nothing else, as nobody watches; but huggingface_hub speaks of Xet while it uploads."""
    printed = json.loads(whole.done.stdout)
    assert printed.pop("folder") == str(whole.folder)
    assert printed == json.loads((whole.folder / "results.json").read_text())
    *others, last = whole.done.stderr.splitlines()
    assert last.startswith(f"published: {whole.hub.url}/me/tiny/")
    assert all("Xet" in line for line in others)


def test_the_result_was_proved_in_a_clean_process(whole):
    proof = json.loads(whole.done.stdout)["proof"]
    assert proof["passed"]
    assert proof["weights"] == 14
    assert proof["engine"].startswith("transformers ")
    assert proof["imported_llmcompress"] == (whole.format_name == "sparse24")


def test_scores_stand_in_results_card_and_page(whole):
    row = json.loads((whole.folder / "results.json").read_text())["scores"]["perplexity"][0]
    assert row["base"]["value"] != row["compressed"]["value"] > 1
    for name in ("README.md", "report.html"):
        assert f"{row['compressed']['value']:.2f}" in (whole.folder / name).read_text()


def test_all_that_was_made_is_published(whole):
    published = whole.hub.files("me/tiny")
    assert set(published) - {".gitattributes"} == {path.name for path in whole.folder.iterdir()}
    assert published["README.md"] == (whole.folder / "README.md").read_bytes()


def test_the_result_can_be_scored_again(whole, text, command):
    code, out, err = command("eval", whole.folder, "--text", text, "--length", "32", "--windows", "1")
    assert code == 0, err
    assert f"perplexity {text.name}" in out
    assert "±" not in out  # one window has no standard error


def test_rights_are_refused_before_anything_is_done(tiny_folders, text, command, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    recipe = write_recipe(tmp_path, tiny_folders("llama"), text, PACKED, "auto")
    code, _, err = command("run", recipe, "--output", tmp_path / "out")
    assert code == 2
    assert "the token is read-only" in err
    assert not (tmp_path / "out.partial").exists()


# The client itself hands file objects to its HTTP library in a deprecated way.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(tiny_folders, text, command, hub, tmp_path):
    hub.fail["/commit/"] = 500
    recipe = write_recipe(tmp_path, tiny_folders("llama"), text, PACKED, "auto")
    code, _, err = command("run", recipe, "--output", tmp_path / "out", "--no-eval")
    assert code == 2
    assert f"llmcompress push {tmp_path / 'out'} me/tiny --private" in " ".join(err.split())
    hub.fail.clear()
    code, _, err = command("push", tmp_path / "out", "me/tiny", "--private")
    assert code == 0, err
    assert "results.json" in hub.files("me/tiny")
