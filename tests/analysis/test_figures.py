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

import nfzoo.analysis.figures
from nfzoo.analysis.figures import (
    MissingPlotsError,
    SheetEntry,
    augmentation_sheet,
    prediction_sheet,
    signal_propagation,
    thumbnail,
    training_curves,
)
from nfzoo.analysis.signal_propagation import SignalMetrics, signal_metrics
from nfzoo.config import NFNetConfig, Preprocessing
from nfzoo.errors import DataError, printable
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


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


# -- prediction sheets


def test_bars_are_as_long_as_probabilities(tmp_path: Path) -> None:
    pixels = []
    for p in (0.0, 0.25, 0.5, 1.0):
        prediction_sheet([SheetEntry(RED, "a.png", [("red", p)])], tmp_path / "s.png")
        pixels.append(count(tmp_path / "s.png", BLUE_BAR))
    assert pixels[0] == 0
    np.testing.assert_allclose(np.divide(pixels[1:], pixels[3]), (0.25, 0.5, 1.0), atol=0.02)  # round ends


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_every_image_is_on_the_sheet_once(tmp_path: Path, n: int) -> None:
    prediction_sheet([SheetEntry(RED, f"{i}.png", [("red", 0.9)]) for i in range(n)], tmp_path / "s.png")
    assert count(tmp_path / "s.png", (255, 0, 0)) == n * 256 * 128


def test_of_many_images_the_first_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfzoo.analysis.figures, "SHEET_LIMIT", 4)
    prediction_sheet([SheetEntry(RED, "a", [("red", 1.0)])] * 9, tmp_path / "s.png")
    assert count(tmp_path / "s.png", (255, 0, 0)) == 4 * 256 * 128


def test_text_differs_where_names_do_and_never_leaves_its_card(tmp_path: Path) -> None:
    def sheet(title: str, label: str) -> bytes:
        prediction_sheet([SheetEntry(RED, title, [(label, 0.5)])], tmp_path / "s.png")
        with Image.open(tmp_path / "s.png") as image:
            return image.tobytes()

    assert len({sheet("a.png", "cat"), sheet("b.png", "cat"), sheet("a.png", "dog")}) == 3
    sheet("x" * 5000 + ".png", "a label of many words " * 100)
    with Image.open(tmp_path / "s.png") as image:
        right = np.asarray(image.convert("L"))[:, -17:]  # outside the card
    assert right.min() == right.max()


def test_odd_names_are_drawn(tmp_path: Path) -> None:
    for text in ("", "line\nbreak", "\udcff", "\x1b[31mred", "图像", "naïve — “quoted”"):
        prediction_sheet([SheetEntry(RED, text, [(text, 0.5)])], tmp_path / "s.png", title=text)
    assert printable("a\x1b[0m\n\udcffé") == "a�[0m��é"


def test_thumbnails_keep_the_aspect() -> None:
    assert thumbnail(Image.new("L", (10, 20))).size == (128, 256)
    assert thumbnail(Image.new("RGB", (4000, 3))).size == (256, 1)
    checks = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
    assert set(np.unique(np.asarray(thumbnail(checks)))) == {0, 255}  # magnified pixel by pixel


def test_sheets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one image"):
        prediction_sheet([], tmp_path / "s.png")
    with pytest.raises(DataError, match=r"must end in \.png"):
        prediction_sheet([SheetEntry(RED, "a", [])], tmp_path / "s.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_sheet_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.png").write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        prediction_sheet([SheetEntry(RED, "a", [("red", 0.5)])], tmp_path / "s.png")
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]
    assert (tmp_path / "s.png").read_text() == "old"


# -- augmented batches

PLAIN = Preprocessing(train_size=8, test_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def normalized(colour: tuple[int, int, int], n: int = 1) -> torch.Tensor:
    x = (torch.tensor(colour) / 255 - torch.tensor(PLAIN.mean)) / torch.tensor(PLAIN.std)
    return x.view(1, 3, 1, 1).expand(n, 3, 8, 8)


@pytest.mark.parametrize("n", [1, 6, 30, 33])
def test_a_batch_is_shown_in_its_true_colours(tmp_path: Path, n: int) -> None:
    augmentation_sheet(normalized((200, 10, 77), n), tmp_path / "s.png", preprocessing=PLAIN)
    assert count(tmp_path / "s.png", (200, 10, 77)) == min(n, nfzoo.analysis.figures.AUGMENTED_LIMIT) * 256 * 256


def test_shares_of_mixed_labels_are_shown_as_bars(tmp_path: Path) -> None:
    def sheet(targets: torch.Tensor, **options: object) -> bytes:
        x = normalized((200, 10, 77))
        augmentation_sheet(x, tmp_path / "s.png", preprocessing=PLAIN, targets=targets, **options)  # type: ignore[arg-type]
        with Image.open(tmp_path / "s.png") as image:
            return image.tobytes()

    sheet(torch.tensor([[0.0, 0.25, 0.75]]))
    first, second = count(tmp_path / "s.png", BLUE_BAR), count(tmp_path / "s.png", (0xA8, 0xC2, 0xEC))
    np.testing.assert_allclose(second / first, 1 / 3, atol=0.02)  # round ends
    assert sheet(torch.tensor([2])) == sheet(torch.tensor([[0.0, 0.0, 1.0]])) != sheet(torch.tensor([1]))
    assert sheet(torch.tensor([2]), classes=("a", "b", "class 2")) == sheet(torch.tensor([2]))


def test_greyscale_and_overshooting_images(tmp_path: Path) -> None:
    grey = Preprocessing(train_size=8, test_size=8, mean=(0.5,), std=(0.5,))
    x = torch.stack([torch.full((1, 8, 8), v) for v in (-1.5, 1.5)])
    augmentation_sheet(x, tmp_path / "s.png", preprocessing=grey)
    assert count(tmp_path / "s.png", (0, 0, 0)) == 256 * 256


@pytest.mark.parametrize(
    ("x", "targets", "name", "message"),
    [
        (torch.zeros(2, 1, 8, 8), None, "s.png", r"of the preprocessing's 3 channels.*\(2, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), None, "s.png", r"a batch \(n, C, H, W\)"),
        (torch.zeros(0, 3, 8, 8), None, "s.png", "at least one image"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3), "s.png", r"targets \(3,\) are not of these 2 images"),
        (torch.zeros(2, 3, 8, 8), None, "s.jpg", r"must end in \.png"),
    ],
)
def test_batches_that_cannot_be_shown(
    tmp_path: Path, x: torch.Tensor, targets: torch.Tensor | None, name: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        augmentation_sheet(x, tmp_path / name, preprocessing=PLAIN, targets=targets)
    assert list(tmp_path.iterdir()) == []


# -- training curves


@pytest.mark.parametrize("epochs", [1, 2, 60])
def test_training_curves(tmp_path: Path, epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [row(e) for e in range(1, epochs + 1)])
    with caplog.at_level(logging.WARNING):
        training_curves(metrics, tmp_path / "curves.png")
    assert caplog.records == []
    for colour in (nfzoo.analysis.figures.BLUE, nfzoo.analysis.figures.ORANGE, nfzoo.analysis.figures.QUIET):
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
    signal_propagation(metrics, tmp_path / "s.png")
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
