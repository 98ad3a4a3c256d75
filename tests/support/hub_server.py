"""The Hub's HTTP interface for models, on 127.0.0.1, with faults on demand: what push and download need of it.

Source: the requests that huggingface_hub 1.0 to 2.4 makes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".npz", ".png")  # what the Hub keeps as large files, by sha256
Fault = Literal["cut", "silence", "corrupt", "short", "503", "404", "slow"]


class Request(NamedTuple):
    method: str
    path: str
    token: str | None
    range: str | None


class Failure(NamedTuple):
    fault: Fault
    method: str


class Repo:
    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}

    def commit(self, files: Mapping[str, bytes | None], branch: str = "main") -> str:
        """Add a commit of files, in which `None` deletes one; return its hash."""
        changed = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        tree = {path: content for path, content in changed.items() if content is not None}
        sha = hashlib.sha1(repr((len(self.commits), sorted(tree))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        return sha


def object_id(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


CLIENTS_OWN = "/api/agent-harnesses"


class HubServer:
    """`with HubServer() as hub`: its address is `hub.url`.

    Attributes:
        repos: name -> repository; `hub.add("org/name", files)` makes one.
        closed: repositories that need the token "good"; gated: those that need consent.
        requests: all that was asked.
        hashless: answer with entity tags that are no hashes, as mirrors and proxies do.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.closed: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[Request] = []
        self.failures: dict[str, list[Failure]] = {}
        self.pause = threading.Event()
        self.hashless = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                Exchange(hub, self).answer()

            do_HEAD = do_POST = do_PUT = do_GET

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that goes away in the middle is part of the tests

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.pause.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: Mapping[str, bytes | None], branch: str = "main") -> str:
        return self.repos.setdefault(name, Repo()).commit(files, branch)

    def fail(self, path: str, fault: Fault, times: int = 1, method: str = "GET") -> None:
        """Answer the next `times` requests for a file with a fault."""
        self.failures.setdefault(path, []).extend([Failure(fault, method)] * times)

    def asked(self, method: str, end: str = "") -> list[Request]:
        """Return the requests, but not that for `CLIENTS_OWN`, which the client makes once a day by itself."""
        own = [r for r in self.requests if r.path != CLIENTS_OWN]
        return [r for r in own if r.method == method and r.path.endswith(end)]


class Exchange:
    """One request and its answer."""

    def __init__(self, hub: HubServer, http: BaseHTTPRequestHandler) -> None:
        self.hub, self.http = hub, http
        parts = urlsplit(http.path)
        self.path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self._read()
        bearer = http.headers.get("Authorization")
        self.token = None if bearer is None else bearer.removeprefix("Bearer ")
        hub.requests.append(Request(http.command, self.path, self.token, http.headers.get("Range")))

    def _read(self) -> bytes:
        if self.http.headers.get("Transfer-Encoding") != "chunked":
            return self.http.rfile.read(int(self.http.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.http.rfile.readline(), 16):
            body += self.http.rfile.read(size)
            self.http.rfile.readline()
        self.http.rfile.readline()
        return body

    def send(self, status: int, content: bytes | dict | list = b"", length: int | None = None, **headers: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.http.send_response(status)
        for key, value in headers.items():
            self.http.send_header(key.replace("_", "-"), str(value))
        self.http.send_header("Content-Length", str(len(data) if length is None else length))
        self.http.end_headers()
        if self.http.command != "HEAD":
            self.http.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def answer(self) -> None:
        repo, kind = r"(?P<repo>[^/]+/[^/]+)", "(?P<kind>models|spaces)"
        for pattern, method in (
            ("/api/repos/create", self.create),
            ("/api/validate-yaml", self.validate),
            (rf"/api/{kind}/{repo}/branch/(?P<branch>.+)", self.branch),
            (rf"/api/{kind}/{repo}/preupload/.+", self.preupload),
            (rf"/(?:(?P<kind>spaces)/)?{repo}\.git/info/lfs/objects/batch", self.batch),
            ("/lfs/(?P<oid>[0-9a-f]{64})", self.upload),
            (rf"/api/{kind}/{repo}/commit/(?P<revision>.+)", self.commit),
            (rf"/api/{kind}/{repo}/tree/(?P<revision>[^/]+)", self.tree),
            (rf"/{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, self.path):
                found = match.groupdict()
                if found.pop("kind", None) == "spaces":
                    found["repo"] = f"spaces/{found['repo']}"
                return None if self.forbidden(found.get("repo")) else method(**found)
        return self.refuse(404, "NotFound", f"no such page {self.path}")

    def forbidden(self, repo: str | None) -> bool:
        if repo in self.hub.closed and self.token != "good":
            self.refuse(401, "RepoNotFound", "Repository not found")  # the Hub does not say that it is there
            return True
        if repo in self.hub.gated:
            self.refuse(403, "GatedRepo", "Access to model is restricted")
            return True
        if repo is not None and repo not in self.hub.repos:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return True
        return False

    # ---------------------------------------------------------------- writing

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if wanted.get("type") == "space":
            if wanted.get("sdk") != "gradio":
                return self.refuse(400, "BadRequest", "a Space needs an sdk")
            name = f"spaces/{name}"
        if self.token == "bad":
            return self.refuse(403, "Forbidden", f"You don't have the rights to create a model under {name}")
        if self.token is None:
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        if name in self.hub.repos:
            return self.send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.closed.add(name)
        return self.send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate(self) -> None:
        card = json.loads(self.body)["content"]
        errors = [] if card.startswith("---\n") and "\nlicense: " in card else [{"message": '"license" is required'}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo].branches
        if branch in branches:
            return self.refuse(409, "Conflict", "Reference already exists")
        branches[branch] = branches["main"]
        return self.send(200, {})

    def preupload(self, repo: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"} for f in files]
        self.send(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "BadRequest", "the content has another sha256")
        self.hub.large[oid] = self.body
        return self.send(200)

    def commit(self, repo: str, revision: str) -> None:
        files: dict[str, bytes | None] = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
        request = "create_pr" in self.query
        sha = self.hub.add(repo, files, "refs/pr/1" if request else revision)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}
        if request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        self.send(200, answer)

    # ---------------------------------------------------------------- reading

    def tree(self, repo: str, revision: str) -> None:
        repository = self.hub.repos[repo]
        files = repository.commits[repository.branches[revision]]
        listed = [{"type": "file", "path": p, "size": len(c), "oid": object_id("", c)} for p, c in files.items()]
        self.send(200, listed, Content_Type="application/json")

    def resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self.hub.repos[repo]
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        fault = self.fault(path)
        if fault == "503":
            return self.refuse(503, "Busy", "The Hub is overloaded")
        if path not in repository.commits[sha] or fault == "404":
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = repository.commits[sha][path]
        oid = f"{len(content):x}-5e1f" if self.hub.hashless else object_id(path, content)
        headers: dict[str, Any] = {"X_Repo_Commit": sha, "ETag": f'"{oid}"', "Accept_Ranges": "bytes"}
        if path.endswith(LARGE):
            headers |= {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": len(content)}
        if self.http.command == "HEAD":
            return self.send(200, length=len(content), **headers)
        status, total = 200, len(content)
        if start := re.match(r"bytes=(\d+)-", self.http.headers.get("Range") or ""):
            status, content = 206, content[int(start[1]) :]
            headers["Content_Range"] = f"bytes {start[1]}-{total - 1}/{total}"
        if fault in ("cut", "silence"):
            self.send(status, content[: len(content) // 2] if fault == "cut" else b"", length=len(content), **headers)
            self.http.close_connection = True
            return None
        if fault == "slow":
            self.send(status, length=len(content), **headers)
            for part in range(0, len(content), 1 << 16):
                self.http.wfile.write(content[part : part + (1 << 16)])
                self.hub.pause.wait(0.05)
            return None
        if fault == "corrupt":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        return self.send(status, content[:-1] if fault == "short" else content, **headers)

    def fault(self, path: str) -> Fault | None:
        pending = self.hub.failures.get(path, [])
        if pending and pending[0].method == self.http.command:
            return pending.pop(0).fault
        return None
