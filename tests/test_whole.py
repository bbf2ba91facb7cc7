"""From recipe to published folder in one command, in processes of their own, as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer
from tiny_runs import values, write_text

SPARSE = [{"method": "magnitude", "pattern": "2:4"}]
PACKED = [{"method": "rtn", "group_size": 32}]


@pytest.fixture
def hub() -> Any:
    with HubServer() as server:
        server.add_user("hf_write", "me")
        server.add_user("hf_read", "me", role="read")
        yield server


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Any:
    """Run the command line; exit code, stdout and stderr."""

    def go(*words: str, token: str = "hf_write") -> subprocess.CompletedProcess[str]:
        offline = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        offline |= {"HF_HOME": str(tmp_path / "hf"), "LLMCOMPRESS_CACHE": str(tmp_path / "cache")}
        line = [sys.executable, "-m", "llmcompress", *words]
        return subprocess.run(line, env=os.environ | offline, capture_output=True, text=True, check=False)

    return go


@pytest.fixture
def recipe_file(tiny_folders: Any, tmp_path: Path) -> Any:
    """Write a recipe that scores a text and publishes."""
    text = write_text(tmp_path / "text.txt")
    suite = {"name": "texts", "version": 1, "tasks": [], "divergence": {"text": "prose", "windows": 2}}
    suite |= {"perplexity": [{"name": "prose", "source": str(text), "length": 32, "windows": 4}]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))

    def write(steps: list[dict[str, Any]], format_name: str) -> Path:
        more = {
            "output": {"format": format_name},
            "evaluate": {"suite": str(tmp_path / "suite.yaml")},
            "publish": {"repo_id": "me/tiny", "private": True},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values(tiny_folders("llama"), text, *steps, **more)))
        return path

    return write


@pytest.mark.parametrize(
    ("steps", "format_name"),
    [pytest.param(SPARSE, "sparse24", marks=pytest.mark.slow), (PACKED, "pack-quantized")],
    ids=["sparse24", "pack-quantized"],
)
def test_compress_prove_score_and_publish(steps, format_name, recipe_file, command, hub, tmp_path):
    done = command("run", str(recipe_file(steps, format_name)), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["proof"]["passed"]
    assert results["proof"]["imported_llmcompress"] == (format_name == "sparse24")
    row = results["scores"]["perplexity"][0]
    assert row["base"]["value"] != row["compressed"]["value"] > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{row['compressed']['value']:.2f}" in card
    assert f"{row['compressed']['value']:.2f}" in (tmp_path / "out" / "report.html").read_text()
    published = hub.files("me/tiny")
    sent = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(published) - {".gitattributes"} == sent
    assert published["README.md"].decode() == card

    again = command(
        "eval", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--length", "32", "--windows", "1"
    )
    assert again.returncode == 0, again.stderr
    assert "perplexity text.txt" in again.stdout
    assert "±" not in again.stdout  # one window has no standard error


def test_rights_are_refused_before_anything_is_done(recipe_file, command, hub, tmp_path):
    done = command("run", str(recipe_file(PACKED, "auto")), "--output", str(tmp_path / "out"), token="hf_read")
    assert done.returncode == 2
    assert "the token is read-only" in done.stderr
    assert not (tmp_path / "out.partial").exists()


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(recipe_file, command, hub, tmp_path):
    hub.fail["/commit/"] = 500
    done = command("run", str(recipe_file(PACKED, "auto")), "--output", str(tmp_path / "out"), "--no-eval")
    assert done.returncode == 2
    assert f"llmcompress push {tmp_path / 'out'} me/tiny --private" in " ".join(done.stderr.split())
    hub.fail.clear()
    again = command("push", str(tmp_path / "out"), "me/tiny", "--private")
    assert again.returncode == 0, again.stderr
    assert "results.json" in hub.files("me/tiny")
