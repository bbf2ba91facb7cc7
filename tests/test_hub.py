"""Publishing, end to end: the real huggingface_hub client against a hub on 127.0.0.1."""

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
from hub_client import turn_to
from hub_server import HubServer
from huggingface_hub.utils import close_session
from safetensors.numpy import save_file

from llmcompress.errors import PublishError
from llmcompress.hub import api, check_rights, plan_push, push

# The client itself hands file objects to its HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SENT = ["README.md", "config.json", "llmcompress.json", *SHARDS, "model.safetensors.index.json", "sub/tokenizer.json"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that knows a few tokens; HF_TOKEN is `me`'s write token, and our functions get `endpoint=`."""
    with HubServer() as server:
        turn_to(server, "hf_write", tmp_path, monkeypatch)
        orgs = {"acme": "contributor", "museum": "read"}
        server.add_user("hf_write", "me", orgs=orgs)
        server.add_user("hf_read", "me", orgs=orgs, role="read")
        server.add_user("hf_fine", "me", orgs=orgs, role="fineGrained", scoped={("org", "acme"): ["repo.write"]})
        server.add_user("hf_one", "me", role="fineGrained", scoped={("model", "me/old"): ["repo.write"]})
        server.add_user("hf_other", "other")
        yield server
        close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small finished folder: two shards above the size that is sampled, small files, and things that must not go."""
    path = tmp_path / "tiny-w4"
    (path / ".cache/huggingface").mkdir(parents=True)
    (path / "sub").mkdir()
    rng = np.random.default_rng(0)
    for index, name in enumerate(SHARDS):
        save_file({f"w{index}": rng.integers(0, 255, (512, 512 + 256 * index), dtype=np.uint8)}, path / name)
    weight_map = {f"w{index}": name for index, name in enumerate(SHARDS)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "llmcompress.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Größe\n")
    (path / "sub/tokenizer.json").write_text("")
    for name in (".cache/huggingface/x.metadata", ".DS_Store", "model-00003.safetensors.partial", "w.tmp", "run.lock"):
        (path / name).write_text("left behind")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in the folder, hidden ones included."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sent(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in contents(folder).items() if path in SENT}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What would go


def test_plan_lists_the_checkpoint_with_sizes_and_leaves_out_what_is_temporary(folder, hub):
    uploads = plan_push(folder)
    assert [upload.path for upload in uploads] == SENT
    assert [upload.bytes for upload in uploads] == [(folder / path).stat().st_size for path in SENT]
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "llmcompress.json", *SHARDS])
def test_incomplete_folder_is_refused_by_the_name_of_what_is_missing(folder, hub, name):
    (folder / name).unlink()
    with pytest.raises(PublishError, match=f"incomplete, {name} is missing"):
        push(folder, "me/tiny", endpoint=hub.url)
    assert hub.requests == []


def test_folder_without_weights_is_refused(folder):
    for name in SHARDS:
        (folder / name).unlink()
    with pytest.raises(PublishError, match=r"a \.safetensors file is missing"):
        plan_push(folder)


def test_shards_without_an_index_are_refused(folder):
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(PublishError, match=r"model\.safetensors is missing although there is no model"):
        plan_push(folder)


def test_single_file_needs_no_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    (folder / SHARDS[0]).rename(folder / "model.safetensors")
    assert "model.safetensors" in [upload.path for upload in plan_push(folder)]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'], ids=["not-json", "a-list", "no-map"])
def test_broken_index_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PublishError, match="not a safetensors index"):
        plan_push(folder)


def test_truncated_shard_is_refused(folder):
    data = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(data[:-100])
    with pytest.raises(PublishError, match=f"{SHARDS[1]}: not a whole safetensors file"):
        plan_push(folder)


def test_missing_and_unfinished_folders_are_refused(tmp_path, folder):
    with pytest.raises(PublishError, match="no such folder"):
        plan_push(tmp_path / "nothing")
    with pytest.raises(PublishError, match="this run is not finished"):
        plan_push(folder.rename(tmp_path / "tiny-w4.partial"))


# Rights


@pytest.mark.parametrize(
    ("token", "repo_id"),
    [
        ("hf_write", "me/tiny"),
        ("hf_write", "ME/tiny"),
        ("hf_write", "acme/tiny"),
        ("hf_fine", "acme/tiny"),
        ("hf_one", "me/old"),
    ],
    ids=["own", "other-case", "organization", "fine-grained", "fine-grained-one-repo"],
)
def test_rights_are_granted_and_nothing_is_created(hub, folder, monkeypatch, token, repo_id):
    hub.add_repo("me/old", folder)
    monkeypatch.setenv("HF_TOKEN", token)
    check_rights(repo_id, private=False, endpoint=hub.url)
    assert list(hub.repos) == ["me/old"]
    assert {method for method, _ in hub.requests} == {"GET"}


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_gone", "me/tiny", "refused the token .401: Invalid user token. The token from HF_TOKEN"),
        ("hf_read", "me/tiny", "the token is read-only; make a token with write access at http"),
        ("hf_write", "google/tiny", "belongs to 'me', who is not a member .organizations: acme, museum.; use me/"),
        ("hf_write", "museum/tiny", "'me' may only read there; ask an admin"),
        ("hf_fine", "me/tiny", "fine-grained token has no write permission on its repositories"),
        ("hf_fine", "me/old", "may not write here .403: You don't have write access to me/old"),
        ("hf_one", "me/tiny", "fine-grained token has no write permission"),
        ("hf_other", "me/tiny", "belongs to 'other'"),
    ],
    ids=[
        "refused",
        "read-only",
        "foreign-namespace",
        "read-role",
        "fine-other-namespace",
        "fine-existing-repo",
        "fine-one-repo",
        "foreign-user",
    ],
)
def test_rights_are_refused_with_what_to_do_and_nothing_is_created(hub, folder, monkeypatch, token, repo_id, message):
    hub.add_repo("me/old", folder)
    before = contents(folder)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=message):
        check_rights(repo_id, private=False, endpoint=hub.url)
    with pytest.raises(PublishError, match=message):
        push(folder, repo_id, private=False, endpoint=hub.url)
    assert list(hub.repos) == ["me/old"]
    assert {method for method, _ in hub.requests} == {"GET"}
    assert contents(folder) == before


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "me/größe", "me/a--b", "me/x.git", "me/ x", "datasets/me/x"])
def test_malformed_repo_id_is_refused_before_any_request(hub, repo_id):
    with pytest.raises(PublishError, match=r"not a repository id .*; expected namespace/name"):
        check_rights(repo_id, private=True, endpoint=hub.url)
    assert hub.requests == []


def test_bare_name_is_refused_because_its_owner_would_be_a_guess(hub):
    with pytest.raises(PublishError, match="the namespace is missing"):
        check_rights("tiny", private=True, endpoint=hub.url)


def test_no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=f"no token found; make a token .* at {hub.url}/settings/tokens, then `hf"):
        check_rights("me/tiny", private=True, endpoint=hub.url)
    assert hub.requests == []


def test_token_of_a_login_is_found(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_write\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    check_rights("me/tiny", private=True, endpoint=hub.url)


def test_no_network(hub, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(PublishError, match=f"no connection to {closed}, or it broke .*; check the network"):
        push(folder, "me/tiny", endpoint=closed)


def test_offline_mode(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="offline mode is on; unset HF_HUB_OFFLINE"):
        check_rights("me/tiny", private=True, endpoint=hub.url)


def test_default_endpoint_is_the_clients_own(hub):
    assert api().endpoint == huggingface_hub.constants.ENDPOINT == hub.url
    assert api("http://127.0.0.1:9").endpoint == "http://127.0.0.1:9"


# Uploading


@pytest.mark.parametrize("part_bytes", [None, 100_000], ids=["basic", "multipart"])
def test_push_delivers_every_byte_in_one_commit(hub, folder, part_bytes):
    hub.part_bytes = part_bytes
    before, steps = contents(folder), []
    url = push(folder, "me/tiny", progress=lambda done, total: steps.append((done, total)), endpoint=hub.url)
    repo = hub.repos["me/tiny"]
    assert hub.files("me/tiny") == sent(folder)
    assert url == f"{hub.url}/me/tiny/commit/{repo.head}"
    assert len(repo.commits) == 2  # the empty repository's and ours
    assert {path for path, file in repo.commits[repo.head].items() if file.lfs} == set(SHARDS)
    assert sorted(hub.stored) == sorted(sha256(folder / name) for name in SHARDS)
    total = sum(upload.bytes for upload in plan_push(folder))
    first, second = ((folder / name).stat().st_size for name in SHARDS)
    assert steps == [(first, total), (first + second, total), (total, total)]
    assert contents(folder) == before


def test_client_without_xet_uses_lfs_although_the_server_offers_xet(hub, folder, monkeypatch):
    hub.offers_xet = True
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    push(folder, "me/tiny", endpoint=hub.url)
    assert hub.files("me/tiny") == sent(folder)


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
def test_new_repository_gets_the_visibility_that_was_asked_for(hub, folder, private):
    push(folder, "acme/tiny", private=private, endpoint=hub.url)
    assert hub.repos["acme/tiny"].private is private


def test_private_is_the_default(hub, folder):
    push(folder, "me/tiny", endpoint=hub.url)
    assert hub.repos["me/tiny"].private


def test_private_push_into_a_public_repository_is_refused(hub, folder):
    hub.add_repo("me/old", folder, private=False)
    with pytest.raises(PublishError, match="exists and is public, but a private push was asked for"):
        push(folder, "me/old", private=True, endpoint=hub.url)
    assert len(hub.repos["me/old"].commits) == 1
    assert {method for method, _ in hub.requests} == {"GET"}


def test_public_push_leaves_a_private_repository_private(hub, folder):
    hub.add_repo("me/old", folder / "sub", private=True)
    push(folder, "me/old", private=False, endpoint=hub.url)
    assert hub.repos["me/old"].private
    assert hub.files("me/old").keys() >= set(SENT)


def test_shards_of_another_number_are_removed(hub, folder):
    """And nothing else: what a user has put there stays."""
    old = folder.parent / "old"
    old.mkdir()
    for name in ("model-00001-of-00003.safetensors", "model.safetensors", "adapter.safetensors", "notes.txt"):
        (old / name).write_bytes(b"old")
    hub.add_repo("me/tiny", old)
    push(folder, "me/tiny", private=False, endpoint=hub.url)
    assert sorted(hub.files("me/tiny")) == sorted([*SENT, "adapter.safetensors", "notes.txt"])


def test_second_push_of_the_same_folder_sends_and_commits_nothing(hub, folder):
    first = push(folder, "me/tiny", endpoint=hub.url)
    hub.stored.clear()
    assert push(folder, "me/tiny", endpoint=hub.url) == first
    assert hub.stored == []
    assert len(hub.repos["me/tiny"].commits) == 2


def test_push_after_a_change_sends_only_the_changed_shard(hub, folder):
    push(folder, "me/tiny", endpoint=hub.url)
    hub.stored.clear()
    save_file({"w1": np.ones((512, 512), np.uint8)}, folder / SHARDS[1])
    push(folder, "me/tiny", endpoint=hub.url)
    assert hub.stored == [sha256(folder / SHARDS[1])]
    assert hub.files("me/tiny") == sent(folder)


@pytest.mark.parametrize("part_bytes", [None, 100_000], ids=["basic", "multipart"])
def test_cut_connection_leaves_the_folder_intact_and_the_next_push_sends_the_rest(hub, folder, monkeypatch, part_bytes):
    """The line holds for the first shard and breaks in the middle of the second, also in every retry."""
    before = contents(folder)
    hub.part_bytes = part_bytes

    def cut_after_first_shard(done: int, total: int) -> None:
        hub.cut_after = 50_000

    with pytest.raises(PublishError, match=f"upload stopped: no connection .* {folder} is intact: the same command"):
        push(folder, "me/tiny", progress=cut_after_first_shard, endpoint=hub.url)
    assert contents(folder) == before
    assert hub.stored == [sha256(folder / SHARDS[0])]
    assert hub.files("me/tiny") == {}  # never half a model
    assert hub.asked("PUT", sha256(folder / SHARDS[1])) > 1

    hub.cut_after = None
    push(folder, "me/tiny", endpoint=hub.url)
    assert hub.stored == [sha256(folder / name) for name in SHARDS]
    assert hub.files("me/tiny") == sent(folder)
    assert contents(folder) == before


def test_short_interruption_is_bridged_by_the_client(hub, folder, monkeypatch):
    hub.cut_after = 50_000

    def line_is_back(seconds: float) -> None:
        hub.cut_after = None

    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=line_is_back))
    push(folder, "me/tiny", endpoint=hub.url)
    assert hub.files("me/tiny") == sent(folder)
    assert hub.asked("PUT", sha256(folder / SHARDS[0])) == 2


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("/repos/create", 500, "answered 500: asked to fail"),
        ("/preupload/", 503, "answered 503: asked to fail"),
        ("/objects/batch", 403, "may not write here .403: asked to fail"),
        ("/lfs/", 507, "answered 507: asked to fail"),
        ("/commit/", 429, "asks for patience .429: asked to fail"),
    ],
    ids=["create", "preupload", "batch", "put", "commit"],
)
def test_failure_at_any_step_is_one_message_and_the_same_command_continues(hub, folder, part, status, message):
    before = contents(folder)
    hub.fail = {part: status}
    with pytest.raises(PublishError, match=f"me/tiny: the upload stopped: .*{message}.*; {folder} is intact") as caught:
        push(folder, "me/tiny", endpoint=hub.url)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    hub.fail = {}
    push(folder, "me/tiny", endpoint=hub.url)
    assert hub.files("me/tiny") == sent(folder)
    assert sorted(hub.stored) == sorted(sha256(folder / name) for name in SHARDS)  # each blob arrived exactly once


def test_card_with_broken_front_matter_is_refused_by_the_hub(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PublishError, match=r"Invalid metadata in README\.md\. - front matter is not YAML"):
        push(folder, "me/tiny", endpoint=hub.url)
    assert hub.files("me/tiny") == {}


def test_push_is_quiet_when_not_a_terminal(hub, folder, capfd):
    push(folder, "me/tiny", endpoint=hub.url)
    out, err = capfd.readouterr()
    assert out == ""
    assert "%|" not in err
