"""The figures of README.md and the pages are those of the code; test_pages.py runs their commands and their Python."""

import re
from pathlib import Path

import pytest

from nfzoo import model
from nfzoo.cli.main import main
from nfzoo.conversion.haiku import haiku_names
from nfzoo.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_table_of_models() -> None:
    page = (ROOT / "docs/models.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) M \| ([\d.]+) G \| (\d+) / (\d+) \| ([\d.]*)", page, re.MULTILINE)
    assert len(rows) >= 14
    for name, parameters, macs, train, test, top1 in rows:
        row = VARIANTS[name]
        size = row.preprocessing.test_size
        assert f"{model.parameter_count(row.config) / 1e6:.1f}" == parameters, name
        assert f"{model.mac_count(row.config, size) / 1e9:.2f}" == macs, name
        assert (row.preprocessing.train_size, size) == (int(train), int(test)), name
        assert row.top1 == (float(top1) if top1 else None), name
    assert f"all {len(VARIANTS)}," in page
    short = re.findall(r"^\| `.* G \|.*$", README, re.MULTILINE)
    assert len(short) >= 6
    assert set(short) <= set(page.splitlines())
    assert f"of the {len(VARIANTS)}]" in README


def test_stages_are_shown_as_info_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nfnet-f1"]) == 0
    page = (ROOT / "docs/models.md").read_text()
    assert page.split("```\nstage ")[1].split("```")[0] in capsys.readouterr().out


def test_the_messages_of_the_troubleshooting_page_stand_in_the_source() -> None:
    files = [path for folder in ("nfzoo", "hub", "conversion") for path in (ROOT / folder).rglob("*.py")]
    source = "".join(path.read_text() for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        pieces = "[^\n]{0,200}?".join(re.escape(piece.strip()) for piece in message.split("…") if piece.strip())
        assert re.search(pieces, source), message


def test_haiku_names_are_those_of_the_conversion() -> None:
    names = haiku_names(VARIANTS["nfnet-f0"].config)
    rows = re.findall(
        r"^\| `(NFNet/.*)` \| `(\w+)` \| `(.*)` \|$", (ROOT / "docs/migrate-jax.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 12
    assert {key: names[key] for _, _, key in rows} == {key: (module, name) for module, name, key in rows}
