"""The answers of a server, as an ASGI application: labels, features, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nfzoo.errors import ConfigError, DataError, NfzooError
from nfzoo.serve.batcher import Batcher
from nfzoo.serve.body import Refused, headers_of, read_request
from nfzoo.serve.inference import Inference, Question
from nfzoo.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("nfzoo")

ENDPOINTS = {"/predict": "POST", "/embed": "POST", "/health": "GET", "/metrics": "GET"}
INTERNAL = "the server failed; its log says why"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of a server.

    Attributes:
        bytes: of a request's body.
        requests: the most that are read, decoded, wait or are computed at a time. Others are refused at once.
        seconds: in which a request is answered, from its headers on.
        batch: images that are computed at a time.
        wait: seconds that the first image of a batch waits for others.
        decoders: images that are decoded at a time.
        topk: labels that are given where a request does not say how many; see `nfzoo.predict.classify`.
    """

    bytes: int = 16 << 20
    requests: int = 64
    seconds: float = 30.0
    batch: int = 8
    wait: float = 0.005
    decoders: int = 2
    topk: int | None = None


class Service:
    """Answers requests within limits.

    A request has one of `limits.requests` places, from its headers until it is answered, and longer if it ran out of
    time while its image was decoded: a thread cannot be stopped. Memory is therefore bounded.
    """

    def __init__(self, inference: Inference, limits: Limits, metrics: Metrics) -> None:
        self.inference, self.limits, self.metrics = inference, limits, metrics
        self._taken = 0
        self._decoders = ThreadPoolExecutor(limits.decoders, thread_name_prefix="nfzoo-decode")
        self.batcher: Batcher[Question, Any] = Batcher(
            inference.answer, size=limits.batch, wait=limits.wait, observe=metrics.batch
        )

    def close(self) -> None:
        """End the threads; what they have begun is finished first."""
        self._decoders.shutdown(cancel_futures=True)
        self.batcher.close()

    async def predict(self, request: Request) -> Mapping[str, Any]:
        """Return the labels of the image of a request."""
        try:
            self.inference.model.config.check_classifier()
        except ConfigError as error:
            raise Refused(400, "the model has no classifier, so it labels no images; POST /embed") from error
        return {"model": self.inference.model.name, "predictions": await self._answer(request, embed=False)}

    async def embed(self, request: Request) -> Mapping[str, Any]:
        """Return the pooled features of the image of a request."""
        return {"model": self.inference.model.name, "embedding": await self._answer(request, embed=True)}

    def health(self) -> Mapping[str, Any]:
        """Return what the model is.

        Raises:
            Refused: if images are no longer computed.
        """
        if not self.batcher.alive:
            raise Refused(503, "images are no longer computed; start the server anew")
        return {"status": "ok", **self.inference.describe()}

    async def _answer(self, request: Request, *, embed: bool) -> Any:
        """Read, decode and compute; a `Refused` is what goes wrong on the way."""
        if self._taken >= self.limits.requests:
            raise Refused(503, f"{self.limits.requests} requests are being answered; try again later", retry=1)
        self._place(+1)
        held = contextlib.ExitStack()
        held.callback(self._place, -1)
        arrived = False
        try:
            async with asyncio.timeout(self.limits.seconds):
                content, topk = await read_request(request, self.limits.bytes)
                arrived = True
                if embed and topk is not None:
                    raise Refused(400, "topk is for labels; /embed gives features")
                pixels = await self._decoded(content, held)
                question = Question(pixels, embed, self.limits.topk if topk is None else topk)
                return await asyncio.wrap_future(self.batcher.submit(question))
        except TimeoutError as error:
            if not arrived:
                raise Refused(408, f"the body did not arrive within {self.limits.seconds:g} seconds") from error
            raise Refused(504, f"there was no answer within {self.limits.seconds:g} seconds", retry=1) from error
        except DataError as error:
            raise Refused(422, str(error)) from error
        finally:
            held.close()

    async def _decoded(self, content: bytes, held: contextlib.ExitStack) -> Any:
        """Return the input of an image. The place is kept until the thread is through, whenever the caller leaves."""
        wanted = True
        future = self._decoders.submit(lambda: self.inference.read(content) if wanted else None)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            wanted = False
            loop, place = asyncio.get_running_loop(), held.pop_all()
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(place.close))
            raise

    def _place(self, change: int) -> None:
        self._taken += change
        self.metrics.taken(self._taken)


def build(service: Service) -> ASGIApp:
    """Return the application, which counts and times all answers, and gives every error as one line of JSON."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import Response
    from starlette.routing import Route

    def answer(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        # ASCII, so that labels that are no Unicode text can be sent, and nothing drives a terminal that shows it.
        return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")

    def answering(work: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                return answer(await work(request))
            except Refused as error:
                return answer({"error": str(error)}, error.status, headers_of(error))
            except NfzooError as error:
                logger.error("%s: %s", request.url.path, error)
                return answer({"error": str(error)}, 500)

        return endpoint

    async def health(_: Request) -> Mapping[str, Any]:
        return service.health()

    async def metrics(_: Request) -> Response:
        text, kind = service.metrics.text()
        return Response(text, media_type=kind)

    async def unknown(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        path, known = request.url.path[:100], ", ".join(f"{method} {path}" for path, method in ENDPOINTS.items())
        texts = {404: f"there is no {path!r}", 405: f"{path!r} takes no {request.method[:20]}"}
        return answer({"error": f"{texts.get(status, str(error))}; there is {known}"}, status)

    async def failed(_: Request, error: Exception) -> Response:
        return answer({"error": INTERNAL}, 500)  # Starlette raises it once more, and uvicorn logs it

    work = {
        "/predict": answering(service.predict),
        "/embed": answering(service.embed),
        "/health": answering(health),
        "/metrics": metrics,
    }
    routes = [Route(path, work[path], methods=[method]) for path, method in ENDPOINTS.items()]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    handlers: dict[Any, Any] = {HTTPException: unknown, Exception: failed}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    return _observed(app, service.metrics)


def _observed(app: ASGIApp, metrics: Metrics) -> ASGIApp:
    """Return the application with headers that all its answers have, which tells of each to the metrics."""

    async def observed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        begun, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await app(scope, receive, sending)
        finally:
            endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
            metrics.request(endpoint, status, time.perf_counter() - begun)

    return observed
