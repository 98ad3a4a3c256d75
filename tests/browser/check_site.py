"""Every page of the site in headless Chromium, on a screen and on a telephone. Run by hand, where a browser is:

    apt-get install chromium
    pip install playwright     # playwright alone: no browsers of its own are needed
    make docs && python -m tests.browser.check_site --screenshots shots

A page asks for nothing beyond its own server, has no error in its scripts, no picture that is missing, and nothing that
is wider than the screen. The search finds a page. Ends with 0 if all of it held.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.chromium import FLAGS

SITE = Path(__file__).resolve().parents[2] / "build/site"
SCREENS = {"screen": (1300, 1000), "telephone": (390, 844)}
BROKEN = "[...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def look(page: Any, url: str, pages: list[str], name: str, shots: Path | None) -> list[str]:
    """Visit pages, and return what is wrong with them."""
    wrong: list[str] = []
    where = ""
    page.on("pageerror", lambda error: wrong.append(f"{where}: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"{where}: {request.url} failed"))
    page.on(
        "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else wrong.append(f"{where}: {r.url}")
    )
    for where in pages:
        page.goto(url + where, wait_until="load")
        wrong += [f"{where}: {source} is missing" for source in page.evaluate(BROKEN)]
        if (wider := page.evaluate(WIDER)) > 0:
            wrong.append(f"{where}: {wider} pixels wider than the {name}")
        if shots is not None:
            page.screenshot(path=shots / f"{where.replace('/', '-').removesuffix('.html')}-{name}.png")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshots", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.screenshots is not None:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    wrong: list[str] = []
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=options.chromium, args=FLAGS)
        for name, (width, height) in SCREENS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            wrong += look(page, url, pages, name, options.screenshots)
        page = browser.new_page()
        page.goto(url)
        page.locator("input.md-search__input").click()
        page.locator("input.md-search__input").fill("rerun skips finished parts")
        page.locator("a.md-search-result__link[href*='tasks/evaluate']").first.wait_for(timeout=20_000)
        browser.close()
    server.shutdown()
    print(f"{len(pages)} pages", *wrong, sep="\n")
    assert not wrong, f"{len(wrong)} faults"


if __name__ == "__main__":
    main()
