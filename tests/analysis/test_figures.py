"""The pictures: that they are written whole, show what they should, and refuse what they cannot show."""

import builtins
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nfzoo.analysis.sheets
import nfzoo.analysis.style
from nfzoo.analysis.figures import MissingPlotsError, signal_propagation, training_curves
from nfzoo.analysis.sheets import SheetEntry, prediction_sheet
from nfzoo.analysis.signal_propagation import SignalMetrics, signal_metrics
from nfzoo.config import NFNetConfig
from nfzoo.errors import DataError
from nfzoo.model import init

RED = Image.new("RGB", (40, 20), (255, 0, 0))
BLUE_BAR = (0x25, 0x63, 0xC9)


def count(path: Path, colour: tuple[int, int, int]) -> int:
    with Image.open(path) as image:
        return int((np.asarray(image.convert("RGB")) == colour).all(axis=2).sum())


def row(epoch: int, **changes: object) -> dict:
    accuracy = 1 - 0.5**epoch
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": 1 / epoch,
        "train_accuracy": accuracy,
        "lr": 0.1,
        "clipped": 0.0,
        "images_per_second": 100.0,
        "accuracy": accuracy,
        "ema_accuracy": accuracy / 2,
        "loss": 0.9 / epoch,
        "ema_loss": 0.8 / epoch,
        **changes,
    }


# -- prediction sheets


# -- augmented batches


# -- training curves


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("epochs", [1, 2, 60])
def test_training_curves(tmp_path: Path, epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [row(e) for e in range(1, epochs + 1)])
    with caplog.at_level(logging.WARNING):
        training_curves(metrics, tmp_path / "curves.png")
    assert caplog.records == []
    for colour in (nfzoo.analysis.style.BLUE, nfzoo.analysis.style.ORANGE, nfzoo.analysis.style.QUIET):
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert count(tmp_path / "curves.png", rgb) > 20  # type: ignore[arg-type]


def test_what_is_not_measured_is_not_drawn(tmp_path: Path) -> None:
    rows = [row(e, ema_accuracy=None, ema_loss=None) for e in (1, 2, 3)]
    training_curves(write(tmp_path / "m.jsonl", rows), tmp_path / "c.png")
    assert count(tmp_path / "c.png", BLUE_BAR) == 0
    for r in rows:
        del r["ema_accuracy"], r["ema_loss"]
    rows[1]["loss"] = math.nan
    training_curves(write(tmp_path / "m.jsonl", rows), tmp_path / "d.png")
    assert count(tmp_path / "d.png", BLUE_BAR) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no epochs"),
        ('{"epoch": 1}\n{"epoch": ', "line 2 of .* is not JSON"),
        ("[1]", "line 1 of .* must be an object"),
        ('{"loss": 1}', "must be an object with an 'epoch'"),
        ('{"epoch": 1, "loss": "low"}', "line 1 of .* 'loss' must be a number"),
        ('{"epoch": "one"}', "line 1 of .* 'epoch' must be a number"),
    ],
)
def test_damaged_metrics(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        training_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_missing_metrics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*m\.jsonl"):
        training_curves(tmp_path / "m.jsonl", tmp_path / "c.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    metrics = write(tmp_path / "m.jsonl", [row(1)])
    with pytest.raises(MissingPlotsError, match=r"pip install 'nfzoo\[plots\]'"):
        training_curves(metrics, tmp_path / "c.png")
    prediction_sheet([SheetEntry(RED, "a", [("red", 0.5)])], tmp_path / "s.png")  # needs Pillow alone


def test_no_backend_is_chosen(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    training_curves(write(tmp_path / "m.jsonl", [row(1)]), tmp_path / "c.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


# -- signal propagation


def test_signal_propagation(tmp_path: Path) -> None:
    cfg = NFNetConfig(depths=(1, 2, 1, 1), widths=(16, 16, 32, 32), group_width=8, stem_width=16, num_classes=2)
    generator = torch.Generator().manual_seed(0)
    metrics = signal_metrics(cfg, init(cfg, generator=generator), torch.randn(2, 3, 64, 64, generator=generator))
    for title in ("", "a$\\frac$b\x1b\n\udcff"):  # as a formula, that would be a wrong one
        signal_propagation(metrics, tmp_path / "s.png", title=title)
    assert count(tmp_path / "s.png", BLUE_BAR) > 100
    assert count(tmp_path / "s.png", (0xD9, 0x73, 0x0D)) > 50


def test_signal_propagation_of_anything_finite(tmp_path: Path) -> None:
    def metrics(*values: float) -> list[SignalMetrics]:
        tensors = [torch.tensor(v) for v in values]
        return [SignalMetrics(f"stages.{i // 2}.{i}", v, v, v if i else None) for i, v in enumerate(tensors)]

    for values in ((1.0,), (0.0, 0.0), (1e-8, 1.0, 1e8), (math.nan, 1.0), tuple([1.0] * 200)):
        signal_propagation(metrics(*values), tmp_path / "s.png")
    with pytest.raises(DataError, match="no signal metrics"):
        signal_propagation([], tmp_path / "s.png")
