"""Files of any kind and size: read by one rule, in bounded memory and time, or refused before they are decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nfzoo
from nfzoo.data.images import ImageFolder
from nfzoo.data.loader import BrokenImageError, evaluation_batches, training_batches
from nfzoo.errors import DataError
from nfzoo.predict import predict
from nfzoo.transforms import decode
from nfzoo.transforms.decode import open_image
from tests.support.loops import each
from tests.support.pictures import png

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16")


def picture(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode in ("I", "I;16"):
        values = rng.integers(0, 1 << 16, (19, 23))
        return Image.fromarray(values.astype(np.int32 if mode == "I" else np.uint16))
    rgba = Image.fromarray(rng.integers(0, 256, (19, 23, 4), np.uint8))
    return rgba.convert(mode) if mode in ("RGBA", "LA") else rgba.convert("RGB").convert(mode)


@each("orientation", [None, *range(1, 9)])
@each("mode", MODES)
@each("channels", [1, 3])
def test_bands_are_converted_as_the_whole_is(
    mode: str, orientation: int | None, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(mode)
    if orientation is not None:
        image.getexif()[0x0112] = orientation
    if mode == "P":
        image.info["transparency"] = 7
    whole = open_image(image, channels=channels)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_BAND", 100)  # four rows
        banded = open_image(image, channels=channels)
    assert banded.size == whole.size == ((19, 23) if orientation in (5, 6, 7, 8) else (23, 19))
    assert (banded.mode, banded.info) == (whole.mode, {})
    assert banded.tobytes() == whole.tobytes()


@each("size", [(1 << 20, 1), (1, 1 << 20)])
def test_the_longest_side(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    path.write_bytes(png(*size))
    assert open_image(path, channels=1).size == size
    longer = max(size) + 1
    path.write_bytes(png(*(longer if n > 1 else 1 for n in size)))
    with pytest.raises(DataError, match=r"line\.png is too large \(.*1,048,577.* pixels\); scale it down"):
        open_image(path)


def test_many_scans_of_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("L", (640, 480), 128).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    assert open_image(io.BytesIO(whole)).size == (640, 480)
    scan = whole[whole.rfind(b"\xff\xc4") : -2]
    assert len(scan) < 100
    bomb = io.BytesIO(whole[:-2] + scan * 14_000 + whole[-2:])
    with pytest.raises(DataError, match=r"has 14,006 scans of 640 x 480 pixels; save it with fewer"):
        open_image(bomb)


# -- one rule for training, evaluation and prediction


def odd_and_plain(odd: Path, plain: Path) -> None:
    """Write odd images, and under the same names the RGB images that they are to be read as."""
    for folder in (odd, plain):
        (folder / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = np.array([[255, 0, 0], [0, 255, 255], [255, 255, 255], [0, 0, 0]], np.uint8)
    # CMYK and palettes hold these four exactly.
    index = rng.integers(0, 4, (40, 56))
    rgb = Image.fromarray(colours[index])
    grey = rng.integers(0, 256, (40, 56), np.uint8)
    opaque = rng.integers(0, 2, (40, 56), np.uint8)

    def write(name: str, image: Image.Image, expected: Image.Image, **options: Any) -> None:
        image.save(odd / "a" / name, **options)
        expected.convert("RGB").save(plain / "a" / f"{Path(name).stem}.png")

    over_white = Image.fromarray(np.where(opaque[..., None] == 1, colours[index], 255).astype(np.uint8))
    rgba = np.dstack([colours[index], 255 * opaque])
    write("alpha.png", Image.fromarray(rgba), over_white)
    write("alpha-webp.webp", Image.fromarray(rgba), over_white, lossless=True, exact=True)
    palette = Image.fromarray(index.astype(np.uint8)).convert("P")
    palette.putpalette(colours.tobytes())
    without_red = Image.fromarray(np.where(index[..., None] == 0, 255, colours[index]).astype(np.uint8))
    write("palette.png", palette, without_red, transparency=0)
    write("cmyk.tif", rgb.convert("CMYK"), rgb)
    write("deep.png", Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey))
    write("deep-tiff.tif", Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    write("turned.png", rgb.transpose(Image.Transpose.ROTATE_90), rgb, exif=exif)
    others = [Image.new("RGB", rgb.size, colour) for colour in ("red", "cyan")]
    write("moves.gif", rgb, rgb, save_all=True, append_images=others)
    write("moves-png.png", rgb, rgb, save_all=True, append_images=others)
    write("pages.tif", rgb, rgb, save_all=True, append_images=others)


def test_odd_images_are_the_same_in_training_evaluation_and_prediction(tmp_path: Path) -> None:
    odd_and_plain(tmp_path / "odd", tmp_path / "plain")
    for folder in ("odd", "plain"):
        (tmp_path / folder / "b").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "b" / "0.png")
    model = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).eval()
    torch.nn.init.normal_(model.get_parameter("head.weight"), generator=torch.Generator().manual_seed(1))
    odd, plain = (ImageFolder.scan(tmp_path / folder) for folder in ("odd", "plain"))
    names = [Path(odd.name(i)).stem for i in range(len(odd))]
    assert names == [Path(plain.name(i)).stem for i in range(len(plain))]
    assert len(names) == 11
    rule = model.preprocessing
    pairs = zip(
        training_batches(odd, rule, epoch=0, seed=0, batch_size=11),
        training_batches(plain, rule, epoch=0, seed=0, batch_size=11),
        strict=True,
    )
    for found, wanted in pairs:
        for row, i in enumerate(found.indices.tolist()):
            assert torch.equal(found.pixels[row], wanted.pixels[row]), names[i]
    ((evaluated, _),), ((expected, _),) = (evaluation_batches(images, rule, batch_size=11) for images in (odd, plain))
    for i, name in enumerate(names):
        assert torch.equal(evaluated[i], expected[i]), name
        assert torch.equal(model.preprocess(odd.name(i)), expected[i]), name
    found, wanted = (predict(model, [images.name(i) for i in range(11)]) for images in (odd, plain))
    assert [p.top for p in found] == [p.top for p in wanted]
    assert len({p.top[0] for p in wanted}) == 5  # of four pictures and the black one


def test_files_that_are_cut_off_are_read_in_no_part_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "pets" / "a"
    folder.mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    model = nfzoo.create("nfnet-test")
    for ending in ("png", "jpg", "gif", "webp", "tif"):
        for path in folder.iterdir():
            path.unlink()
        noise.save(folder / "0.png")
        cut = folder / f"cut.{ending}"
        noise.save(cut)
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
        images = ImageFolder.scan(tmp_path / "pets")
        (batch,) = training_batches(images, model.preprocessing, epoch=0, seed=0, batch_size=2)
        assert batch.indices.tolist() == [0, 0], ending
        assert f"cut.{ending} " in batch.broken[0]
        with pytest.raises(BrokenImageError, match=rf"cut\.{ending} "):
            list(evaluation_batches(images, model.preprocessing, batch_size=2))
        with pytest.raises(DataError, match=rf"cut\.{ending} "):
            predict(model, [folder / "0.png", cut])
