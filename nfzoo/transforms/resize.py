"""TensorFlow's bicubic resize, which no other library computes.

torch's has another kernel (a = -0.75), and Pillow's is antialiased.
"""

from __future__ import annotations

import functools

import numpy as np

from nfzoo.config import is_int
from nfzoo.errors import DataError

_TABLE = 1024  # TensorFlow, resize_bicubic_op.cc: kTableSize


def tf_bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize `(H, W, C)` to float32 `(height, width, C)` as TensorFlow's bicubic, without antialiasing or clamping.

    Output i lies at `x = (i + 1/2) * H / height - 1/2` and sums the four pixels around x with Keys' kernel, a = -0.5:

        w(d) = 3/2 d³ - 5/2 d² + 1              for d <= 1
        w(d) = -1/2 d³ + 5/2 d² - 4 d + 2       for 1 < d < 2

    where `d = |x - pixel|`, and `x - floor(x)` is rounded to a multiple of 1/1024. Pixels outside the image have weight
    0, and the weights of the others are divided by their sum.

    Source: `tf.image.resize(..., "bicubic")`, tensorflow/core/kernels/image/resize_bicubic_op.cc; R. G. Keys, 1981.
    """
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise DataError(f"the pixels to resize must be (H, W, C), not {tuple(pixels.shape)}")
    check_size(height)
    check_size(width)
    length, breadth, channels = pixels.shape
    # NumPy is fast on contiguous rows, so the second pass works on the transposed image.
    rows = _taps(np.ascontiguousarray(pixels).reshape(length, -1), height).reshape(height, breadth, channels)
    columns = _taps(np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(breadth, -1), width)
    return columns.reshape(width, height, channels).swapaxes(0, 1)


def _taps(rows: np.ndarray, size: int) -> np.ndarray:
    """Resize the first of two axes, adding the four taps in TensorFlow's order."""
    index, weight = _bicubic_weights(len(rows), size)
    shape = (size, rows.shape[1])
    result, scaled, taken = np.zeros(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, rows.dtype)
    for k in range(4):
        np.take(rows, index[:, k], axis=0, out=taken, mode="clip")  # "clip" avoids a second buffer; no index is outside
        np.multiply(taken, weight[:, k, None], out=scaled)
        result += scaled
    return result


@functools.lru_cache(maxsize=256)
def _bicubic_weights(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return source pixels and float32 weights, both `(size, 4)`, in float32 arithmetic throughout as in TensorFlow.

    They are kept for the next image of this length: do not write into them.
    """
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
