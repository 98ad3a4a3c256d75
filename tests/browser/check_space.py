"""`nfzoo space` in headless Chromium, with photographs. Run by hand, where a browser is:

    apt-get install chromium
    pip install -e '.[space]' playwright scikit-learn     # playwright alone: no browsers of its own are needed
    python -m tests.browser.check_space --screenshot docs/space.png

Trains two small models in half a minute, serves them, and does what a visitor does. Ends with 0 if all of it held.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from nfzoo.data.digits import Digits
from nfzoo.train.run import main as train
from tests.support.chromium import FLAGS

PHOTOS = ("china", "flower")
TIMEOUT = 60_000  # milliseconds


def make_models(folder: Path) -> None:
    """`photos` tells crops of two photographs apart, `digits` reads digits, `damaged` has no weights."""
    rng = np.random.default_rng(0)
    for name in PHOTOS:
        (folder / "crops" / name).mkdir(parents=True)
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        photo.save(folder / f"{name}.jpg", quality=95)
        for i in range(60):
            side = int(rng.integers(200, 420))
            left, top = (int(rng.integers(0, n - side + 1)) for n in photo.size)
            photo.crop((left, top, left + side, top + side)).resize((64, 64)).save(folder / "crops" / name / f"{i}.png")
    digits = Digits.embedded()
    digits[3][0].resize((256, 256), Image.Resampling.NEAREST).save(folder / "three.png")
    for name, data, batch, epochs in (("photos", str(folder / "crops"), "16", "15"), ("digits", "digits", "32", "4")):
        options = ["--model", "nfnet-test", "--data", data, "--batch_size", batch, "--epochs", epochs]
        assert train([*options, "--workers", "0", "--output", str(folder / "models" / name)]) == 0
    (folder / "models" / "damaged").mkdir()
    (folder / "models" / "damaged" / "config.json").write_bytes(
        (folder / "models" / "digits" / "config.json").read_bytes()
    )
    (folder / "broken.png").write_bytes((folder / "three.png").read_bytes()[:60])


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nfzoo", "space", "--model", str(folder / "models"), "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"})
    url = f"http://127.0.0.1:{port}/"
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return server, url
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def choose(page: Any, model: str) -> None:
    page.get_by_label("Model").click()
    page.get_by_role("option", name=model).click()


def give(page: Any, picture: Path) -> None:
    """Put a picture into the place for it, which has to be empty first."""
    remove = page.get_by_label("Remove Image")
    if remove.count():
        remove.first.click()
    page.locator("input[type=file]").first.set_input_files(picture)


def answer(page: Any, first: str) -> list[str]:
    """The labels shown, once the first of them is `first`."""
    page.locator(".output-class", has_text=first).wait_for(timeout=TIMEOUT)
    assert page.locator(".output-class").inner_text().strip() == first
    return [text.strip() for text in page.locator(".confidence-set .text").all_inner_texts()]


def visit(page: Any, folder: Path, screenshot: Path | None) -> None:
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    choose(page, "photos")
    give(page, folder / "china.jpg")
    assert len(answer(page, "china")) == 2
    give(page, folder / "flower.jpg")
    assert len(answer(page, "flower")) == 2

    choose(page, "digits")
    give(page, folder / "three.png")
    assert len(answer(page, "3")) == 5

    choose(page, "damaged")
    toast = page.locator(".toast-body")
    toast.first.wait_for(timeout=TIMEOUT)
    text = toast.first.inner_text()
    assert "damaged cannot be loaded" in text, text
    assert "model.safetensors" not in text, text
    choose(page, "photos")
    for close in toast.locator("button").all():
        close.click()
    give(page, folder / "broken.png")
    page.locator(".toast-body", has_text="The picture cannot be read: it").wait_for(timeout=TIMEOUT)
    assert "damaged" in (text := page.locator(".toast-body").last.inner_text()), text
    for close in toast.locator("button").all():
        close.click()

    give(page, folder / "flower.jpg")
    answer(page, "flower")
    page.wait_for_timeout(1000)
    if screenshot is not None:
        page.screenshot(path=screenshot)
        Image.open(screenshot).convert("RGB").quantize(256).save(screenshot, optimize=True)  # a third of the size
    assert not complaints, complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshot", type=Path)
    options = parser.parse_args()
    playwright = importlib.import_module("playwright.sync_api")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        server, url = serve(folder)
        try:
            with playwright.sync_playwright() as driver:
                context = driver.chromium.launch_persistent_context(
                    str(folder / "profile"),
                    executable_path=options.chromium,
                    args=FLAGS,
                    viewport={"width": 1000, "height": 600},
                )
                page = context.pages[0]
                page.goto(url)
                try:
                    visit(page, folder, options.screenshot)
                except BaseException:
                    page.screenshot(path=f"{tempfile.gettempdir()}/check_space_failure.png")
                    raise
                context.close()
        finally:
            server.terminate()
            server.wait(timeout=30)
    print("the Space does what it should")
    return 0


if __name__ == "__main__":
    sys.exit(main())
