"""Corruptions of images at five severities, to measure robustness.

Names and constants are those of ImageNet-C where it has the corruption; the angles of `rotation` are our own.
ImageNet-C is made for images of 224 pixels: the radius of the blur is scaled to other sides.

Source: arXiv 1903.12261, and the code released with it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from nfzoo.errors import ConfigError, nearest

SEVERITIES = (1, 2, 3, 4, 5)

_SIDE = 224  # pixels, for which the radius is


class Corruption(NamedTuple):
    """A corruption at a severity from 1 to 5. The seed and the image's index determine what is drawn at random."""

    name: str
    severity: int
    seed: int = 0

    @property
    def strength(self) -> float:
        """The constant of the severity: see `KINDS`."""
        return KINDS[self.name].strengths[self.severity - 1]


class Kind(NamedTuple):
    """A kind of corruption: five strengths, their meaning, and the function of an image, a strength and a generator."""

    strengths: tuple[float, ...]
    meaning: str
    apply: Callable[[Image.Image, float, np.random.Generator], Image.Image]


def corrupt(pixels: np.ndarray, corruption: Corruption, index: int) -> np.ndarray:
    """Corrupt grey levels `(H, W, C)`, uint8, of the image with this index in its data; C is 1 or 3.

    Raises:
        ConfigError: for an unknown name or severity.
    """
    kind = KINDS.get(corruption.name)
    if kind is None:
        raise ConfigError(f"there is no corruption {corruption.name!r}{nearest(corruption.name, KINDS)}")
    if corruption.severity not in SEVERITIES:
        raise ConfigError(f"severities are whole numbers from 1 to 5, not {corruption.severity!r}")
    number = list(KINDS).index(corruption.name)
    rng = np.random.default_rng([corruption.seed, index, number, corruption.severity])
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(kind.apply(image, corruption.strength, rng)).reshape(pixels.shape)


def _blur(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma * min(image.size) / _SIDE))


def _noise(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    levels = np.asarray(image) + 255 * deviation * rng.standard_normal(np.asarray(image).shape)
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    with Image.open(file) as decoded:
        decoded.load()
        return decoded


def _pixelate(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    small = image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


def _rotate(image: Image.Image, degrees: float, rng: np.random.Generator) -> Image.Image:
    """Rotate to either side; what comes in at the corners is the image's reflection."""
    turned = degrees if rng.random() < 0.5 else -degrees
    levels = np.asarray(image)
    height, width = levels.shape[:2]
    border = [(height // 2, height // 2), (width // 2, width // 2), (0, 0)][: levels.ndim]
    padded = Image.fromarray(np.pad(levels, border, mode="symmetric"))
    left, top = border[1][0], border[0][0]
    return padded.rotate(turned, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))


KINDS: dict[str, Kind] = {
    "gaussian_blur": Kind((1, 2, 3, 4, 6), "standard deviation in pixels of an image of 224", _blur),
    "gaussian_noise": Kind((0.08, 0.12, 0.18, 0.26, 0.38), "standard deviation, as a share of the grey levels", _noise),
    "jpeg_compression": Kind((25, 18, 15, 10, 7), "quality", _jpeg),
    "pixelate": Kind((0.6, 0.5, 0.4, 0.3, 0.25), "share of the side's pixels that are left", _pixelate),
    "rotation": Kind((5, 10, 15, 30, 45), "degrees, to either side", _rotate),
}
"""The corruptions by name; their order is a key of what is drawn at random, so new ones come last."""
