"""The resize copies no pixel that no output weighs; what it computes of a part is that part of the whole."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from nfzoo.transforms import resize
from nfzoo.transforms.resize import tf_bicubic
from tests.support.loops import each


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


@each(("height", "width"), [(40, 30), (30, 90), (7, 400), (400, 7), (1, 1), (1, 300)])
@each(("side", "centre"), [(20, 20), (24, 13), (33, 10), (50, 1)])
def test_the_centre_is_that_of_the_whole(height: int, width: int, side: int, centre: int) -> None:
    pixels = noise(height, width)
    first = round((side - centre) / 2)
    whole = tf_bicubic(pixels, side, side)
    part = whole[first : first + centre, first : first + centre]
    assert np.array_equal(tf_bicubic(pixels, side, side, centre=centre), part)


@each("channels", [1, 3])
@each("band", [1, 50, 200, 1 << 22])
def test_an_image_and_its_parts_are_the_arrays(channels: int, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(60, 50, channels)
    image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    with monkeypatch.context() as patch:
        patch.setattr(resize, "_BAND", band)
        for left, top, right, bottom in ((0, 0, 50, 60), (3, 5, 50, 60), (0, 0, 49, 1), (10, 20, 11, 60)):
            box, part = (left, top, right, bottom), np.ascontiguousarray(pixels[top:bottom, left:right])
            expected = tf_bicubic(part, 9, 8)
            assert np.array_equal(tf_bicubic(image, 9, 8, box=box), expected)
            assert np.array_equal(tf_bicubic(pixels, 9, 8, box=box), expected)


@each("shape", [(1, 1 << 20), (1 << 20, 1), (3000, 3000)])
def test_memory_depends_on_the_output(shape: tuple[int, int]) -> None:
    image = Image.new("RGB", (shape[1], shape[0]), (7, 8, 9))
    tracemalloc.start()
    try:
        result = tf_bicubic(image, 288, 288, centre=256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20  # an array of bytes for one band, and for the rows and columns that have a weight
    np.testing.assert_allclose(result, np.broadcast_to([7.0, 8.0, 9.0], result.shape), rtol=1e-6)
