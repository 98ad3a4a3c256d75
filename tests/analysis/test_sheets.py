"""The pictures: that they are written whole, show what they should, and refuse what they cannot show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfzoo.analysis import sheets
from nfzoo.analysis.sheets import SheetEntry, augmentation_sheet, prediction_sheet, thumbnail
from nfzoo.config import Preprocessing
from nfzoo.errors import DataError

RED = Image.new("RGB", (40, 20), (255, 0, 0))
BLUE_BAR = (0x25, 0x63, 0xC9)
PLAIN = Preprocessing(train_size=8, test_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def count(path: Path, colour: tuple[int, int, int]) -> int:
    with Image.open(path) as image:
        return int((np.asarray(image.convert("RGB")) == colour).all(axis=2).sum())


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
    monkeypatch.setattr(sheets, "SHEET_LIMIT", 4)
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


def test_accented_letters_differ(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # for its font
    drawn = set()
    for label in ("Käse", "Kåse", "Kéfir", "Kèfir", "Кот", "Кит"):
        prediction_sheet([SheetEntry(RED, "a.png", [(label, 0.5)])], tmp_path / "s.png")
        with Image.open(tmp_path / "s.png") as image:
            drawn.add(image.tobytes())
    assert len(drawn) == 6


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


def normalized(colour: tuple[int, int, int], n: int = 1) -> torch.Tensor:
    x = (torch.tensor(colour) / 255 - torch.tensor(PLAIN.mean)) / torch.tensor(PLAIN.std)
    return x.view(1, 3, 1, 1).expand(n, 3, 8, 8)


@pytest.mark.parametrize("n", [1, 6, 30, 33])
def test_a_batch_is_shown_in_its_true_colours(tmp_path: Path, n: int) -> None:
    augmentation_sheet(normalized((200, 10, 77), n), tmp_path / "s.png", preprocessing=PLAIN)
    assert count(tmp_path / "s.png", (200, 10, 77)) == min(n, sheets.AUGMENTED_LIMIT) * 256 * 256


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
