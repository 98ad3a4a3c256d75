"""Images to tensors: decoding, the two evaluation rules, and the random crop of training."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .boxes import distorted_box, random_box
from .config import Preprocessing
from .errors import DataError
from .resize import check_size, tf_bicubic

IMAGE_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""Lower-case endings of the files that a folder of images is taken to hold."""

# Formats that are pixels. Left out are those that Pillow hands to other programs, such as EPS to Ghostscript.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# EXIF tag 0x0112. Source: CIPA DC-008, table of "Orientation".
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# An image longer than this many times its height is cut to that before the shorter edge is scaled up: a line of
# 1 x 100000 pixels would else need gigabytes of which the centre crop keeps one square.
_LONGEST = 32

_MODES = {1: "L", 3: "RGB"}


def open_image(
    source: str | Path | BinaryIO | Image.Image | np.ndarray, *, channels: int = 3, least: int | None = None
) -> Image.Image:
    """An upright 8-bit image, fully loaded, of mode `RGB` (three channels) or `L` (one).

    Transparent pixels are laid over white, 16-bit values are scaled by 255 / 65535, the EXIF orientation is applied,
    and of an animation the first frame is taken. The result carries no metadata.

    Args:
        source: a path, a binary file, a Pillow image, or a `uint8` array of `(H, W)` or `(H, W, 1 | 3 | 4)`.
        least: let the decoder of a JPEG file give a half, a quarter or an eighth of its size, the smallest whose
            shorter side has as many pixels: Pillow's draft mode.

    Raises:
        DataError: for what is absent, damaged, no image, or beyond Pillow's limit of 179 million pixels.
    """
    if channels not in _MODES:
        raise DataError(
            f"images are read with 1 or 3 channels, not {channels}; prepare the input of such a model yourself"
        )
    if isinstance(source, np.ndarray):
        return _convert(_from_array(source), channels)
    name = _name(source)
    try:
        with _silent():
            if isinstance(source, Image.Image):
                return _convert(source, channels)
            Image.init()  # finds the formats that this Pillow was built with
            with Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
                if least is not None:
                    image.draft(None, (least, least))  # does nothing in other formats
                return _convert(image, channels)
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise DataError(f"{name} {_reason(source, error)}") from error


def _convert(image: Image.Image, channels: int) -> Image.Image:
    image.load()
    turn = _turn(image)
    plain = image.copy() if turn is None else image.transpose(turn)
    if plain.mode.startswith("I"):
        plain = _from_16_bit(plain)
    elif plain.mode == "F":
        raise DataError("holds floating-point pixels; save it with 8 or 16 bits a channel")
    elif plain.has_transparency_data:
        plain = plain.convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
    plain = plain if plain.mode == _MODES[channels] else plain.convert(_MODES[channels])
    plain.info = {}  # an orientation that stayed would be applied again
    return plain


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata is no reason to refuse the pixels
        return None


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Modes `I;16*`, and `I`, as which Pillow before 11 opens 16-bit PNG files."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("holds 32-bit pixels; save it with 8 or 16 bits a channel")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    shape = tuple(array.shape)
    if array.dtype != np.uint8:
        raise DataError(
            f"an image array must be uint8 with values from 0 to 255, not {array.dtype}; "
            "if yours runs from 0 to 1, pass (255 * array).round().astype('uint8')"
        )
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        hint = "; move the channels last: array.transpose(1, 2, 0)" if array.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise DataError(f"an image array must be (H, W) or (H, W, 1 | 3 | 4), not {shape}{hint}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if shape[2:] == (1,) else array))


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, Image.Image):
        return os.fsdecode(getattr(source, "filename", "") or "the image")
    if hasattr(source, "read"):
        return str(getattr(source, "name", "the image"))
    kind = type(source).__name__
    raise DataError(f"an image is a path, a binary file, a Pillow image or a uint8 array, not a {kind}")


def _reason(source: object, error: Exception) -> str:
    match error:
        case DataError():
            return str(error)
        case FileNotFoundError():
            return "does not exist"
        case IsADirectoryError():
            return "is a folder, not an image"
        case PermissionError():
            return "may not be read: permission denied"
        case UnidentifiedImageError():
            empty = isinstance(source, str | os.PathLike) and not os.stat(source).st_size
            return "is empty" if empty else "is no image of a known format, or its beginning is damaged"
        case Image.DecompressionBombError():
            return f"is too large ({error}); scale it down first"
        case MemoryError():
            return "does not fit into memory; scale it down first"
    text = " ".join(str(error).split())
    return f"cannot be decoded ({text or type(error).__name__}); it may be damaged or cut off"


@contextmanager
def _silent() -> Iterator[None]:
    """Pillow's warnings (large images, broken metadata) held back; those of others pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        yield


def evaluation_transform(image: Image.Image, preprocessing: Preprocessing, *, size: int | None = None) -> Tensor:
    """The model's input, float32 `(C, size, size)`, of an image from `open_image`.

    `"deepmind"`: the whole image, its aspect not kept, to `(size + margin)` squared by `tf_bicubic`, centre crop.
    `"shortest-edge"`: the shorter edge to `floor(size / crop)` by Pillow's antialiased bicubic, centre crop.
    Then `(pixel / 255 - mean) / std`.

    Args:
        size: side of the result in pixels; `preprocessing.test_size` by default.

    Source: the code released with arXiv 2102.06171; timm 1.0 with torchvision's roundings.
    """
    size = check_size(preprocessing.test_size if size is None else size)
    _check_mode(image, preprocessing)
    if preprocessing.resize == "deepmind":
        side = size + preprocessing.margin
        pixels = tf_bicubic(_array(image), side, side)
    else:
        pixels = _array(_shorter_edge(image, math.floor(size / preprocessing.crop)))
    top, left = (round((n - size) / 2) for n in pixels.shape[:2])
    return normalize(pixels[top : top + size, left : left + size], preprocessing)


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
    """A random part of an image from `open_image`, resized to grey levels `(C, size, size)`, perhaps mirrored.

    `"deepmind"`: the part of `distorted_box` by `tf_bicubic`, float32 and not clamped: some levels are below 0 or above
    255. `"shortest-edge"`: the part of `random_box` by Pillow's antialiased bicubic, uint8.

    Args:
        rng: where all randomness comes from.
        scale: least and greatest share of the image's area, in (0, 1].
        ratio: least and greatest width / height.
        flip: probability of a horizontal reflection.
        size: side of the result in pixels; `preprocessing.train_size` by default.

    Source: the code released with arXiv 2102.06171, which mirrors before the resize: the same but for the rounding of
    the kernel's table; timm 1.0.
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
        pixels = tf_bicubic(_array(image.crop(box)), size, size)
    else:
        box = random_box(image.width, image.height, rng, scale=scale, ratio=ratio)
        pixels = _array(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
    pixels = pixels[:, ::-1] if rng.random() < flip else pixels
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def training_transform(
    image: Image.Image, preprocessing: Preprocessing, rng: np.random.Generator, **options: Any
) -> Tensor:
    """The model's input of a `training_crop`: its grey levels normalised, float32 `(C, size, size)`.

    Args:
        options: of `training_crop`.
    """
    pixels = training_crop(image, preprocessing, rng, **options)
    return normalize_batch(pixels[None], preprocessing)[0]


def normalize(pixels: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """`(pixel / 255 - mean) / std` of grey levels `(H, W, C)`, as a float32 tensor `(C, H, W)`."""
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def normalize_batch(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`(pixel / 255 - mean) / std` of grey levels `(N, C, H, W)`, float32: that of `normalize` to the last bit."""
    # All three are tensors on the device: a GPU multiplies by the rounded reciprocal of a plain number instead.
    levels, mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
        for values in ([255.0], preprocessing.mean, preprocessing.std)
    )
    return (pixels.float() / levels - mean) / std


def _shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter edge is `size`; the other is truncated, as torchvision does it."""
    width, height = image.size
    limit = _LONGEST * min(width, height)
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
    if image.mode != _MODES.get(channels):
        raise DataError(
            f"the model wants {channels} channels and the image has mode {image.mode!r}; "
            f"open it with open_image(source, channels={channels})"
        )
