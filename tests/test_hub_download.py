"""Models from the Hub, end to end: the real client in a clean process against a hub on 127.0.0.1."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from safetensors.numpy import save_file

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SCRIPT = """
import json, sys
from llmcompress.errors import SourceError
from llmcompress.source import open_source

model, revision, fetch = json.loads(sys.argv[1])
try:
    source, steps = open_source(model, revision=revision), []
    if fetch:
        source = source.fetch(lambda done, total: steps.append([done, total]))
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    print(json.dumps({"revision": source.revision, "hub_id": source.hub_id, "license": source.license, "steps": steps,
                      "fingerprint": source.fingerprint, "local": source.local, "shapes": shapes,
                      "folder": source.folder and str(source.folder)}))
except SourceError as exc:
    print(json.dumps({"error": str(exc)}))
"""
Open = Callable[..., dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("hf_me", "me")
        server.add_user("hf_other", "other")
        yield server


@pytest.fixture
def open_model(hub: HubServer, tmp_path: Path) -> Open:
    """Call open_source, and fetch if asked, in a new process that has its own cache and only this hub."""

    def call(model: str, revision: str | None = None, *, fetch: bool = False, token: str = "") -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", SCRIPT, json.dumps([model, revision, fetch])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint, each shard larger than what the client reads of it for the header."""
    return write_model(tmp_path / "model", value=1)


def write_model(folder: Path, value: int) -> Path:
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (100, 512), "lm_head.weight": (130, 512)}
    for file, (name, shape) in zip(SHARDS, shapes.items(), strict=True):
        save_file({name: np.full(shape, value, np.float32)}, folder / file)
    weight_map = dict(zip(shapes, SHARDS, strict=True))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def test_opening_reads_headers_and_resolves_the_revision(hub, folder, open_model):
    commit = hub.add_repo("me/model", folder)
    found = open_model("me/model")
    assert found["revision"] == found["fingerprint"] == commit
    assert (found["hub_id"], found["license"], found["local"]) == ("me/model", "apache-2.0", False)
    assert found["shapes"] == {"model.embed_tokens.weight": [100, 512], "lm_head.weight": [130, 512]}
    for name in SHARDS:
        assert 0 < hub.served[name] <= 100_001 < (folder / name).stat().st_size


def test_fetch_delivers_weights_config_and_tokenizer_and_no_code(hub, folder, open_model):
    hub.add_repo("me/model", folder)
    found = open_model("me/model", fetch=True)
    assert found["local"]
    names = {*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.json", "README.md"}
    fetched = Path(found["folder"])
    assert {path.name for path in fetched.iterdir()} == names
    assert all((fetched / name).read_bytes() == (folder / name).read_bytes() for name in names)
    first, total = 100 * 512 * 4, 230 * 512 * 4
    assert found["steps"] == [[first, total], [total, total]]
    assert hub.served["pytorch_model.bin"] == hub.served["modeling.py"] == 0


def test_a_commit_stays_what_it_was_when_main_moves_on(hub, folder, open_model, tmp_path):
    old = hub.add_repo("me/model", folder)
    newer = write_model(tmp_path / "newer", value=2)
    new = hub.add_repo("me/model", newer)
    for revision, commit, source in [(old, old, folder), ("main", new, newer), (None, new, newer)]:
        found = open_model("me/model", revision, fetch=True)
        assert found["revision"] == commit
        assert (Path(found["folder"]) / SHARDS[0]).read_bytes() == (source / SHARDS[0]).read_bytes()


def test_second_fetch_downloads_no_weights(hub, folder, open_model):
    hub.add_repo("me/model", folder)
    first = open_model("me/model", fetch=True)
    hub.served.clear()
    assert open_model("me/model", fetch=True)["folder"] == first["folder"]
    assert all(hub.served[name] <= 100_001 for name in SHARDS)  # the header again, nothing more


def test_broken_download_goes_on_where_it_stopped(hub, folder, open_model):
    """The client writes pieces of 10 MiB and asks for the rest after the last whole one."""
    save_file({"lm_head.weight": np.arange(3 * 2**20, dtype=np.float32)}, folder / SHARDS[1])
    hub.add_repo("me/model", folder)
    hub.cut_download_after = 11 * 2**20
    found = open_model("me/model", fetch=True)
    assert hub.cut_download_after is None
    assert (Path(found["folder"]) / SHARDS[1]).read_bytes() == (folder / SHARDS[1]).read_bytes()
    header, size = 100_001, (folder / SHARDS[1]).stat().st_size
    assert hub.served[SHARDS[1]] == header + size + 2**20


def test_fetched_model_opens_without_the_hub(hub, folder, open_model):
    commit = hub.add_repo("me/model", folder)
    open_model("me/model", fetch=True)
    hub.server.shutdown()
    hub.server.server_close()
    found = open_model("me/model")
    assert (found["revision"], found["local"]) == (commit, True)
    assert "could not be read" in open_model("me/another")["error"]


@pytest.mark.parametrize(
    ("access", "token", "message"),
    [
        ("gated", "", "this model is gated; accept its terms at"),
        ("gated", "hf_other", "this model is gated; accept its terms at"),
        ("gated", "hf_me", None),
        ("private", "", "no such model on the Hub.*log in with"),
        ("private", "hf_other", "no such model on the Hub.*log in with"),
        ("private", "hf_me", None),
    ],
)
def test_gated_and_private_models_need_the_right_token(hub, folder, open_model, access, token, message):
    hub.add_repo("me/model", folder, **{access: True})
    found = open_model("me/model", fetch=True, token=token)
    if message is None:
        assert (Path(found["folder"]) / SHARDS[1]).read_bytes() == (folder / SHARDS[1]).read_bytes()
    else:
        assert re.search(message, found["error"])


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("me/missing", None, "no such model on the Hub"),
        ("me/model", "v9", "no revision 'v9' of it"),
        ("me/model", "0" * 40, f"no revision '{'0' * 40}' of it"),
        ("me/pickles", None, "only pickle weights there (pytorch_model.bin)"),
    ],
    ids=["model", "branch", "commit", "pickles"],
)
def test_what_cannot_be_opened_says_why(hub, folder, open_model, tmp_path, model, revision, message):
    hub.add_repo("me/model", folder)
    pickles = write_model(tmp_path / "pickles", value=1)
    for path in pickles.glob("*.safetensors*"):
        path.unlink()
    hub.add_repo("me/pickles", pickles)
    assert message in open_model(model, revision)["error"]
