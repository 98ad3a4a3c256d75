"""What a client may send, and what it is told otherwise."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping

import pytest

from nfzoo.serve.body import Asked, Refused, read_request
from tests.support.asgi import form
from tests.support.loops import each

IMAGE = bytes(range(256))
JSON = {"content-type": "application/json; charset=utf-8"}
MOST = 1000


def read(body: bytes | list[bytes], headers: Mapping[str, str] | None = None, query: str = "") -> Asked:
    from starlette.requests import Request

    parts = [body] if isinstance(body, bytes) else list(body)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    raw = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": query.encode(), "headers": raw}
    return asyncio.run(read_request(Request(scope, receive), MOST))


def as_json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


CODED = base64.b64encode(IMAGE).decode()


def test_an_image_in_every_form() -> None:
    assert read(IMAGE) == Asked(IMAGE, None)
    assert read([IMAGE[:9], IMAGE[9:]], {"content-type": "image/JPEG"}, "topk=3") == Asked(IMAGE, 3)
    assert read(IMAGE, {"content-type": "application/octet-stream"}) == Asked(IMAGE, None)
    assert read(as_json(image=CODED, topk=2), JSON) == Asked(IMAGE, 2)
    assert read(as_json(image=CODED), JSON, "topk=2") == Asked(IMAGE, 2)
    assert read(*form([("image", IMAGE, "a.jpg"), ("topk", b"4", None)])) == Asked(IMAGE, 4)
    large = b"x" * MOST
    assert read(large).content == large
    assert read(b"") == Asked(b"", None)


@each(
    ("body", "headers", "query", "status", "words"),
    [
        (IMAGE, {"content-type": "text/plain"}, "", 415, "'text/plain' is not read; send an image file"),
        (IMAGE, {"content-type": "application/x-www-form-urlencoded"}, "", 415, "is not read"),
        (b"x" * (MOST + 1), {}, "", 413, "longer than 1,000 bytes"),
        ([b"x" * MOST, b"x"], {}, "", 413, "longer than 1,000 bytes"),
        (b"", {"content-length": "1001"}, "", 413, "longer than 1,000 bytes"),
        (b"", {"content-length": "9" * 4000}, "", 413, "longer than 1,000 bytes"),
        (IMAGE, {}, "topk=0", 400, "topk must be a whole number from 1"),
        (IMAGE, {}, "topk=", 400, "not ''"),
        (IMAGE, {}, "topk=1e9", 400, "not '1e9'"),
        (IMAGE, {}, "topk=%D9%A3", 400, "topk must be"),  # a digit that is not ASCII
        (IMAGE, {}, "topk=1&topk=2", 400, "the parameter 'topk' is given twice"),
        (IMAGE, {}, "topc=1", 400, "no parameter 'topc'; did you mean 'topk'"),
        (b"{", JSON, "", 400, "the body is no JSON"),
        (b"[" * 999, JSON, "", 400, "the body is no JSON"),
        (b"\xff", JSON, "", 400, "the body is no JSON"),
        (b"[1]", JSON, "", 400, "the JSON is no object"),
        (b'{"image": "", "image": ""}', JSON, "", 400, "'image' twice"),
        (as_json(image="?"), JSON, "", 400, "no base64"),
        (as_json(image=f"data:image/png;base64,{CODED}"), JSON, "", 400, "without data:"),
        (as_json(image=7), JSON, "", 400, "no base64"),
        (as_json(picture=CODED), JSON, "", 400, "there is no key 'picture'; there is 'image' and 'topk'"),
        (as_json(topk=1), JSON, "", 400, "no image in the body"),
        (as_json(image=CODED, topk=True), JSON, "", 400, "not 'True'"),
        (as_json(image=CODED, topk=1.5), JSON, "", 400, "not '1.5'"),
        (as_json(image=CODED, topk=1), JSON, "topk=1", 400, "in the address and in the body"),
        (*form([("image", IMAGE, None)]), "", 400, "'image' is no file"),
        (*form([("images", IMAGE, "a")]), "", 400, "did you mean 'image'"),
        (*form([("image", IMAGE, "a"), ("image", IMAGE, "b")]), "", 400, "given twice"),
        (*form([("image", IMAGE, "a")] * 3), "", 400, "more than 2 fields"),
        (*form([]), "", 400, "there is no image"),
        (b"--edge\r\nhello", form([])[1], "", 400, "the form cannot be read"),
        (b"no form", form([])[1], "", 400, "the form cannot be read"),
        (b"--edge\r\n\r\nhello\r\n--edge--\r\n", form([])[1], "", 400, "there is no field ''"),
        (IMAGE, {"content-type": "multipart/form-data"}, "", 400, "names no boundary"),
        (*form([("image", IMAGE, "a"), ("topk", b"x" * 200, None)]), "", 400, "topk must be"),
    ],
)
def test_what_is_refused(
    body: bytes | list[bytes], headers: Mapping[str, str], query: str, status: int, words: str
) -> None:
    with pytest.raises(Refused) as caught:
        read(body, headers, query)
    assert caught.value.status == status
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_form_that_is_cut_off_is_an_error() -> None:
    whole, headers = form([("image", IMAGE, "a.jpg")])
    for end in range(0, len(whole) - 4, 7):
        with pytest.raises(Refused) as caught:
            read(whole[:end], headers)
        assert caught.value.status == 400, end
