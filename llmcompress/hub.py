"""Publish a finished folder on the Hugging Face Hub: check first, upload what is not there yet, commit once.

A push has three questions, answered in order of cost:

    plan_push(folder)           is the folder complete, and which files would go?        no network (`--dry-run`)
    check_rights(repo_id)       does the token exist, and may it write there?            no change on the Hub
    push(folder, repo_id)       create the repo, upload blob after blob, one commit

A run asks the second question before it reads a weight, so that hours of work do not end at a read-only token.

Resuming. The Hub stores file contents under their hash. A blob that arrived whole stays there, committed or not, so a
push that was cut goes on at the first unfinished file when the same command is given again, and nothing has to be
written down locally: the folder that is pushed is only ever read. The commit comes last and is one commit, so the
repository never shows half a model.

Visibility. `private` decides about a repository that the push creates. An existing one keeps its visibility: a private
one stays private, and a push that asked for private into a public repository is refused, because what was public once
cannot be taken back.

Transport. Where the server offers Xet (the public Hub does) and hf_xet is installed, the client sends the weights in
chunks that are deduplicated. Where the server does not, they go through git-LFS. HF_HUB_DISABLE_XET=1 forces LFS.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmcompress.errors import PublishError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|adapter/adapter_(model\.safetensors|config\.json)")
REQUIRED = ("config.json", "llmcompress.json")
INDEX = "model.safetensors.index.json"
NEVER_UPLOADED = (".*", "*.partial", "*.tmp", "*.incomplete", "*.lock", "*~", "__pycache__")
WRITE_TOKEN = "make a token with write access at {endpoint}/settings/tokens, then `hf auth login` or set HF_TOKEN"

Progress = Callable[[int, int], None]
"""Called with the bytes on the server and the bytes of all files: after each weight file, and after the commit."""


class Upload(NamedTuple):
    """One file of a push: its path in the repository (relative, with slashes) and its size in bytes."""

    path: str
    bytes: int


def api(endpoint: str | None = None) -> "HfApi":
    """The Hub client with the usual token (HF_TOKEN, or `hf auth login`), read anew for each request.

    endpoint: base URL; default: huggingface_hub's own, https://huggingface.co or HF_ENDPOINT.
    """
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=True, library_name="llmcompress")


def plan_push(folder: Path) -> list[Upload]:
    """The files that a push of `folder` would send, by path; nothing is sent and nothing is asked of the network.

    Hidden files and folders (.cache, .git), *.partial, lock and temporary files never go.
    Raises PublishError if the folder is not a finished checkpoint: config.json, llmcompress.json or the weights are
    missing, its index names files that are not there, or a weight file is truncated.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder}: no such folder; expected the output folder of a finished run")
    if folder.suffix == ".partial":
        raise PublishError(f"{folder}: this run is not finished; give its run command again, then push the result")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    uploads = [Upload(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    uploads = [upload for upload in uploads if not _left_behind(upload.path)]
    _check_complete(folder, {upload.path for upload in uploads})
    return uploads


def check_rights(repo_id: str, *, private: bool, endpoint: str | None = None) -> None:
    """Make sure that `push` to `repo_id` would be allowed, without creating or changing anything.

    private: what the push will ask for; matters where the repository exists and is public (see the module docstring).
    Raises PublishError: malformed id, no token, token refused, token read-only or without the scope, namespace of
    somebody else, repository public although private was asked for, no connection.
    """
    namespace = _namespace(repo_id)
    client = api(endpoint)
    with _explained(f"{repo_id}: cannot publish", client.endpoint):
        who = client.whoami()
        _check_member(who, namespace, client.endpoint)
        found = _existing(client, repo_id)
        if found is None:
            _check_may_create(who, namespace, client.endpoint)
            return
        client.auth_check(repo_id, write=True)
    if private and found == "public":
        raise PublishError(
            f"{repo_id}: the repository exists and is public, but a private push was asked for, and a push changes "
            "nobody's access; choose another repo id, make it private in its settings on the Hub, or push as public"
        )


def push(
    folder: Path, repo_id: str, *, private: bool = True, progress: Progress | None = None, endpoint: str | None = None
) -> str:
    """Upload the files of `plan_push(folder)` to `repo_id` in one commit; returns the URL of that commit.

    private: visibility of the repository if this push creates it; an existing one keeps its own.
    progress: see `Progress`; without it, the client's own bars show on a terminal.
    Weight files of an earlier push that this folder does not have are removed in the same commit.
    If nothing changed since the last push, no commit is made and the URL is that of the last one.
    Raises PublishError as `plan_push` and `check_rights` do, and if the upload fails; `folder` is intact in every case,
    and the same call continues.
    """
    uploads = plan_push(folder)
    check_rights(repo_id, private=private, endpoint=endpoint)
    client = api(endpoint)
    remedy = f"; {folder} is intact: the same command continues the upload and does not send finished files again"
    with _explained(f"{repo_id}: the upload stopped", client.endpoint, remedy), ExitStack() as stack:
        if progress is not None or not sys.stderr.isatty():
            from huggingface_hub.utils.tqdm import disable_progress_bars

            stack.enter_context(disable_progress_bars())
        client.create_repo(repo_id, private=private, exist_ok=True)
        return _upload(client, repo_id, folder, uploads, progress, stack)


def _upload(
    client: "HfApi", repo_id: str, folder: Path, uploads: list[Upload], progress: Progress | None, stack: ExitStack
) -> str:
    """Send the weights file by file, then everything in one commit; opened files are closed by `stack`.

    File by file, because each one is then complete on the server before the next begins, whatever the transport.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    report = progress or (lambda done, total: None)
    xet = _offers_xet(client, repo_id)
    total, done = sum(upload.bytes for upload in uploads), 0
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    mine = {upload.path for upload in uploads}
    for sibling in client.model_info(repo_id).siblings or ():  # shards of an earlier result with another number of them
        if WEIGHTS.fullmatch(sibling.rfilename) and sibling.rfilename not in mine:
            operations.append(CommitOperationDelete(sibling.rfilename))
    for upload in uploads:
        path = folder / upload.path
        # The client takes Xet for every path, but git-LFS for open files: so a server without Xet gets open files.
        source = path if xet else stack.enter_context(path.open("rb"))
        operation = CommitOperationAdd(upload.path, source)
        operations.append(operation)
        if path.suffix == ".safetensors":
            client.preupload_lfs_files(repo_id, additions=[operation])
            done += upload.bytes
            report(done, total)
    commit = client.create_commit(repo_id, operations, commit_message=f"Upload {folder.resolve().name}")
    report(total, total)
    return str(commit.commit_url)


def _offers_xet(client: "HfApi", repo_id: str) -> bool:
    """Whether the server hands out tokens for Xet storage; a server that does not know the route answers 404."""
    from huggingface_hub import get_session, get_token, hf_raise_for_status

    url = f"{client.endpoint}/api/models/{repo_id}/xet-write-token/main"
    answer = get_session().get(url, headers={"authorization": f"Bearer {get_token()}"})
    if answer.status_code == 404:
        return False
    hf_raise_for_status(answer)
    return True


def _left_behind(path: str) -> bool:
    """Whether a part of `path` is hidden, temporary or unfinished."""
    return any(fnmatch(part, pattern) for part in path.split("/") for pattern in NEVER_UPLOADED)


def _check_complete(folder: Path, paths: set[str]) -> None:
    """Raise PublishError unless `paths` are a whole checkpoint in `folder`."""
    missing = [name for name in REQUIRED if name not in paths]
    if not any("/" not in path and path.endswith(".safetensors") for path in paths):
        missing.append("a .safetensors file")
    if missing:
        raise PublishError(
            f"{folder}: incomplete, {' and '.join(missing)} is missing; expected the output folder of a finished run"
        )
    named = _named_by_index(folder) if INDEX in paths else {"model.safetensors"}
    if absent := sorted(named - paths):
        raise PublishError(
            f"{folder}: incomplete, {', '.join(absent)} is missing although "
            f"{INDEX + ' names it' if INDEX in paths else 'there is no ' + INDEX}; run the recipe again"
        )
    for name in sorted(named):
        _check_weights(folder / name)


def _named_by_index(folder: Path) -> set[str]:
    """The weight files that the index names."""
    try:
        return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise PublishError(f"{folder / INDEX}: not a safetensors index ({exc}); expected a weight_map") from exc


def _check_weights(path: Path) -> None:
    """Raise PublishError if the header of a safetensors file does not fit its size; tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return
    except SafetensorError as exc:
        raise PublishError(f"{path}: not a whole safetensors file ({exc}); run the recipe again") from exc


def _namespace(repo_id: str) -> str:
    """The owner in `namespace/name`; the client alone would also take a bare name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    example = "expected namespace/name, such as your-name/SmolLM2-135M-w4"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as exc:
        raise PublishError(f"{repo_id!r}: not a repository id ({exc}); {example}") from exc
    namespace, slash, _ = repo_id.partition("/")
    if not slash:
        raise PublishError(f"{repo_id!r}: not a full repository id, the namespace is missing; {example}")
    return namespace


def _existing(client: "HfApi", repo_id: str) -> str | None:
    """ "public" or "private", or None if there is no such repository (or none that the token can see)."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return "private" if client.model_info(repo_id).private else "public"
    except GatedRepoError:
        return "public"
    except RepositoryNotFoundError:
        return None


def _check_member(who: dict[str, Any], namespace: str, endpoint: str) -> None:
    """Raise PublishError unless the answer of whoami gives write access to `namespace` in principle."""
    name = who["name"]
    roles = {org["name"].casefold(): org.get("roleInOrg") for org in who.get("orgs", [])}
    if namespace.casefold() not in {name.casefold(), *roles}:
        orgs = ", ".join(org["name"] for org in who.get("orgs", [])) or "none"
        raise PublishError(
            f"cannot publish in {namespace!r}: the token belongs to {name!r}, who is not a member "
            f"(organizations: {orgs}); use {name}/... as the repo id, or the token of a member"
        )
    if roles.get(namespace.casefold()) in ("read", "no_access"):
        raise PublishError(
            f"cannot publish in {namespace!r}: {name!r} may only read there; ask an admin of the organization for the "
            f"role 'contributor' or 'write', or use {name}/... as the repo id"
        )
    if _token(who).get("role") == "read":
        remedy = WRITE_TOKEN.format(endpoint=endpoint)
        raise PublishError(f"cannot publish in {namespace!r}: the token is read-only; {remedy}")


def _check_may_create(who: dict[str, Any], namespace: str, endpoint: str) -> None:
    """Raise PublishError if a fine-grained token lacks the permission to create repositories in `namespace`."""
    if _token(who).get("role") != "fineGrained":
        return
    scopes = _token(who).get("fineGrained", {}).get("scoped", [])
    for scope in scopes:
        entity = scope["entity"]
        covered = entity.get("type") in ("user", "org") and entity.get("name", "").casefold() == namespace.casefold()
        if covered and "repo.write" in scope["permissions"]:
            return
    raise PublishError(
        f"cannot create a repository in {namespace!r}: the fine-grained token has no write permission on its "
        f"repositories; tick it at {endpoint}/settings/tokens, or create the repository by hand and give the token "
        "write access to it"
    )


def _token(who: dict[str, Any]) -> dict[str, Any]:
    """What whoami says about the token itself; empty for logins that are not access tokens."""
    token: dict[str, Any] = (who.get("auth") or {}).get("accessToken") or {}
    return token


@contextmanager
def _explained(what: str, endpoint: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever the Hub, the network or the client raises into one PublishError that says what to do."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as exc:
        raise PublishError(f"{what}: {_reason(exc, endpoint)}{remedy}") from exc


def _reason(exc: BaseException, endpoint: str) -> str:
    """What happened and what to try, in one line."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    # The client wraps the error of an upload in a RuntimeError that only names the file.
    while type(exc) is RuntimeError and exc.__cause__ is not None:
        exc = exc.__cause__
    if isinstance(exc, LocalTokenNotFoundError):
        return f"no token found; {WRITE_TOKEN.format(endpoint=endpoint)}"
    if isinstance(exc, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    if isinstance(exc, HfHubHTTPError):
        return _answer(exc.response.status_code, exc.server_message or str(exc).strip().splitlines()[0], endpoint)
    if isinstance(exc, (HTTPError, ConnectionError)):
        return f"no connection to {endpoint}, or it broke ({_line(exc)}); check the network and HF_ENDPOINT"
    return _line(exc)


def _answer(status: int, message: str, endpoint: str) -> str:
    """The refusal of a server: HTTP status, its own words, what to try."""
    message = " ".join(message.split())
    if status == 401:
        return f"{endpoint} refused the token (401: {message}); {WRITE_TOKEN.format(endpoint=endpoint)}"
    if status == 403:
        return f"the token may not write here (403: {message}); {WRITE_TOKEN.format(endpoint=endpoint)}"
    if status == 429:
        return f"{endpoint} asks for patience (429: {message}); try again in some minutes"
    return f"{endpoint} answered {status}: {message}"


def _line(exc: BaseException) -> str:
    """Type and text of an error in one line."""
    return f"{type(exc).__name__}: {' '.join(str(exc).split())}"
