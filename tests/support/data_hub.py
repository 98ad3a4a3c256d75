"""The Hub's HTTP interface for data sets, on 127.0.0.1: what `datasets` asks of it to open one.

Source: the requests that datasets 5.2 makes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "a" * 40


class DataHub:
    """`with DataHub("org/name", files) as hub`: its address is `hub.url`, one data set being there at one revision."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                self.answer(unquote(parts.path), everything="recursive=true" in parts.query.split("&"))

            do_HEAD = do_POST = do_GET

            def answer(self, path: str, *, everything: bool) -> None:
                known = f"(main|{REVISION})"
                if re.fullmatch(rf"/api/datasets/{name}(/revision/{known})?", path):
                    about = {"id": name, "sha": REVISION, "siblings": [{"rfilename": file} for file in files]}
                    return self.give(200, {**about, "private": False, "gated": False, "tags": []})
                if match := re.fullmatch(rf"/api/datasets/{name}/tree/{known}(/(?P<folder>.+))?", path):
                    return self.give(200, tree(files, match["folder"], everything=everything))
                if match := re.fullmatch(rf"/datasets/{name}/resolve/{known}/(?P<file>.+)", path):
                    content = files.get(match["file"])
                    if content is None:
                        return self.give(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)
                    return self.give(200, content, X_Repo_Commit=REVISION, ETag=f'"{object_id(content)}"')
                found = path.startswith((f"/api/datasets/{name}/", f"/datasets/{name}/"))
                return self.give(404, {}, X_Error_Code="RevisionNotFound" if found else "RepoNotFound")

            def give(self, status: int, content: Any, **headers: str) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> DataHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def object_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree(files: dict[str, bytes], folder: str | None, *, everything: bool = False) -> list[dict[str, Any]]:
    """The files and folders directly in a folder, or at any depth."""
    start = f"{folder}/" if folder else ""
    inside = {path: content for path, content in files.items() if path.startswith(start)}
    folders = {path[: path.index("/", len(start))] for path in inside if "/" in path[len(start) :]}
    return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + [
        {"type": "file", "path": path, "oid": object_id(content), "size": len(content)}
        for path, content in inside.items()
        if everything or "/" not in path[len(start) :]
    ]
