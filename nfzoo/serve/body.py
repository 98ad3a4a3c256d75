"""What a client sends: an image, and how many labels it wants, from the body and the address of a request."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nfzoo.config import MAX_SIZE
from nfzoo.errors import NfzooError, nearest
from nfzoo.files import parse_json

if TYPE_CHECKING:
    from starlette.requests import Request

RAW = ("image/", "application/octet-stream")
"""Beginnings of the content types whose body is an image file; a request without a type counts as one."""

_FORM, _JSON = "multipart/form-data", "application/json"
_REMEDY = f"send an image file as image/jpeg or another image type, or {_FORM} or {_JSON}"
_FIELDS = ("image", "topk")


class Refused(NfzooError):
    """A request that is answered with an error; the message is for its client.

    Attributes:
        status: status code of HTTP.
        retry: seconds after which the client may try again, or `None`.
    """

    def __init__(self, status: int, message: str, *, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry


class Asked(NamedTuple):
    """The bytes of an image file, and the number of labels if one was given."""

    content: bytes
    topk: int | None


async def read_request(request: Request, most: int) -> Asked:
    """Read a request whose body has at most `most` bytes.

    The body is an image file, a form with a file `image`, or JSON with the file as base64 in `image`. The number of
    labels, `topk`, is a parameter of the address, a field of the form or a key of the JSON object.

    Raises:
        Refused: for what cannot be read, without having read more than `most` bytes.
    """
    kind = request.headers.get("content-type", RAW[1]).partition(";")[0].strip().lower()
    if kind not in (_FORM, _JSON) and not kind.startswith(RAW):
        raise Refused(415, f"a body of type {kind[:100]!r} is not read; {_REMEDY}")
    given = _unique(request.query_params.multi_items(), "parameter", ("topk",))
    body = await _body(request, most)
    if kind == _FORM:
        fields = _form(request.headers["content-type"], body)
    elif kind == _JSON:
        fields = _json(body)
    else:
        fields = {"image": body}
    if "topk" in fields and "topk" in given:
        raise Refused(400, "topk is given twice, in the address and in the body; give it once")
    if not isinstance(fields.get("image"), bytes):
        raise Refused(400, f"there is no image in the body; {_REMEDY}, with the file as 'image'")
    return Asked(fields["image"], _topk({**given, **fields}.get("topk")))


async def _body(request: Request, most: int) -> bytes:
    from starlette.requests import ClientDisconnect

    message = f"the body is longer than {most:,} bytes, the most that is read; scale the image down first"
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most:
        raise Refused(413, message)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Refused(413, message)
            parts.append(part)
    except ClientDisconnect as error:
        raise Refused(400, "the connection was closed before the body had arrived") from error
    return b"".join(parts)


def _form(kind: str, body: bytes) -> dict[str, Any]:
    """Return the fields of a form, files as bytes and others as text."""
    from python_multipart.exceptions import ParseError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(kind)[1].get(b"boundary")
    if not boundary:
        raise Refused(400, f"the content type {kind[:100]!r} names no boundary; let the client's library write it")
    parts: list[tuple[dict[bytes, bytes], bytearray]] = []
    headers: dict[bytes, bytes] = {}
    name, value, ended = bytearray(), bytearray(), False

    def begin() -> None:
        if len(parts) == len(_FIELDS):
            raise Refused(400, f"the form has more than {len(_FIELDS)} fields{_listed(_FIELDS)}")
        headers.clear()

    def keep() -> None:
        headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def end() -> None:
        nonlocal ended
        ended = True

    callbacks: Any = {
        "on_part_begin": begin,
        "on_header_field": lambda data, start, stop: name.extend(data[start:stop]),
        "on_header_value": lambda data, start, stop: value.extend(data[start:stop]),
        "on_header_end": keep,
        "on_headers_finished": lambda: parts.append(
            (parse_options_header(headers.get(b"content-disposition"))[1], bytearray())
        ),
        "on_part_data": lambda data, start, stop: parts[-1][1].extend(data[start:stop]),
        "on_end": end,
    }
    try:
        MultipartParser(boundary, callbacks).write(body)
    except (ParseError, ValueError) as error:
        raise Refused(400, f"the form cannot be read: {error}") from error
    if not ended:
        raise Refused(400, "the form cannot be read: it is cut off")
    named = ((options.get(b"name", b"").decode("utf-8", "replace"), options, content) for options, content in parts)
    fields = _unique(((key, (b"filename" in options, bytes(content))) for key, options, content in named), "field")
    is_file, image = fields.get("image", (True, None))
    if not is_file:
        raise Refused(400, "the field 'image' is no file; send it with a file name, as `curl -F image=@photo.jpg` does")
    return {key: image if key == "image" else text.decode("utf-8", "replace") for key, (_, text) in fields.items()}


def _json(body: bytes) -> dict[str, Any]:
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refused(400, 'the JSON is no object; send {"image": "the file in base64"}')
    fields = _unique(fields.items(), "key")
    if "image" in fields:
        try:
            fields["image"] = base64.b64decode(fields["image"], validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise Refused(400, "'image' is no base64; encode the bytes of the file, without data: before it") from error
    return fields


def _unique(items: Any, kind: str, known: Sequence[str] = _FIELDS) -> dict[str, Any]:
    """Return the items as a dictionary; refuse those that are given twice or are not known."""
    found: dict[str, Any] = {}
    for name, value in items:
        if name not in known:
            raise Refused(400, f"there is no {kind} {name[:100]!r}{nearest(name[:100], known) or _listed(known)}")
        if name in found:
            raise Refused(400, f"the {kind} {name!r} is given twice; give it once")
        found[name] = value
    return found


def _listed(known: Sequence[str]) -> str:
    return f"; there is {' and '.join(map(repr, known))}"


def _topk(value: Any) -> int | None:
    if value is None:
        return None
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not re.fullmatch("[0-9]{1,7}", text) or not 1 <= int(text) <= MAX_SIZE:
        raise Refused(400, f"topk must be a whole number from 1 to {MAX_SIZE}, not {str(value)[:100]!r}")
    return int(text)


def headers_of(refused: Refused) -> Mapping[str, str]:
    """Return the headers that an answer to a refused request has besides its type."""
    return {} if refused.retry is None else {"retry-after": str(refused.retry)}
