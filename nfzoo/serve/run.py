"""The command that serves a model: `nfzoo serve MODEL`."""

from __future__ import annotations

import argparse
import errno
import signal
import socket
import warnings
from typing import Any, NoReturn

import torch
from PIL import Image

from nfzoo import from_pretrained
from nfzoo.errors import ConfigError, Stopped
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped
from nfzoo.serve.app import Limits, Service, build
from nfzoo.serve.inference import Inference
from nfzoo.serve.metrics import Metrics

NEEDED = ("starlette", "uvicorn", "prometheus_client", "python_multipart")
CONNECTIONS = 512  # a process often may open 1024 files
"""Connections beyond which uvicorn itself answers 503; idle ones count."""

_SLACK = 5  # seconds for answers to be sent, after the last request has run out of time


def main(argv: list[str] | None = None) -> int:
    """Answer requests until a signal ends the server: `nfzoo serve`."""
    default = Limits()
    parser = program.Parser(
        prog="nfzoo serve",
        description="Answer POST /predict and POST /embed with a model's labels and features of an image, and\n"
        "GET /health and GET /metrics, over HTTP. SIGTERM and Ctrl-C end it once all requests are answered.\n\n"
        "example: nfzoo serve runs/digits --port 8000",
    )
    count = program.positive_int
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, its weight file, or a Hub repository")
    text = "address to listen at (default: 127.0.0.1, which this machine alone reaches; 0.0.0.0 for all networks)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    text = "port (default: 8000; 0 for a free one, which is printed)"
    parser.add_argument("--port", type=_port, default=8000, metavar="P", help=text)
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, mps (default: cpu)")
    text = "processor threads that compute (default: torch's choice, which does not know a container's share)"
    parser.add_argument("--threads", type=count, metavar="N", help=text)
    text = f"most images computed at a time (default: {default.batch})"
    parser.add_argument("--batch-size", type=count, default=default.batch, metavar="N", help=text)
    text = f"time that the first image of a batch waits for others (default: {1000 * default.wait:g})"
    parser.add_argument("--batch-wait", type=program.nonnegative_int, default=5, metavar="MS", help=text)
    text = f"most requests at a time; others are answered 503 (default: {default.requests})"
    parser.add_argument("--queue", type=count, default=default.requests, metavar="N", help=text)
    text = f"time in which a request is answered, or else 504 (default: {default.seconds:g})"
    parser.add_argument("--timeout", type=count, default=int(default.seconds), metavar="SECONDS", help=text)
    text = f"largest body of a request, in MB of 2^20 bytes (default: {default.bytes >> 20})"
    parser.add_argument("--max-megabytes", type=count, default=default.bytes >> 20, metavar="N", help=text)
    text = "most pixels of an image, in millions (default: 50); a thread that decodes takes up to 8 bytes for each"
    parser.add_argument("--max-megapixels", type=_megapixels, default=50, metavar="N", help=text)
    text = f"images decoded at a time (default: {default.decoders})"
    parser.add_argument("--decoders", type=count, default=default.decoders, metavar="N", help=text)
    text = "labels where a request does not say how many (default: 5; of a multi-label model all that reach their "
    parser.add_argument("--topk", type=count, metavar="K", help=f"{text}thresholds)")
    program.add_source_options(parser)
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _serve)


def _serve(options: argparse.Namespace) -> None:
    program.check_packages("serving", NEEDED, "serve")
    before = signal.signal(signal.SIGTERM, _stop)  # a container's first process gets no signal that it does not handle
    try:
        _load_and_answer(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _load_and_answer(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    limit_pixels(options.max_megapixels * 1_000_000)
    limits = Limits(
        bytes=options.max_megabytes << 20,
        requests=options.queue,
        seconds=options.timeout,
        batch=options.batch_size,
        wait=options.batch_wait / 1000,
        decoders=options.decoders,
        topk=options.topk,
    )
    with bound(options.host, options.port) as listener:  # before the model is loaded, as that can take minutes
        inference = Inference(from_pretrained(options.model, **program.source_options(options)), options.device)
        about = inference.describe()
        kind = "labels in sets" if about["multi_label"] else "classes"
        print(
            f"{escaped(about['model'] or 'a model without name')}: {about['classes']:,} {kind}, "
            f"{about['image_size']} pixels, on {inference.device} with {torch.get_num_threads()} thread(s)"
        )
        try:
            listener.listen(CONNECTIONS)
        except OSError as error:  # another server was bound to the same port, and listens by now
            raise cannot_listen(error, options.host, options.port) from error
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving on {address}; Ctrl-C ends", flush=True)
        if options.json is not None:
            program.write_result(options, {"url": address, **about})
        answer_until_signal(build(Service(inference, limits, Metrics())), listener, limits.seconds + _SLACK)
    print("all requests are answered")


def _stop(number: int, _: Any) -> NoReturn:
    raise Stopped("stopped before it answered requests", number)


def limit_pixels(most: int) -> None:
    """Let Pillow refuse images of more pixels in this process, in all formats, before it decodes them."""
    Image.MAX_IMAGE_PIXELS = most // 2  # Pillow warns from here on, and refuses twice as many
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, and does not listen yet.

    Raises:
        ConfigError: for an address that is not this machine's, or a port that is in use or needs privileges.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise cannot_listen(error, host, port) from error
    return listener


def cannot_listen(error: OSError, host: str, port: int) -> ConfigError:
    """Return the error for an address, with the remedy."""
    reasons = {
        errno.EADDRINUSE: f"port {port} of {host} is in use; choose another with --port, or 0 for a free one",
        errno.EACCES: f"port {port} needs privileges; choose one from 1024 on with --port",
        errno.EADDRNOTAVAIL: f"{host} is no address of this machine; take --host 127.0.0.1 or 0.0.0.0",
    }
    plain = f"cannot listen at {host!r}: {error.strerror or error}; take --host 127.0.0.1 or 0.0.0.0"
    return ConfigError(reasons.get(error.errno or 0, plain))


def answer_until_signal(app: Any, listener: socket.socket, patience: float) -> None:
    """Answer requests until SIGTERM or Ctrl-C, and then those that have begun.

    Args:
        patience: seconds after the signal in which they have to be answered.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(patience),
    )
    server = uvicorn.Server(config)

    def end(*_: Any) -> None:
        server.should_exit = True

    # uvicorn raises a signal once more after it has dealt with it; SIGTERM is a good end here, and Ctrl-C a Ctrl-C also
    # where a shell started the process with that signal ignored.
    handlers = {signal.SIGTERM: end, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _port(text: str) -> int:
    if program.nonnegative_int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is greater than 65535")
    return int(text)


def _megapixels(text: str) -> int:
    if program.positive_int(text) > 179:  # what Pillow refuses by itself, and nfzoo everywhere else
        raise argparse.ArgumentTypeError(f"{text} is greater than 179")
    return int(text)
