"""The README's figures are those of the code; test_pages.py runs its commands and its Python."""

import re
from pathlib import Path

import pytest

from nfzoo import model
from nfzoo.cli.main import main
from nfzoo.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_table_of_models() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) M \| ([\d.]+) G \| (\d+) / (\d+) \| ([\d.]*)", README, re.MULTILINE)
    assert len(rows) >= 14
    for name, parameters, macs, train, test, top1 in rows:
        row = VARIANTS[name]
        size = row.preprocessing.test_size
        assert f"{model.parameter_count(row.config) / 1e6:.1f}" == parameters, name
        assert f"{model.mac_count(row.config, size) / 1e9:.2f}" == macs, name
        assert (row.preprocessing.train_size, size) == (int(train), int(test)), name
        assert row.top1 == (float(top1) if top1 else None), name
    assert f"all {len(VARIANTS)}," in README


def test_stages_are_shown_as_info_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nfnet-f1"]) == 0
    assert section("Three uses").split("```\nstage ")[1].split("```")[0] in capsys.readouterr().out
