"""Labels, features, health and metrics, and every way in which a request can go wrong; without a socket."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import zlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nfzoo.nn import NFNet, create
from nfzoo.serve.app import INTERNAL, Limits, Service, build
from nfzoo.serve.inference import Inference
from nfzoo.serve.metrics import Metrics
from nfzoo.serve.run import limit_pixels
from tests.serve.test_metrics import values
from tests.support.asgi import Answer, call, form
from tests.support.pictures import bomb_png

PROBABILITY = 1e-4  # see test_inference.py
JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def inference(model: NFNet) -> Inference:
    return Inference(model)


def ask(
    inference: Inference, work: Callable[[Any, Service], Coroutine[Any, Any, Any]], limits: Limits | None = None
) -> Any:
    """Run `work(app, service)`, and end the service."""
    service = Service(inference, limits or Limits(), Metrics())
    try:
        return asyncio.run(work(build(service), service))
    finally:
        service.close()


def one(inference: Inference, *request: Any, limits: Limits | None = None) -> Answer:
    return ask(inference, lambda app, _: call(app, *request), limits)


def test_answers_are_those_of_predict(model: NFNet, inference: Inference, photos: list[Path]) -> None:
    async def all_at_once(app: Any, service: Service) -> list[Answer]:
        requests = [call(app, "POST", "/predict?topk=2", path.read_bytes(), JPEG) for path in photos]
        requests += [call(app, "POST", "/embed", *form([("image", path.read_bytes(), "x")])) for path in photos]
        return await asyncio.gather(*requests)

    answers = ask(inference, all_at_once)
    assert [answer.status for answer in answers] == [200] * 8
    for path, answer in zip(photos, answers[:4], strict=True):
        expected = model.predict(path, topk=2)
        assert [row["label"] for row in answer.json["predictions"]] == [label for label, _ in expected]
        for row, (_, probability) in zip(answer.json["predictions"], expected, strict=True):
            assert abs(row["probability"] - probability) < PROBABILITY
        assert answer.json["model"] == "nfnet-test"
    with torch.inference_mode():
        features = model.embed(torch.stack([model.preprocess(path) for path in photos]))
    for row, answer in zip(features, answers[4:], strict=True):
        np.testing.assert_allclose(answer.json["embedding"], row, rtol=1e-4, atol=1e-4)


def test_labels_where_a_request_does_not_say_how_many(inference: Inference, photos: list[Path]) -> None:
    photo = photos[0].read_bytes()
    for limits, address, count in ((Limits(topk=1), "", 1), (Limits(topk=1), "?topk=3", 3), (Limits(), "", 4)):
        assert len(one(inference, "POST", f"/predict{address}", photo, limits=limits).json["predictions"]) == count


def test_labels_are_text_whatever_they_hold(inference: Inference, model: NFNet, photos: list[Path]) -> None:
    answer = one(inference, "POST", "/predict", photos[0].read_bytes())
    assert answer.body.isascii()
    assert answer.body.decode().isprintable()
    assert {row["label"] for row in answer.json["predictions"]} == set(model.labels or ())
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_health_and_metrics(inference: Inference, photos: list[Path]) -> None:
    async def work(app: Any, service: Service) -> None:
        health = await call(app, "GET", "/health")
        assert health.json == {
            "status": "ok",
            "model": "nfnet-test",
            "classes": 4,
            "multi_label": False,
            "image_size": 32,
        }
        for body in (photos[0].read_bytes(), b"", b"no image"):
            await call(app, "POST", "/predict", body, JPEG)
        await call(app, "GET", "/no\n/such")
        metrics = await call(app, "GET", "/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        found = values(metrics.body)
        assert found['nfzoo_requests_total{endpoint="/predict",status="200"}'] == 1
        assert found['nfzoo_requests_total{endpoint="/predict",status="422"}'] == 2
        assert found['nfzoo_requests_total{endpoint="other",status="404"}'] == 1
        assert found["nfzoo_batch_images_sum"] == 1
        assert found["nfzoo_requests_in_progress"] == 0
        service.batcher.close()
        assert (await call(app, "GET", "/health")).status == 503

    ask(inference, work)


def gigapixel_icon() -> bytes:
    """An icon of 16 pixels, by its own account, whose image has many more."""
    inside = bomb_png(12_000, 12_000)
    header = b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0])
    return header + len(inside).to_bytes(4, "little") + (22).to_bytes(4, "little") + inside


def test_images_that_cannot_be_read(inference: Inference, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    limit_pixels(1_000_000)
    large = io.BytesIO()
    Image.new("L", (1001, 1000)).save(large, "PNG")
    fits = io.BytesIO()
    Image.new("L", (1000, 1000)).save(fits, "PNG")
    assert one(inference, "POST", "/predict", fits.getvalue(), JPEG).status == 200
    for content, words in (
        (b"", "the image is empty"),
        (b"just text", "no image of a known format"),
        (photos[1].read_bytes()[:-40], "cut off"),
        (bomb_png(100_000, 100_000), "too large"),
        (large.getvalue(), "too large"),
        (gigapixel_icon(), "too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    ):
        answer = one(inference, "POST", "/embed", content, JPEG)
        assert answer.status == 422, words
        assert words in answer.json["error"]
        assert "Traceback" not in answer.json["error"]
        assert "\n" not in answer.json["error"]


def test_requests_that_are_not_understood(inference: Inference, photos: list[Path]) -> None:
    photo = photos[0].read_bytes()
    for request, status, words in (
        (("GET", "/"), 404, "there is no '/'; there is POST /predict"),
        (("POST", "/predict/", photo), 404, "there is no '/predict/'"),
        (("GET", "/predict"), 405, "'/predict' takes no GET"),
        (("POST", "/health"), 405, "takes no POST"),
        (("POST", "/predict", photo, {"content-type": "text/html"}), 415, "'text/html' is not read"),
        (("POST", "/embed?topk=3", photo), 400, "topk is for labels"),
        (("POST", "/predict", b"x" * 5000), 413, "longer than 4,096 bytes"),
    ):
        answer = one(inference, *request, limits=Limits(bytes=4096))
        assert answer.status == status, request[:2]
        assert words in answer.json["error"]


def test_a_model_without_classifier(photos: list[Path]) -> None:
    headless = Inference(create("nfnet-test", num_classes=0))
    answer = one(headless, "POST", "/predict", photos[0].read_bytes())
    assert (answer.status, "POST /embed" in answer.json["error"]) == (400, True)
    assert len(one(headless, "POST", "/embed", photos[0].read_bytes()).json["embedding"]) == 256


class Gate(Inference):
    """Decodes, or computes, once it may."""

    def __init__(self, model: NFNet, *, decodes: bool = False) -> None:
        self.go = threading.Event()
        self.go.set()
        super().__init__(model)
        self.decodes = decodes
        self.read_images = 0
        self.go.clear()

    def read(self, content: bytes) -> torch.Tensor:
        self.read_images += 1
        assert not self.decodes or self.go.wait(20)
        return super().read(content)

    def answer(self, questions: Any) -> list[Any]:
        assert getattr(self, "decodes", True) or self.go.wait(20)
        return super().answer(questions)


@pytest.fixture(params=["computing", "decoding"])
def gate(request: pytest.FixtureRequest, model: NFNet) -> Iterator[Gate]:
    gate = Gate(model, decodes=request.param == "decoding")
    yield gate
    gate.go.set()


def test_more_requests_than_places(gate: Gate, photos: list[Path]) -> None:
    photo = photos[0].read_bytes()

    async def work(app: Any, service: Service) -> None:
        first = [asyncio.create_task(call(app, "POST", "/predict", photo)) for _ in range(3)]
        while service._taken < 3:
            await asyncio.sleep(0.01)
        refused = await call(app, "POST", "/predict", [None])  # before its body is read
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "try again later" in refused.json["error"]
        assert (await call(app, "GET", "/health")).status == 200
        gate.go.set()
        assert [(await task).status for task in first] == [200] * 3
        assert (await call(app, "POST", "/predict", photo)).status == 200

    ask(gate, work, Limits(requests=3))


def test_requests_that_take_too_long(gate: Gate, photos: list[Path]) -> None:
    photo = photos[0].read_bytes()

    async def work(app: Any, service: Service) -> None:
        late = await call(app, "POST", "/embed", [b"begun", None])
        assert (late.status, late.json["error"]) == (408, "the body did not arrive within 0.2 seconds")
        answers = await asyncio.gather(*(call(app, "POST", "/embed", photo) for _ in range(4)))
        assert {answer.status for answer in answers} == {504}
        assert "no answer within 0.2 seconds" in answers[0].json["error"]
        begun = 2 if gate.decodes else 4  # those that threads have begun keep their places
        assert service._taken == (4 if gate.decodes else 0)
        gate.go.set()
        while service._taken:
            await asyncio.sleep(0.01)
        assert gate.read_images == begun  # the others were left alone
        assert (await call(app, "POST", "/embed", photo)).status == 200

    ask(gate, work, Limits(seconds=0.2, decoders=2))


def test_what_the_server_does_wrong_stays_its_own(
    model: NFNet, photos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Inference):
        def read(self, content: bytes) -> torch.Tensor:
            if content == b"raise":
                raise ZeroDivisionError("/secret/path")
            return super().read(content) * (float("nan") if len(content) > 1500 else 1)

    async def work(app: Any, service: Service) -> None:
        with pytest.raises(ZeroDivisionError):  # for the log of uvicorn, after the answer
            await call(app, "POST", "/predict", b"raise")
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"raise"}

        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
        with pytest.raises(ZeroDivisionError):
            await app(scope, receive, send)
        assert (sent[0]["status"], json.loads(sent[1]["body"])) == (500, {"error": INTERNAL})
        large = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(large, "PNG")
        good = next(p.read_bytes() for p in photos if p.stat().st_size < 1500)
        answers = await asyncio.gather(*(call(app, "POST", "/embed", c) for c in (good, large.getvalue(), good)))
        assert [answer.status for answer in answers] == [200, 500, 200]
        assert "not finite" in answers[1].json["error"]

    with caplog.at_level(logging.ERROR, "nfzoo"):
        ask(Broken(model), work)
    assert "/embed: the model's outputs are not finite" in caplog.text


def test_one_bad_image_spoils_no_batch(inference: Inference, photos: list[Path]) -> None:
    async def work(app: Any, service: Service) -> list[int]:
        bodies = [photos[0].read_bytes(), b"bad", photos[1].read_bytes(), zlib.compress(b"bad")]
        return [a.status for a in await asyncio.gather(*(call(app, "POST", "/predict", b) for b in bodies))]

    assert ask(inference, work, Limits(wait=0.2)) == [200, 422, 200, 422]
