"""Files of any size: decoded in bounded memory and time, or refused before they are decoded."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfzoo.errors import DataError
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
