"""A Hub on this machine, of the standard library, for an unmodified huggingface_hub: repositories with branches, pull
requests and LFS objects in memory, a record of every request, and faults on demand.

The client is pointed at it before it is imported: HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET=1, HF_HUB_OFFLINE=0.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# What a fault does to a request.
CUTS = {
    "refuse": "the connection closes before the request is read",
    "cut-request": "the connection closes when half of the request's body has arrived",
    "lose-answer": "the request is carried out, and the connection closes before the answer",
    "cut-answer": "the request is carried out, and the connection closes in the middle of the answer",
    "corrupt": "one byte of the request's body arrives changed",
    "slow": "the answer takes 0.3 s",
}


@dataclass
class Fault:
    """What happens to the requests that match, `times` times.

    Args:
        kind: a status from 400, or one of `CUTS`.
        method, path: regular expression that the method and the path are searched for.
        headers: of the answer, where kind is a status.
        say: the message of the answer, where kind is a status.
    """

    kind: int | str
    path: str = ""
    method: str = ""
    times: int = 1
    headers: dict = field(default_factory=dict)
    say: str = "made to fail"


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its content, and whether it is kept as an LFS object."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        stored = self.content
        if self.lfs:
            stored = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(), len(self.content),
            )  # fmt: skip
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


@dataclass
class Repository:
    """Files by commit, commits by branch."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, reference: str, files: dict[str, Blob], message: str) -> str:
        parent = self.references.get(reference, "")
        text = json.dumps([parent, reference, message, sorted((name, blob.oid) for name, blob in files.items())])
        sha = hashlib.sha1(f"{text}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.messages[sha] = files, message
        self.references[reference] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a pull request or a commit's own name."""
        return self.references.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {name: blob.content for name, blob in self.commits[self.find(revision)].items()}


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, say: str, code: str | None = None, **headers):
        super().__init__(say)
        self.status, self.say, self.code, self.headers = status, say, code, headers


class HubServer:
    """The Hub. `tokens` are the users that may write under their own name, `readers` those that may only read.

    Use it as a context manager; `repositories`, `requests` and `faults` may be read and changed at any time.
    """

    def __init__(self, tokens: dict[str, str], readers: dict[str, str] | None = None):
        self.tokens, self.readers = tokens, readers or {}
        self.lock = threading.RLock()
        self.repositories: dict[str, Repository] = {}
        # (method, path, bytes of the body, status or the cut)
        self.requests: list[tuple[str, str, int, int | str]] = []
        self.faults: list[Fault] = []
        # Asked for every request that no fault matches, with its number since `begin`.
        self.plan: Callable[[int, str, str], int | str | None] | None = None
        self.count = 0
        server = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), server)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # What a client must find in its environment before it is imported.
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def begin(self, *, plan=None) -> None:
        """Forgets repositories, requests and faults."""
        with self.lock:
            self.repositories, self.requests, self.faults, self.plan, self.count = {}, [], [], plan, 0

    def fault(self, kind: int | str, path: str = "", method: str = "", **options) -> None:
        if isinstance(kind, str) and kind not in CUTS:
            raise ValueError(f"kind is {kind!r}; choose a status or one of {', '.join(CUTS)}")
        self.faults.append(Fault(kind, path, method, **options))

    def sent(self, path: str, method: str = "") -> list[tuple[str, str, int, int | str]]:
        """The requests whose path and method match."""
        return [row for row in self.requests if re.search(path, row[1]) and re.search(method, row[0])]

    def create(self, repo_id: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        """A repository as the Hub makes it: one commit with .gitattributes, and whatever else is given."""
        repository = Repository(private)
        blobs = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        blobs |= {name: Blob(content, name.endswith(".safetensors")) for name, content in (files or {}).items()}
        repository.commit("main", blobs, "initial commit")
        repository.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
        self.repositories[repo_id] = repository
        return repository

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            number, self.count = self.count, self.count + 1
            for fault in self.faults:
                if fault.times and re.search(fault.path, path) and re.search(fault.method, method):
                    fault.times -= 1
                    return fault
            kind = self.plan(number, method, path) if self.plan is not None else None
            return None if kind is None else Fault(kind)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer in one piece, at once: else it waits for the acknowledgement of its headers.
    wbufsize, disable_nagle_algorithm = -1, True
    hub: HubServer

    def log_message(self, *words):
        pass

    def do_GET(self):
        address = urlsplit(self.path)
        self.where, self.query = unquote(address.path), parse_qs(address.query)
        fault = self.hub.next_fault(self.command, self.where)
        kind = fault.kind if fault is not None else None
        if kind == "refuse":
            return self._cut(0, kind)
        body = self._body(half=kind == "cut-request")
        if kind == "cut-request":
            return self._cut(len(body), kind)
        if kind == "corrupt" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if kind == "slow":
            time.sleep(0.3)
        if isinstance(kind, int):
            return self._answer(kind, {"error": fault.say}, {"X-Error-Message": fault.say, **fault.headers}, len(body))
        try:
            with self.hub.lock:
                status, content, headers = self._route(body)
        except Refused as refused:
            status, content, headers = refused.status, {"error": refused.say}, {"X-Error-Message": refused.say}
            headers |= refused.headers | ({"X-Error-Code": refused.code} if refused.code else {})
        if kind == "lose-answer":
            return self._cut(len(body), kind)
        self._answer(status, content, headers, len(body), half=kind == "cut-answer")

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _body(self, *, half: bool) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    return b"".join(parts)
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if half else length)

    def _cut(self, received: int, kind: str) -> None:
        self.hub.requests.append((self.command, self.where, received, kind))
        self.close_connection = True
        with suppress(OSError):
            # Nothing is delivered any more, as when a cable is pulled.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _answer(self, status: int, content, headers: dict, received: int, *, half: bool = False) -> None:
        self.hub.requests.append((self.command, self.where, received, "cut-answer" if half else status))
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        if half:
            self.close_connection = True
        with suppress(OSError):
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text[: len(text) // 2] if half else text)
            self.wfile.flush()

    # What the Hub knows: each returns a status, a content and headers.

    def _route(self, body: bytes):
        path, method = self.where, self.command
        for pattern, allowed, function in _ROUTES:
            if (found := re.fullmatch(pattern, path)) and method in allowed:
                return function(self, body, *found.groups())
        raise Refused(404, f"no such address: {method} {path}")

    def _user(self, *, writes: str | None = None) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user = self.hub.tokens.get(token) or self.hub.readers.get(token)
        if token and user is None:
            # As some servers do, the answer repeats what was sent.
            raise Refused(401, f"Invalid credentials in Authorization header: {token}")
        if writes is not None and (user is None or token in self.hub.readers or writes.partition("/")[0] != user):
            raise Refused(403 if user else 401, f"{user} may not write to {writes}")
        return user

    def _repository(self, repo_id: str, *, write: bool = False) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.partition("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._user(writes=repo_id)
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        if (sha := repository.find(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def whoami(self, body):
        if (user := self._user()) is None:
            raise Refused(401, "not logged in")
        return 200, {"type": "user", "name": user, "orgs": []}, {}

    def create(self, body):
        values = json.loads(body)
        user = self._user()
        repo_id = f"{values.get('organization') or user}/{values['name']}"
        self._user(writes=repo_id)
        place = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return 409, {**place, "error": "You already created this model repo"}, {}
        self.hub.create(repo_id, private=values.get("visibility") == "private")
        return 200, place, {}

    def info(self, body, repo_id, revision=None):
        repository = self._repository(repo_id)
        sha = self._commit_of(repository, revision or "main")
        with_blobs = "blobs" in self.query
        siblings = [
            {"rfilename": name}
            | ({"size": len(blob.content), "blobId": blob.oid} if with_blobs else {})
            | ({"lfs": {"size": len(blob.content), "sha256": blob.sha256, "pointerSize": 134}}
               if with_blobs and blob.lfs else {})
            for name, blob in sorted(repository.commits[sha].items())
        ]  # fmt: skip
        return 200, {
            "id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "siblings": siblings,
            "tags": [], "downloads": 0, "likes": 0,
        }, {}  # fmt: skip

    def references(self, body, repo_id):
        repository = self._repository(repo_id)
        rows = {
            kind: [
                {
                    "name": name.removeprefix("refs/"),
                    "ref": name if kind else f"refs/heads/{name}",
                    "targetCommit": sha,
                }
                for name, sha in repository.references.items()
                if name.startswith("refs/pr/") == kind
            ]
            for kind in (False, True)
        }
        return 200, {"branches": rows[False], "converts": [], "tags": [], "pullRequests": rows[True]}, {}

    def tree(self, body, repo_id, revision, folder=None):
        repository = self._repository(repo_id)
        files = repository.commits[self._commit_of(repository, revision)]
        return 200, [
            {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
            | ({"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else {})
            for name, blob in sorted(files.items())
            if folder is None or name.startswith(f"{folder}/")
        ], {}  # fmt: skip

    def preupload(self, body, repo_id, revision):
        repository = self._repository(repo_id, write="create_pr" not in self.query)
        files = repository.commits[self._commit_of(repository, revision)]
        ignored = files[".gitignore"].content.decode().split() if ".gitignore" in files else []
        rows = []
        for row in json.loads(body)["files"]:
            name = row["path"]
            lfs = name.endswith(".safetensors") or row["size"] > 2**20
            there = files.get(name)
            rows.append({
                "path": name, "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": any(fnmatchcase(name, pattern) for pattern in ignored),
                "oid": None if there is None else there.sha256 if there.lfs else there.oid,
            })  # fmt: skip
        return 200, {"files": rows}, {}

    def lfs_batch(self, body, repo_id):
        repository = self._repository(repo_id)
        values = json.loads(body)
        if (name := values.get("ref", {}).get("name")) is not None:
            self._user(writes=repo_id)
            self._commit_of(repository, name)
        objects = []
        for row in values["objects"]:
            if row["oid"] not in repository.objects:
                row = row | {"actions": {
                    "upload": {"href": f"{self.hub.url}/lfs/{repo_id}/{row['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{repo_id}/lfs/verify"},
                }}  # fmt: skip
            objects.append(row)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, body, repo_id, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, f"the checksum of what arrived is not {oid}")
        self.hub.repositories[repo_id].objects[oid] = body
        return 200, {}, {}

    def lfs_verify(self, body, repo_id):
        values = json.loads(body)
        stored = self._repository(repo_id).objects.get(values["oid"])
        if stored is None or len(stored) != values["size"]:
            raise Refused(404, f"object {values['oid']} is not here")
        return 200, {}, {}

    def commit(self, body, repo_id, revision):
        as_request = "create_pr" in self.query
        repository = self._repository(repo_id, write=not as_request)
        if self._user() is None:
            raise Refused(401, "not logged in")
        head = self._commit_of(repository, revision)
        rows = [json.loads(line) for line in body.splitlines()]
        header, files = rows[0]["value"], dict(repository.commits[head])
        if header.get("parentCommit") not in (None, head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for row in rows[1:]:
            value = row["value"]
            name = value["path"]
            if row["key"] == "deletedFile":
                if files.pop(name, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            elif row["key"] == "lfsFile":
                if (content := repository.objects.get(value["oid"])) is None:
                    raise Refused(400, f"{name} points to an LFS object that was not uploaded")
                files[name] = Blob(content, True)
            else:
                files[name] = Blob(base64.b64decode(value["content"]), False)
        if as_request:
            number = sum(name.startswith("refs/pr/") for name in repository.references) + 1
            revision = f"refs/pr/{number}"
            repository.references[revision] = head
        sha = repository.commit(revision, files, header["summary"])
        place = f"{self.hub.url}/{repo_id}"
        request = {"pullRequestUrl": f"{place}/discussions/{number}"} if as_request else {}
        return 200, {"success": True, "commitUrl": f"{place}/commit/{sha}", "commitOid": sha, **request}, {}

    def branch(self, body, repo_id, name):
        repository = self._repository(repo_id, write=True)
        if name in repository.references:
            raise Refused(409, f"Reference {name} already exists")
        repository.references[name] = self._commit_of(
            repository, json.loads(body or b"{}").get("startingPoint", "main")
        )
        return 200, {}, {}

    def validate_yaml(self, body):
        if not json.loads(body)["content"].startswith("---\n"):
            return 400, {"errors": [{"message": "no metadata"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def resolve(self, body, repo_id, revision, name):
        repository = self._repository(repo_id)
        sha = self._commit_of(repository, revision)
        blob = repository.commits[sha].get(name)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        tag = f'"{blob.sha256 if blob.lfs else blob.oid}"'
        headers = {"ETag": tag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": tag, "X-Linked-Size": str(len(blob.content))}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), int(part[2] or len(blob.content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.content)}"
            return 206, blob.content[first : last + 1], headers
        return 200, blob.content, headers


_ID = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (r"/api/validate-yaml", ("POST",), _Handler.validate_yaml),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (rf"/api/models/{_ID}", ("GET",), _Handler.info),
    (rf"/api/models/{_ID}/revision/(.+)", ("GET",), _Handler.info),
    (rf"/api/models/{_ID}/refs", ("GET",), _Handler.references),
    (rf"/api/models/{_ID}/tree/(refs/pr/\d+|[^/]+)(?:/(.+))?", ("GET",), _Handler.tree),
    (rf"/api/models/{_ID}/preupload/(.+)", ("POST",), _Handler.preupload),
    (rf"/api/models/{_ID}/commit/(.+)", ("POST",), _Handler.commit),
    (rf"/api/models/{_ID}/branch/(.+)", ("POST",), _Handler.branch),
    (rf"/lfs/{_ID}/([0-9a-f]{{64}})", ("PUT",), _Handler.lfs_put),
    (rf"/{_ID}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (rf"/{_ID}/lfs/verify", ("POST",), _Handler.lfs_verify),
    (rf"/{_ID}/resolve/(refs/pr/\d+|[^/]+)/(.+)", ("GET", "HEAD"), _Handler.resolve),
]
