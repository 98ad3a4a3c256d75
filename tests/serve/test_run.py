"""`nfzoo serve` as a process: under load, with bad clients, and at its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nfzoo.cli.main import main
from nfzoo.errors import ConfigError
from nfzoo.nn import NFNet
from nfzoo.serve import run
from tests.project.test_packaging import PACKAGE_DIRS, ROOT
from tests.serve.test_metrics import values
from tests.support.asgi import form
from tests.support.loops import each
from tests.support.pictures import bomb_png

PROBABILITY = 1e-4  # see test_inference.py
JPEG = {"content-type": "image/jpeg"}


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int, printed: list[str]) -> None:
        self.process, self.port, self.printed = process, port, printed

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as connection:
            return exchange(connection, method, path, body, headers)

    def end(self, number: int) -> tuple[int, str]:
        """Return exit status and all that was printed, after a signal."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        return self.process.returncode, "".join(self.printed) + rest


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.fixture(scope="module")
def folder(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("served") / "model")


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "nfzoo", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        cwd=folder.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"^serving on http://127\.0\.0\.1:(\d+)", line):
                yield Server(process, int(found[1]), printed)
                break
        else:
            pytest.fail("".join(printed))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_load_and_bad_clients(model: NFNet, folder: Path, photos: list[Path]) -> None:
    expected = [model.predict(path, topk=2) for path in photos]
    bodies = [path.read_bytes() for path in photos]
    bad = [
        (("POST", "/predict", b"", JPEG), 422),
        (("POST", "/predict", b"text", JPEG), 422),
        (("POST", "/predict", b"text", {"content-type": "text/plain"}), 415),
        (("POST", "/embed", bodies[1][:-40], JPEG), 422),
        (("POST", "/predict", bomb_png(60_000, 60_000), JPEG), 422),
        (("POST", "/predict", bytes(50 << 20), JPEG), 413),
        (("POST", "/predict", *form([("image", b"x" * (17 << 20), "x")])), 413),
        (("POST", "/nowhere", bytes(2 << 20), JPEG), 404),
        (("GET", "/predict"), 405),
    ]

    with serving(folder) as server:

        def client(worker: int) -> list[int]:
            statuses = []
            with contextlib.closing(server.connect()) as connection:
                for i in range(25):
                    which = (worker + i) % len(bodies)
                    status, body = exchange(connection, "POST", "/predict?topk=2", bodies[which], JPEG)
                    statuses.append(status)
                    found = json.loads(body)["predictions"]
                    assert [row["label"] for row in found] == [label for label, _ in expected[which]]
                    for row, (_, probability) in zip(found, expected[which], strict=True):
                        assert abs(row["probability"] - probability) < PROBABILITY
            return statuses

        def careless(_: int) -> list[int]:
            return [server.ask(*request)[0] for request, _ in bad]

        with ThreadPoolExecutor(10) as pool:
            good = [pool.submit(client, worker) for worker in range(8)]
            wrong = [pool.submit(careless, worker) for worker in range(2)]
            assert [future.result(60) for future in good] == [[200] * 25] * 8
            assert [future.result(60) for future in wrong] == [[status for _, status in bad]] * 2

        assert server.ask("GET", "/health")[0] == 200
        check = health_check().replace("8000", str(server.port))
        assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0
        found = values(server.ask("GET", "/metrics")[1])
        assert found['nfzoo_requests_total{endpoint="/predict",status="200"}'] == 200
        assert found['nfzoo_requests_total{endpoint="/predict",status="413"}'] == 4
        assert found["nfzoo_batch_images_sum"] == 200
        assert found["nfzoo_batch_images_count"] < 200  # some shared a batch
        assert found["nfzoo_requests_in_progress"] == 0
        assert found["process_resident_memory_bytes"] < 2 << 30  # torch alone takes some 300 MB

        # What is no HTTP, and clients that leave.
        for bytes_ in (b"\0\xff garbage\r\n\r\n", b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n123"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
                raw.sendall(bytes_)
        assert server.ask("POST", "/predict", bodies[0], JPEG)[0] == 200

        status, printed = server.end(signal.SIGTERM)
        assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 1
        assert status == 0, printed
        assert "Traceback" not in printed
        assert printed.splitlines()[-1] == "all requests are answered"


@pytest.mark.slow
def test_the_end_waits_for_answers(folder: Path, photos: list[Path]) -> None:
    def at_the_end(server: Server, number: int) -> tuple[int, str]:
        answers: list[tuple[int, bytes]] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.ask("POST", "/embed", photos[0].read_bytes(), JPEG))
        )
        idle = server.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()  # and stays open
        asking.start()
        while values(server.ask("GET", "/metrics")[1])["nfzoo_requests_in_progress"] < 1:
            time.sleep(0.02)
        ended = server.end(number)
        asking.join(30)
        assert [status for status, _ in answers] == [200]
        with pytest.raises(OSError, match="refused"):
            server.connect().connect()
        idle.close()
        return ended

    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with serving(folder, "--batch-wait", "1500") as server:
            found, printed = at_the_end(server, number)
        assert (found, "Traceback" in printed) == (status, False), printed


@pytest.mark.slow
def test_a_signal_before_the_model_is_loaded(folder: Path) -> None:
    code = (
        "import os, signal, nfzoo.serve.run as run\n"
        "run.from_pretrained = lambda *_, **options: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"raise SystemExit(run.main([{str(folder)!r}, '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "nfzoo serve: stopped before it answered requests\n")


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line.strip() for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def health_check() -> str:
    """Return the Python code that the Dockerfile's health check runs."""
    (check,) = (rest for name, rest in instructions() if name == "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    return command[2]


def test_the_image_holds_the_package_and_starts_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = instructions()
    copied = [word for name, rest in found if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert set(PACKAGE_DIRS) <= set(copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= set(copied)
    sent = (ROOT / ".dockerignore").read_text().split()
    assert sorted(line[1:] for line in sent if line.startswith("!")) == sorted(copied)
    assert sent[0] == "*"
    (entry,) = (json.loads(rest) for name, rest in found if name == "ENTRYPOINT")
    assert entry[:2] == ["nfzoo", "serve"]
    assert ("EXPOSE", entry[-1]) in found
    assert main([*entry[1:], "no-such-folder", "--port", "0"]) == 2  # its options are known
    assert "no-such-folder" in capsys.readouterr().err
    last = [i for i, (name, _) in enumerate(found) if name == "FROM"][-1]
    (user,) = (rest for name, rest in found[last:] if name == "USER")
    assert int(user) > 0


def test_addresses_that_cannot_be_listened_at() -> None:
    with run.bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use; choose another with --port"):
            run.bound("127.0.0.1", port)
    with run.bound("127.0.0.1", 0) as one, run.bound("127.0.0.1", one.getsockname()[1]) as other:  # not listening yet
        one.listen()
        with pytest.raises(OSError, match="in use") as caught:
            other.listen()
        assert "choose another with --port" in str(run.cannot_listen(caught.value, "127.0.0.1", 80))
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7 is no address of this machine"):  # of RFC 5737
        run.bound("203.0.113.7", 0)
    with pytest.raises(ConfigError, match="cannot listen at 'no host'"):
        run.bound("no host", 0)


@each(
    ("options", "words"),
    [
        (["--port", "65536"], "65536 is greater than 65535"),
        (["--queue", "0"], "'0' is not a whole number from 1"),
        (["--max-megapixels", "180"], "180 is greater than 179"),
        (["--host", "no host"], "cannot listen at 'no host'"),
        (["--device", "abacus", "--port", "0"], "abacus"),
    ],
)
def test_options_that_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert main(["serve", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_options_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    asked: list[tuple[str, int]] = []

    def bound(host: str, port: int) -> socket.socket:
        asked.append((host, port))
        raise ConfigError("seen")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(run, "bound", bound)
    assert main(["serve", str(folder)]) == 2
    assert asked == [("127.0.0.1", 8000)]
    assert Image.MAX_IMAGE_PIXELS == 25_000_000  # Pillow refuses twice as many


def test_without_the_packages(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "NEEDED", ("starlette", "no_such_package"))
    assert main(["serve", str(folder)]) == 2
    assert "serving needs no_such_package: pip install 'nfzoo[serve]'" in capsys.readouterr().err
