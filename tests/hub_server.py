"""A model hub on 127.0.0.1 for tests: what the real huggingface_hub client asks for, answered from memory.

    with HubServer() as hub:
        hub.add_user("hf_token", "me")
        commit = hub.add_repo("me/model", folder)      # again with the same id: one more commit
        snapshot_download("me/model", endpoint=hub.url, token="hf_token")
        assert hub.files("me/model") == {"config.json": b"..."}

Uploads: whoami-v2, repos/create, auth-check/write, validate-yaml, preupload, LFS batch with basic or multipart PUTs
(contents are checked against their sha256), verify, commit. Downloads: model info, tree, paths-info, resolve with ETag,
X-Repo-Commit and Range. Private, gated and missing repositories are refused with the Hub's codes (X-Error-Code). There
is no Xet storage; with `hub.offers_xet` the server claims one, at a port where nobody answers. `hub.requests` lists
what was asked, `hub.stored` the blobs that arrived whole, in order, and `hub.served` counts the bytes that went out by
file.

Faults: `hub.cut_after = n` breaks the connection after n bytes of every LFS PUT, `hub.cut_download_after = n` after n
bytes of the next file that is longer; `hub.fail = {"/commit/": 500}` answers paths that contain the key with that
status; `hub.part_bytes = n` asks for multipart uploads with parts of n bytes.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
ANONYMOUS = None


@dataclass(frozen=True)
class User:
    """The owner of a token, whose own `role` is "write", "read" or, with the permissions in `scoped`, "fineGrained"."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)  # name: role in the organization
    scoped: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (entity type, entity name): permissions

    def may_write(self, repo_id: str) -> bool:
        namespace = repo_id.partition("/")[0]
        if self.role == "fineGrained":
            entities = [("user", namespace), ("org", namespace), ("model", repo_id)]
            return any("repo.write" in self.scoped.get(entity, []) for entity in entities)
        member = namespace == self.name or self.orgs.get(namespace) in ("admin", "write", "contributor")
        return self.role == "write" and member

    def whoami(self) -> dict[str, Any]:
        scoped = [{"entity": {"type": t, "name": n}, "permissions": p} for (t, n), p in self.scoped.items()]
        fine = {"fineGrained": {"canReadGatedRepos": True, "global": [], "scoped": scoped}}
        token = {"displayName": "test", "role": self.role} | (fine if self.role == "fineGrained" else {})
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": self.name, "name": self.name, "orgs": orgs, "auth": auth}


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_sha(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha

    def describe(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.git_sha} | lfs


@dataclass
class Repo:
    """A model repository: its commits by sha, oldest first; the last one is `main`."""

    private: bool
    gated: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def commit(self, files: dict[str, File]) -> str:
        content = f"{len(self.commits)}" + "".join(f"{path} {file.git_sha}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def head(self) -> str:
        return next(reversed(self.commits))


class HubServer:
    """The server and everything it knows; a context manager that serves from a thread."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.stored: list[str] = []
        self.served: Counter[str] = Counter()
        self.cut_after: int | None = None
        self.cut_download_after: int | None = None
        self.part_bytes: int | None = None
        self.offers_xet = False
        self.fail: dict[str, int] = {}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def add_user(self, token: str, name: str, **details: Any) -> None:
        """Make `token` known; details: the fields of `User`."""
        self.users[token] = User(name, **details)

    def add_repo(self, repo_id: str, folder: Path, gated: bool = False, private: bool = False) -> str:
        """Commit the files of `folder`, alone, to a new or existing repository; returns the commit's sha."""
        repo = self.repos.setdefault(repo_id, Repo(private, gated))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {p.relative_to(folder).as_posix(): File(p.read_bytes(), p.suffix in LFS_SUFFIXES) for p in paths}
        return repo.commit(files)

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Path and contents of every file on `main`, .gitattributes aside."""
        repo = self.repos[repo_id]
        return {path: f.data for path, f in repo.commits[repo.head].items() if path != ".gitattributes"}

    def asked(self, method: str, part: str) -> int:
        """How many requests with this method had `part` in their path."""
        return sum(part in path for asked, path in self.requests if asked == method)


def front_matter(card: str) -> Any:
    """The YAML between the first two lines of dashes; raises yaml.YAMLError."""
    return yaml.safe_load(card.partition("---\n")[2].partition("\n---")[0])


class RefusedError(Exception):
    """An answer that is an error: HTTP status, the Hub's X-Error-Code, a message."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Handler(BaseHTTPRequestHandler):
    """One connection. A route method takes the groups of its pattern and answers, or raises RefusedError."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds that an idle connection is kept
    wbufsize = -1  # one packet for head and body: sent apart, they would wait 40 ms for each other

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""

    def dispatch(self) -> None:
        target = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, target))
        body = self.read_body()
        if body is None:
            return
        self.body = body
        try:
            for part, status in self.hub.fail.items():
                if part in target:
                    raise RefusedError(status, "asked to fail")
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, target)
                if match and method == self.command.replace("HEAD", "GET"):
                    return route(self, **match.groupdict())
            raise RefusedError(404, f"no such route: {self.command} {target}")
        except RefusedError as exc:
            code = {"X-Error-Code": exc.code} if exc.code else {}
            self.answer({"error": str(exc)}, exc.status, {"X-Error-Message": str(exc)} | code | exc.headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def read_body(self) -> bytes | None:
        """The whole request body, or None where the connection was cut on purpose."""
        length = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and self.hub.cut_after is not None:
            self.rfile.read(min(length, self.hub.cut_after))
            self.close_connection = True
            return None
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        always = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        for name, value in (always | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and what they may see

    def user(self) -> User | None:
        """The owner of the token, or None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return ANONYMOUS
        if token not in self.hub.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def writer(self, repo_id: str) -> Repo:
        """The repository, for somebody who may write to it."""
        repo, user = self.reader(repo_id), self.user()
        if user is None or not user.may_write(repo_id):
            raise RefusedError(403, f"You don't have write access to {repo_id}")
        return repo

    def reader(self, repo_id: str) -> Repo:
        """The repository, for somebody who may know that it exists; the Hub hides private ones behind a 404 or 401."""
        user, repo = self.user(), self.hub.repos.get(repo_id)
        owner = repo_id.partition("/")[0]
        member = user is not None and (user.name == owner or owner in user.orgs)
        if repo is None or (repo.private and not member):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        """The sha that `revision` (main, or a sha) stands for."""
        if revision == "main":
            return repo.head
        if revision not in repo.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision

    # Uploading

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        self.answer(user.whoami())

    def create(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        repo_id = f"{wanted['organization'] or (user.name if user else '')}/{wanted['name']}"
        if user is None or not user.may_write(repo_id):
            raise RefusedError(403, f"You don't have the rights to create a model under {repo_id.partition('/')[0]}")
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.answer({"error": "You already created this model repo"} | answer, 409)
        self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private", gated=False)
        self.hub.repos[repo_id].commit({".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        self.answer(answer)

    def auth_check(self, repo: str) -> None:
        self.writer(repo)
        self.answer({})

    def validate_yaml(self) -> None:
        try:
            front_matter(json.loads(self.body)["content"])
        except yaml.YAMLError:
            return self.answer({"errors": [{"message": "front matter is not YAML"}], "warnings": []}, 400)
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        found = self.writer(repo)
        known = found.commits[self.commit_of(found, revision)]
        answers = []
        for asked in json.loads(self.body)["files"]:
            assert len(base64.b64decode(asked["sample"])) == min(asked["size"], 512)
            mode = "lfs" if asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > 10 * 2**20 else "regular"
            old = known.get(asked["path"])
            oid = {"oid": old.etag} if old else {}
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        self.answer({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.writer(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            here = f"{self.hub.url}/lfs/{wanted['oid']}"
            upload: dict[str, Any] = {"href": here}
            if size := self.hub.part_bytes:
                count = -(-wanted["size"] // size)
                parts = {f"{n:05d}": f"{here}/part/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{here}/complete", "header": {"chunk_size": str(size)} | parts}
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
            known = wanted["oid"] in self.hub.blobs
            objects.append(wanted | ({} if known else {"actions": {"upload": upload, "verify": verify}}))
        self.answer({"transfer": "multipart" if self.hub.part_bytes else "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        self.store(oid, self.body)

    def lfs_part(self, oid: str, part: str) -> None:
        self.hub.parts[oid, int(part)] = self.body
        self.answer({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.store(oid, b"".join(self.hub.parts[oid, number] for number in numbers))

    def store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, "contents do not have the announced sha256")
        with self.hub.lock:
            self.hub.blobs[oid] = data
            self.hub.stored.append(oid)
        self.answer({})

    def lfs_verify(self, repo: str) -> None:
        self.writer(repo)
        wanted = json.loads(self.body)
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusedError(404, "object is not here")
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        found = self.writer(repo)
        files = dict(found.commits[self.commit_of(found, revision)])
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise RefusedError(400, "the first line of a commit is its header, with a summary")
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
                continue
            files[value["path"]] = self.committed(operation["key"], value)
        with self.hub.lock:
            sha = found.commit(files)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def committed(self, key: str, value: dict[str, Any]) -> File:
        """The file that one line of a commit adds."""
        if key == "file" and value["encoding"] == "base64":
            return File(base64.b64decode(value["content"]), lfs=False)
        if key != "lfsFile" or len(self.hub.blobs.get(value["oid"], b"")) != value["size"]:
            raise RefusedError(400, f"{key}: not an operation of this server, or its blob was never uploaded")
        return File(self.hub.blobs[value["oid"]], lfs=True)

    def xet_token(self, repo: str) -> None:
        self.writer(repo)
        if not self.hub.offers_xet:
            raise RefusedError(404, "Sorry, we can't find the page you are looking for.")
        nobody = "http://127.0.0.1:9"
        token = {"X-Xet-Cas-Url": nobody, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(2**32)}
        self.answer({"casUrl": nobody, "accessToken": "xet", "exp": 2**32}, headers=token)

    # Downloading

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self.reader(repo)
        sha = self.commit_of(found, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(found.commits[sha])]
        access = {"private": found.private, "gated": "manual" if found.gated else False}
        card = found.commits[sha].get("README.md")
        data = {"cardData": front_matter(card.data.decode())} if card else {}
        self.answer({"id": repo, "sha": sha, "tags": [], "siblings": siblings} | access | data)

    def tree(self, repo: str, revision: str, path: str | None = None) -> None:
        found = self.reader(repo)
        files = found.commits[self.commit_of(found, revision)]
        prefix = f"{path}/" if path else ""
        self.answer([file.describe(name) for name, file in sorted(files.items()) if name.startswith(prefix)])

    def paths_info(self, repo: str, revision: str) -> None:
        found = self.reader(repo)
        files = found.commits[self.commit_of(found, revision)]
        wanted = json.loads(self.body)["paths"]
        self.answer([files[path].describe(path) for path in wanted if path in files])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found, user = self.reader(repo), self.user()
        if found.gated and (user is None or user.name != repo.partition("/")[0]):
            message = f"Access to model {repo} is restricted and you are not in the authorized list."
            raise RefusedError(403 if user else 401, message, "GatedRepo")
        sha = self.commit_of(found, revision)
        if path not in found.commits[sha]:
            raise RefusedError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        file = found.commits[sha][path]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.serve(path, file.data, 200, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(file.data)), len(file.data) - 1)
        if first > last:
            raise RefusedError(416, "range is beyond the file", None, **{"Content-Range": f"bytes */{len(file.data)}"})
        span = {"Content-Range": f"bytes {first}-{last}/{len(file.data)}"}
        self.serve(path, file.data[first : last + 1], 206, headers | span)

    def serve(self, path: str, data: bytes, status: int, headers: dict[str, str]) -> None:
        """Answer with a part of a file, or less if the line is to break."""
        limit = self.hub.cut_download_after
        if self.command == "GET" and limit is not None and len(data) > limit:
            self.hub.cut_download_after = None
            self.close_connection = True
            headers, data = headers | {"Content-Length": str(len(data))}, data[:limit]
        if self.command == "GET":
            self.hub.served[path] += len(data)
        self.answer(data, status, headers)


REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = f"/api/models/{REPO}"
OID = r"/lfs/(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"{MODEL}/auth-check/write", Handler.auth_check),
    ("POST", rf"{MODEL}/preupload/(?P<revision>.+)", Handler.preupload),
    ("GET", rf"{MODEL}/xet-write-token/.+", Handler.xet_token),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", Handler.lfs_verify),
    ("PUT", OID, Handler.lfs_put),
    ("PUT", rf"{OID}/part/(?P<part>\d+)", Handler.lfs_part),
    ("POST", rf"{OID}/complete", Handler.lfs_complete),
    ("POST", rf"{MODEL}/commit/(?P<revision>.+)", Handler.commit),
    ("GET", MODEL, Handler.info),
    ("GET", rf"{MODEL}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"{MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{MODEL}/paths-info/(?P<revision>.+)", Handler.paths_info),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
