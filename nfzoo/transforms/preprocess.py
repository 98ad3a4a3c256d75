"""Images to tensors: decoding, the two evaluation rules, and the random crop of training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nfzoo.config import Preprocessing
from nfzoo.errors import DataError
from nfzoo.transforms.crops import distorted_box, random_box
from nfzoo.transforms.decode import MODES
from nfzoo.transforms.resize import check_size, tf_bicubic

# An image with a larger aspect ratio is cropped to this one before it is resized. Otherwise a line of 1 x 100000 pixels
# would be scaled up to gigabytes, of which the centre crop keeps one square.
_MAX_ASPECT = 32
_MOST_PIXELS = 1 << 27  # of a resized image, which have a smaller aspect ratio where its shorter edge is above 2048


def evaluation_transform(image: Image.Image, preprocessing: Preprocessing, *, size: int | None = None) -> Tensor:
    """Turn an image from `open_image` into the model's input, float32 `(C, size, size)`.

    `"deepmind"` resizes the whole image to a square of side `size + margin` by `tf_bicubic`; the aspect is not kept.
    `"shortest-edge"` resizes the shorter edge to `floor(size / crop)` by Pillow's antialiased bicubic. Both then take
    the centre crop, and `(pixel / 255 - mean) / std`.

    Args:
        size: side of the result in pixels; `preprocessing.test_size` by default.

    Source: the code released with arXiv 2102.06171; timm 1.0 with torchvision's roundings.
    """
    return normalize(evaluation_pixels(image, preprocessing, size=size), preprocessing)


def evaluation_pixels(image: Image.Image, preprocessing: Preprocessing, *, size: int | None = None) -> np.ndarray:
    """Return the grey levels `(size, size, C)` that `evaluation_transform` normalises, uint8 or float32."""
    size = check_size(preprocessing.test_size if size is None else size)
    _check_mode(image, preprocessing)
    if preprocessing.resize == "deepmind":
        side = size + preprocessing.margin
        return tf_bicubic(image, side, side, centre=size)
    resized = _shorter_edge(image, math.floor(size / preprocessing.crop))
    left, top = (round((n - size) / 2) for n in resized.size)
    return _array(resized.crop((left, top, left + size, top + size)))


def training_crop(
    image: Image.Image,
    preprocessing: Preprocessing,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    size: int | None = None,
) -> Tensor:
    """Crop an image from `open_image` at random, resize it to `(C, size, size)`, and mirror it at random.

    `"deepmind"` resizes the crop of `distorted_box` by `tf_bicubic`. The result is float32 and not clamped: some levels
    are below 0 or above 255. `"shortest-edge"` resizes that of `random_box` by Pillow's antialiased bicubic, to uint8.

    Args:
        rng: source of all randomness.
        scale: least and greatest share of the image's area, in (0, 1].
        ratio: least and greatest width / height.
        flip: probability of a horizontal reflection.
        size: side of the result in pixels; `preprocessing.train_size` by default.

    Source: the code released with arXiv 2102.06171; timm 1.0. The released code mirrors before it resizes, which
    differs only in the rounding of the kernel's table.
    """
    size = check_size(preprocessing.train_size if size is None else size)
    _check_mode(image, preprocessing)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise DataError(f"scale must be two increasing shares in (0, 1], not {scale!r}")
    if not 0 < ratio[0] <= ratio[1]:
        raise DataError(f"ratio must be two increasing positive numbers, not {ratio!r}")
    if not 0 <= flip <= 1:
        raise DataError(f"flip must be a probability, not {flip!r}")
    if preprocessing.resize == "deepmind":
        kept = size / (size + preprocessing.margin)
        box = distorted_box(image.width, image.height, rng, scale=scale, ratio=ratio, kept=kept)
        pixels = tf_bicubic(image, size, size, box=box)
    else:
        box = random_box(image.width, image.height, rng, scale=scale, ratio=ratio)
        pixels = _array(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
    pixels = pixels[:, ::-1] if rng.random() < flip else pixels
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def training_transform(
    image: Image.Image, preprocessing: Preprocessing, rng: np.random.Generator, **options: Any
) -> Tensor:
    """Return a normalised `training_crop`, the model's input, float32 `(C, size, size)`.

    Args:
        options: arguments of `training_crop`.
    """
    pixels = training_crop(image, preprocessing, rng, **options)
    return normalize_batch(pixels[None], preprocessing)[0]


def normalize(pixels: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """Return `(pixel / 255 - mean) / std` of grey levels `(H, W, C)`, as a float32 tensor `(C, H, W)`."""
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def normalize_batch(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return `(pixel / 255 - mean) / std` of grey levels `(N, C, H, W)`, float32, bit-equal to `normalize`."""
    # 255 is a tensor too: a GPU divides by a plain number by multiplying with its rounded reciprocal.
    levels, mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
        for values in ([255.0], preprocessing.mean, preprocessing.std)
    )
    return (pixels.float() / levels - mean) / std


def _shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter edge to `size`; the longer one is rounded down, as in torchvision."""
    width, height = image.size
    limit = max(1, min(_MAX_ASPECT, _MOST_PIXELS // size**2)) * min(width, height)
    if max(width, height) > limit:
        w, h = min(width, limit), min(height, limit)
        left, top = (width - w) // 2, (height - h) // 2
        image = image.crop((left, top, left + w, top + h))
        width, height = w, h
    long = int(size * max(width, height) / min(width, height))
    return image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _check_mode(image: Image.Image, preprocessing: Preprocessing) -> None:
    channels = len(preprocessing.mean)
    if image.mode != MODES.get(channels):
        raise DataError(
            f"the model takes {channels} channels, and the image has mode {image.mode!r}; "
            f"open it with open_image(source, channels={channels})"
        )
