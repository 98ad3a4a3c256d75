"""Call an ASGI application in this process, as a server would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    app: Any,
    method: str,
    address: str,
    body: bytes | Iterable[bytes | None] = b"",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Return the answer to a request. Of a body in parts, `None` is one that never arrives."""
    path, _, query = address.partition("?")
    parts = [body] if isinstance(body, bytes) else list(body)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        part = parts.pop(0) if parts else b""
        if part is None:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    start, *rest = sent
    found = {k.decode(): v.decode() for k, v in start["headers"]}
    return Answer(start["status"], found, b"".join(m.get("body", b"") for m in rest))


def form(fields: Iterable[tuple[str, bytes, str | None]]) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a form of (name, value, file name)."""
    lines = b""
    for name, value, file in fields:
        of = f'; filename="{file}"' if file is not None else ""
        lines += f'--edge\r\nContent-Disposition: form-data; name="{name}"{of}\r\n\r\n'.encode() + value + b"\r\n"
    return lines + b"--edge--\r\n", {"content-type": "multipart/form-data; boundary=edge"}
