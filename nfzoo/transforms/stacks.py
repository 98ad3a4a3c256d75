"""Crop and resize many grey images of one size at a time.

One small image at a time costs a hundred calls of NumPy, each of which takes longer than its arithmetic. The numbers
are those of `preprocess`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nfzoo.config import Preprocessing
from nfzoo.transforms.crops import distorted_box
from nfzoo.transforms.preprocess import normalize
from nfzoo.transforms.resize import tf_bicubic_taps


def stackable(preprocessing: Preprocessing) -> bool:
    """Return whether grey images become this model's input here: by TensorFlow's bicubic, in one or three channels."""
    return preprocessing.resize == "deepmind" and len(preprocessing.mean) in (1, 3)


def training_crops(
    levels: np.ndarray,
    preprocessing: Preprocessing,
    rngs: Sequence[np.random.Generator],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    size: int,
) -> Tensor:
    """Return `preprocess.training_crop` of grey images, float32 `(n, C, size, size)`; channels share their memory.

    Args:
        levels: grey levels of the images, uint8 `(n, H, W)`.
        rngs: the source of each image's randomness.
        scale, ratio, flip, size: see `training_crop`.
    """
    height, width = levels.shape[1:]
    kept = size / (size + preprocessing.margin)
    down, across = [], []
    for rng in rngs:
        left, top, right, bottom = distorted_box(width, height, rng, scale=scale, ratio=ratio, kept=kept)
        index, weight = tf_bicubic_taps(bottom - top, size, size)
        down.append((index + top, weight))
        index, weight = tf_bicubic_taps(right - left, size, size)
        step = -1 if rng.random() < flip else 1
        across.append(((index + left)[::step], weight[::step]))
    return _channels(torch.from_numpy(_resized(levels, _stacked(down), _stacked(across))), preprocessing)


def evaluation_transforms(levels: np.ndarray, preprocessing: Preprocessing, *, size: int) -> Tensor:
    """Return `preprocess.evaluation_transform` of grey images uint8 `(n, H, W)`, float32 `(n, C, size, size)`."""
    side = size + preprocessing.margin
    down, across = (_stacked([tf_bicubic_taps(length, side, size)]) for length in levels.shape[1:])
    pixels = _resized(levels, down, across)
    channels = np.broadcast_to(pixels[..., None], (*pixels.shape, len(preprocessing.mean)))
    rows = normalize(channels.reshape(-1, size, channels.shape[-1]), preprocessing)
    return rows.unflatten(1, (-1, size)).transpose(0, 1)


def _stacked(taps: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([index for index, _ in taps]), np.stack([weight for _, weight in taps])


def _channels(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    return pixels[:, None].expand(-1, len(preprocessing.mean), -1, -1)


def _resized(
    levels: np.ndarray, down: tuple[np.ndarray, np.ndarray], across: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Resize images `(n, H, W)` by the taps of their rows and columns, `(n, size, 4)` or `(1, size, 4)` for all."""
    rows = _sums(levels.astype(np.float32), *down)
    columns = _sums(np.ascontiguousarray(rows.swapaxes(1, 2)), *across)
    return np.ascontiguousarray(columns.swapaxes(1, 2))


def _sums(rows: np.ndarray, index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Resize the second of three axes, adding the four taps in TensorFlow's order."""
    image = np.arange(len(rows))[:, None]
    result = rows[image, index[..., 0]]
    result *= weight[..., 0, None]
    for k in range(1, 4):
        taken = rows[image, index[..., k]]
        taken *= weight[..., k, None]
        result += taken
    return result
