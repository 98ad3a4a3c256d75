"""The embedded handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from PIL import Image

from nfzoo.data.images import Images

DIGITS = "digits"

_SIDE = 32


@dataclass(frozen=True, eq=False)
class Digits(Images[Image.Image]):
    """The embedded 1,797 handwritten digits, as 32x32 greyscale images with white strokes on black.

    Attributes:
        pixels: grey levels 0 to 16 of all digits, `(1797, 8, 8)`.
    """

    pixels: np.ndarray

    @classmethod
    def embedded(cls) -> Digits:
        """Return all digits."""
        with files("nfzoo").joinpath("assets/digits.npz").open("rb") as file, np.load(file) as arrays:
            labels = arrays["labels"].astype(np.int64)
            return cls(np.arange(len(labels)), labels, tuple("0123456789"), arrays["images"])

    @property
    def images(self) -> np.ndarray:
        """Pixels of the selected digits, `(len, 8, 8)`."""
        return self.pixels[self.rows]

    def read_row(self, row: int) -> Image.Image:
        grey = np.round(self.pixels[row] * (255 / 16)).astype(np.uint8)
        return Image.fromarray(grey).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)

    def row_name(self, row: int) -> str:
        return f"digit {row}"

    def stamp(self) -> str:
        return DIGITS
