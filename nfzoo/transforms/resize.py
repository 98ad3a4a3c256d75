"""TensorFlow's bicubic resize, which no other library computes.

torch's has another kernel (a = -0.75), and Pillow's is antialiased.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from nfzoo.config import is_int
from nfzoo.errors import DataError

_TABLE = 1024  # TensorFlow, resize_bicubic_op.cc: kTableSize
_BAND = 1 << 22  # pixels of an image that become an array at a time


def tf_bicubic(
    pixels: np.ndarray | Image.Image,
    height: int,
    width: int,
    *,
    box: tuple[int, int, int, int] | None = None,
    centre: int | None = None,
) -> np.ndarray:
    """Resize `(H, W, C)` to float32 `(height, width, C)` as TensorFlow's bicubic, without antialiasing or clamping.

    Output i lies at `x = (i + 1/2) * H / height - 1/2` and sums the four pixels around x with Keys' kernel, a = -0.5:

        w(d) = 3/2 d³ - 5/2 d² + 1              for d <= 1
        w(d) = -1/2 d³ + 5/2 d² - 4 d + 2       for 1 < d < 2

    where `d = |x - pixel|`, and `x - floor(x)` is rounded to a multiple of 1/1024. Pixels outside the image have weight
    0, and the weights of the others are divided by their sum. Of a large image, pixels without weight in any output are
    not copied, so the memory depends on the output alone.

    Args:
        pixels: an array, or an image of mode `RGB` or `L`.
        box: left, top, right and bottom of the part to resize; by default the whole.
        centre: return the central square of this side alone, the same numbers as those in the whole result.

    Source: `tf.image.resize(..., "bicubic")`, tensorflow/core/kernels/image/resize_bicubic_op.cc; R. G. Keys, 1981.
    """
    if isinstance(pixels, np.ndarray) and (pixels.ndim != 3 or 0 in pixels.shape):
        raise DataError(f"the pixels to resize must be (H, W, C), not {tuple(pixels.shape)}")
    check_size(height)
    check_size(width)
    right, bottom = pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])
    part = (0, 0, right, bottom) if box is None else box
    down = _taps(part[3] - part[1], height, centre or height)
    across = _taps(part[2] - part[0], width, centre or width)
    used = _pixels_of(pixels, part, down.used, across.used)
    length, breadth, channels = used.shape
    # NumPy is fast on contiguous rows, so the second pass works on the transposed image.
    rows = _sums(np.ascontiguousarray(used).reshape(length, -1), down)
    rows = rows.reshape(len(rows), breadth, channels)
    columns = _sums(np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(breadth, -1), across)
    return columns.reshape(len(columns), len(rows), channels).swapaxes(0, 1)


def _pixels_of(
    pixels: np.ndarray | Image.Image, box: tuple[int, int, int, int], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return rows and columns of a part of the pixels, `(len(rows), len(columns), C)`.

    A large image becomes an array one band after the other.
    """
    left, top, right, bottom = box
    if isinstance(pixels, np.ndarray):
        return _selected(pixels[top:bottom, left:right], rows, columns)
    step = max(1, _BAND // (right - left))
    parts = []
    for first in range(top, bottom, step):
        last = min(first + step, bottom)
        inside = rows[np.searchsorted(rows, first - top) : np.searchsorted(rows, last - top)]
        if len(inside):
            band = (left, first, right, last)
            image = pixels if band == (0, 0, *pixels.size) else pixels.crop(band)
            array = np.asarray(image)
            parts.append(_selected(array.reshape(*array.shape[:2], -1), inside - (first - top), columns))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _selected(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    pixels = pixels if len(rows) == len(pixels) else pixels[rows]
    return pixels if len(columns) == pixels.shape[1] else pixels[:, columns]


class _Taps(NamedTuple):
    """How one axis is resized.

    Attributes:
        used: source pixels in increasing order, among them all that have a weight.
        taken: positions in `used`, `(size, 4)`.
        weight: float32 `(size, 4)`.
    """

    used: np.ndarray
    taken: np.ndarray
    weight: np.ndarray


def _sums(rows: np.ndarray, taps: _Taps) -> np.ndarray:
    """Resize the first of two axes, adding the four taps in TensorFlow's order."""
    shape = (len(taps.taken), rows.shape[1])
    result, scaled, taken = np.zeros(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, rows.dtype)
    for k in range(4):
        # "clip" avoids a second buffer; no index is outside
        np.take(rows, taps.taken[:, k], axis=0, out=taken, mode="clip")
        np.multiply(taken, taps.weight[:, k, None], out=scaled)
        result += scaled
    return result


@functools.lru_cache(maxsize=256)
def _taps(length: int, size: int, centre: int) -> _Taps:
    """Return the taps of the central `centre` of `size` outputs, kept for the next image: do not write into them."""
    index, weight = _bicubic_weights(length, size)
    first = round((size - centre) / 2)
    index, weight = index[first : first + centre], weight[first : first + centre]
    if length <= 2 * index.size:
        return _Taps(np.arange(length), index, weight)
    used, taken = np.unique(index, return_inverse=True)
    return _Taps(used, taken.reshape(index.shape), weight)


def tf_bicubic_taps(length: int, size: int, centre: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the four source pixels of each output of one axis, and their float32 weights, both `(centre, 4)`.

    `tf_bicubic` adds up the products in this order.

    Args:
        length: source pixels.
        size: outputs.
        centre: how many of them to return, from the middle.
    """
    taps = _taps(length, size, centre)
    return taps.used[taps.taken], taps.weight


def _bicubic_weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return source pixels and float32 weights, both `(size, 4)`, in float32 arithmetic throughout as in TensorFlow."""
    scale = np.float32(length) / np.float32(size)
    x = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    low = np.floor(x)
    step = np.rint((x - low) * np.float32(_TABLE)).astype(np.int64)
    near, far = _kernel()
    weight = np.stack([far[step], near[step], near[_TABLE - step], far[_TABLE - step]], axis=1)
    index = low.astype(np.int64)[:, None] + np.arange(-1, 3)
    weight[(index < 0) | (index >= length)] = 0
    weight *= np.float32(1) / weight.sum(axis=1, keepdims=True)
    return index.clip(0, length - 1), weight


@functools.cache
def _kernel() -> tuple[np.ndarray, np.ndarray]:
    """Return Keys' kernel at d = k / 1024 and at d = 1 + k / 1024."""
    a = -0.5
    d = np.arange(_TABLE + 1) / _TABLE
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    d = d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return near.astype(np.float32), far.astype(np.float32)


def check_size(size: int) -> int:
    """Return the side of an image in pixels; raise a `DataError` unless it is a positive whole number."""
    if not is_int(size, 1):
        raise DataError(f"the size must be a positive number of pixels, not {size!r}")
    return size
