"""Corruptions: what each does, measured by other means, and that seed and image alone determine it."""

import io

import numpy as np
import pytest
from PIL import Image

from nfzoo.errors import ConfigError
from nfzoo.transforms.corruptions import KINDS, SEVERITIES, Corruption, corrupt
from tests.support.loops import each

RANDOM = {"gaussian_noise", "rotation"}


def picture(side: int = 64, channels: int = 3) -> np.ndarray:
    """Smooth shapes with edges."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(7 * x + c) + np.cos(9 * y * x + 2 * c) + (x + y > 0.9) for c in range(channels)]
    return (np.stack(waves, 2) * 45 + 100).clip(0, 255).astype(np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@each(("name", "channels"), [(name, channels) for name in KINDS for channels in (1, 3)])
def test_seed_and_image_determine_it_and_severity_its_strength(name: str, channels: int) -> None:
    pixels = picture(channels=channels)
    before = pixels.copy()
    found = [corrupt(pixels, Corruption(name, s), 5) for s in SEVERITIES]
    assert all(image.shape == pixels.shape and image.dtype == np.uint8 for image in found)
    distances = [distance(image, pixels) for image in found]
    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[-1]
    assert np.array_equal(pixels, before)
    assert np.array_equal(corrupt(pixels, Corruption(name, 3), 5), found[2])
    others = [
        corrupt(pixels, Corruption(name, 3, seed), index) for seed, index in [(1, 5), *((0, i) for i in range(9))]
    ]
    assert any(not np.array_equal(other, found[2]) for other in others) == (name in RANDOM)


def test_noise_has_its_deviation() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    for severity, deviation in ((1, 0.08), (2, 0.12)):  # of which 255 clips nothing
        found = corrupt(grey, Corruption("gaussian_noise", severity), 0).astype(float)
        assert found.std() / 255 == pytest.approx(deviation, rel=0.02)
        assert found.mean() == pytest.approx(128, abs=0.3)
        assert abs(np.corrcoef(found[..., 0].ravel(), found[..., 1].ravel())[0, 1]) < 0.02


def test_blur_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    for side in (112, 224):
        pixels = rng.integers(0, 256, (side, side, 1), np.uint8)
        for severity, sigma in ((2, 2), (4, 4), (5, 6)):
            found = corrupt(pixels, Corruption("gaussian_blur", severity), 0)[20:-20, 20:-20, 0]
            expected = gaussian_filter(pixels[..., 0].astype(float), sigma * side / 224)[20:-20, 20:-20]
            assert distance(found, expected) < 0.12 * expected.std() + 0.3  # Pillow's is three box filters, rounded


def test_fewer_pixels_are_means_of_blocks() -> None:
    pixels = picture(64)
    found = corrupt(pixels, Corruption("pixelate", 2), 0)
    blocks = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.array_equal(found[::2, ::2], found[1::2, 1::2])
    assert np.abs(found[::2, ::2] - blocks).max() <= 1  # Pillow rounds after each direction


def test_jpeg_is_pillows() -> None:
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG", quality=10)
    with Image.open(file) as expected:
        assert np.array_equal(corrupt(picture(), Corruption("jpeg_compression", 4), 0), np.asarray(expected))


def test_rotation_turns_by_its_angle_and_leaves_no_corners() -> None:
    y, x = np.mgrid[:101, :101] - 50
    bar = np.where((np.abs(y) < 4) & (np.abs(x) < 35), 255, 0).astype(np.uint8)[..., None]
    sides = set()
    for index in range(8):
        for severity, degrees in zip(SEVERITIES, (5, 10, 15, 30, 45), strict=True):
            weight = corrupt(bar, Corruption("rotation", severity), index)[..., 0].astype(float)
            slant = 0.5 * np.arctan2(2 * (weight * x * y).sum(), (weight * (x**2 - y**2)).sum())
            assert abs(np.degrees(slant)) == pytest.approx(degrees, abs=0.3)
            sides.add(slant > 0)
    assert sides == {True, False}
    grey = np.full((40, 40, 3), 77, np.uint8)
    assert (corrupt(grey, Corruption("rotation", 5), 0) == 77).all()


def test_what_there_is_not() -> None:
    with pytest.raises(ConfigError, match="no corruption 'gaussian_blurr'; did you mean 'gaussian_blur'"):
        corrupt(picture(), Corruption("gaussian_blurr", 1), 0)
    for severity in (0, 6):
        with pytest.raises(ConfigError, match=f"from 1 to 5, not {severity}"):
            corrupt(picture(), Corruption("pixelate", severity), 0)
