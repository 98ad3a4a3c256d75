"""RandAugment: sixteen operations on batches of 8-bit images, on the device that holds them.

An operation maps uint8 `(n, C, H, W)`, with C 1 or 3, to the same shape and dtype. The result for an image does not
depend on its batch. Operations compute in integers, or in float32 steps that round alike on every device. The host
chooses the operations, so it never waits for the device.

Source: the code released with arXiv 2102.06171, autoaugment.py; arXiv 1909.13719.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nfzoo.errors import DataError

FILL = 128
"""Grey level of pixels that an operation uncovers or cuts out."""

# Constants at magnitude 10. Source: the code released with arXiv 2102.06171, level_to_arg and its hparams.
_DEGREES, _SHEAR, _TRANSLATE, _CUTOUT = 30.0, 0.3, 100.0, 40
_BITS, _THRESHOLD, _ADDITION = 4, 256, 110

_CHUNK = 8  # images that a CPU handles at a time: several times faster than a batch that exceeds its cache

_THIRTEENTH, _FIVE_THIRTEENTHS = (float(np.float32(k) / np.float32(13)) for k in (1, 5))


def auto_contrast(images: Tensor, level: float) -> Tensor:
    """Stretch each channel to 0..255: `255 / (hi - lo) * (x - lo)`; a constant channel stays."""
    low, high = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    varies = high > low
    scale = torch.where(varies, 255 / (high - low).clamp(min=1), 1.0)
    offset = torch.where(varies, -low * scale, 0.0)
    return images.float().mul_(scale).add_(offset).clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor, level: float) -> Tensor:
    """Spread the grey levels of each channel so that they are about equally frequent.

    Let `c(v)` be the number of pixels below level v, hi the highest level that occurs, and
    `step = floor(c(hi) / 255)`:

        v -> min(floor((c(v) + floor(step / 2)) / step), 255), and v -> v for a step of 0
    """
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones((), dtype=torch.int32, device=images.device).expand_as(pixels))
    below = counts.cumsum(2, dtype=torch.int32) - counts
    step = below.gather(2, pixels.amax(2, keepdim=True)) // 255
    spread = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, spread, torch.arange(256, dtype=torch.int32, device=images.device))
    return table.to(torch.uint8).gather(2, pixels).view_as(images)


def invert(images: Tensor, level: float) -> Tensor:
    """Return `255 - x`."""
    return 255 - images


def posterize(images: Tensor, level: float) -> Tensor:
    """Keep the `int(4 l)` highest bits of each value, eight at most."""
    return images & (0xFF << 8 - min(int(level * _BITS), 8) & 0xFF)


def solarize(images: Tensor, level: float) -> Tensor:
    """Invert values of at least `int(256 l) mod 256`; keep those below.

    The papers' networks were trained with this remainder, since TensorFlow casts the threshold to 8 bits. At magnitude
    10 every value is inverted; at 15 the threshold is 128, as at 5.
    """
    return images ^ (images >= int(level * _THRESHOLD) % 256).to(torch.uint8).mul_(255)  # 255 - x is x ^ 255


def solarize_add(images: Tensor, level: float) -> Tensor:
    """Return `min(x + int(110 l), 255)` for values below 128; keep the others."""
    addition = min(int(level * _ADDITION), 255)
    return images + (images < 128) * (255 - images).clamp_(max=addition)


def color(images: Tensor, level: float) -> Tensor:
    """Blend with the image's own grey version; an image of one channel stays as it is."""
    if images.shape[1] == 1:
        return images
    # Rounds in the order of TensorFlow's tf.image.rgb_to_grayscale.
    red, green, blue = (images[:, i : i + 1].float().mul_(1 / 255) for i in range(3))
    grey = red.mul_(0.2989).add_(green.mul_(0.587)).add_(blue.mul_(0.114)).mul_(255.5).floor_()
    return _blend(grey, images, level)


def contrast(images: Tensor, level: float) -> Tensor:
    """Blend with a uniform grey of `min(H W / 256, 255)`.

    The grey is not the image's mean: the released code averages its histogram instead of its pixels.
    """
    return _blend(float(min(images.shape[2] * images.shape[3] // 256, 255)), images, level)


def brightness(images: Tensor, level: float) -> Tensor:
    """Blend with black."""
    return _blend(0.0, images, level)


def sharpness(images: Tensor, level: float) -> Tensor:
    """Blend with the image smoothed by the kernel `(1 1 1; 1 5 1; 1 1 1) / 13`; the outermost pixels stay."""
    if min(images.shape[2:]) < 3:
        return images
    # If the weighted sum of the nine pixels is a multiple of 13, rounding decides between two grey levels. TensorFlow
    # adds row by row with fused multiply-adds, whose products float64 holds exactly. MPS has no float64: a level may
    # differ by 1 there.
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    height, width = images.shape[2] - 2, images.shape[3] - 2
    once, five = images.to(wide).mul_(_THIRTEENTH), images.to(wide).mul_(_FIVE_THIRTEENTHS)
    smooth = once[:, :, :height, :width].to(torch.float32)
    for tap in range(1, 9):
        top, left = divmod(tap, 3)
        product = (five if tap == 4 else once)[:, :, top : top + height, left : left + width]
        smooth = smooth.to(wide).add_(product).to(torch.float32)
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = _blend(smooth.clamp_(0, 255).floor_(), images[:, :, 1:-1, 1:-1], level)
    return result


def _blend(other: Tensor | float, images: Tensor, level: float) -> Tensor:
    """Return `other + (1.8 l + 0.1) (x - other)`, clipped and truncated; level 0.5 changes nothing."""
    factor = level * 1.8 + 0.1
    if factor == 1:
        return images
    return (images.float() - other).mul_(factor).add_(other).clamp_(0, 255).to(torch.uint8)


def cutout(images: Tensor, level: float, centres: Tensor) -> Tensor:
    """Fill a square of half-width `int(40 l)` around the (row, column) in `centres`, `(n, 2)`."""
    half = int(level * _CUTOUT)
    rows, columns = (
        (centres[:, i, None] - half <= pixel) & (pixel < centres[:, i, None] + half)
        for i, pixel in enumerate(torch.arange(side, device=images.device) for side in images.shape[2:])
    )
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], FILL)


def rotate(images: Tensor, level: float, sign: int) -> Tensor:
    """Rotate about the middle by 30 l degrees; positive is clockwise."""
    return _move("rotate", images, sign * level * _DEGREES)


def shear_x(images: Tensor, level: float, sign: int) -> Tensor:
    """Move row y by -0.3 l y pixels along x."""
    return _move("shear_x", images, sign * level * _SHEAR)


def shear_y(images: Tensor, level: float, sign: int) -> Tensor:
    """Move column x by -0.3 l x pixels along y."""
    return _move("shear_y", images, sign * level * _SHEAR)


def translate_x(images: Tensor, level: float, sign: int) -> Tensor:
    """Move by -100 l pixels along x, whatever the image's size."""
    return _move("translate_x", images, sign * level * _TRANSLATE)


def translate_y(images: Tensor, level: float, sign: int) -> Tensor:
    """Move by -100 l pixels along y, whatever the image's size."""
    return _move("translate_y", images, sign * level * _TRANSLATE)


def _move(kind: str, images: Tensor, amount: float) -> Tensor:
    """Take the nearest input pixel for each output pixel, or `FILL` where it lies outside."""
    index, covered, fill = _source(kind, amount, images.shape[2], images.shape[3], images.device)
    moved = images.flatten(2).gather(2, index.expand(*images.shape[:2], -1))
    return moved.mul_(covered).add_(fill).view_as(images)


@lru_cache(maxsize=64)  # each image size has ten
def _source(kind: str, amount: float, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the source of each output pixel as three tensors `(H W,)`: flat index, mask, and fill value.

    The mask is 1, and the fill value 0, where the source lies inside the image; else they are 0 and `FILL`. Coordinates
    are float32, and halves are rounded away from zero, as in TensorFlow's ImageProjectiveTransformV3.
    """
    (a, b, c), (d, e, f) = _affine(kind, np.float32(amount), height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    column, row = (_nearest(p * x + q * y + r) for p, q, r in ((a, b, c), (d, e, f)))
    covered = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = np.where(covered, row * width + column, 0)
    arrays = index, covered.astype(np.uint8), np.where(covered, 0, FILL).astype(np.uint8)
    return tuple(send(torch.from_numpy(array.ravel()), device) for array in arrays)


def _affine(kind: str, amount: np.float32, height: int, width: int) -> tuple[tuple[np.float32, ...], ...]:
    """Return (a, b, c) of `a x + b y + c`, the input's column, and the same of its row."""
    zero, one = np.float32(0), np.float32(1)
    match kind:
        case "shear_x":
            return (one, amount, zero), (zero, one, zero)
        case "shear_y":
            return (one, zero, zero), (amount, one, zero)
        case "translate_x":
            return (one, zero, amount), (zero, one, zero)
        case "translate_y":
            return (one, zero, zero), (zero, one, amount)
    angle = float(amount * np.float32(math.pi / 180))
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    right, bottom, two = np.float32(width - 1), np.float32(height - 1), np.float32(2)
    return (
        (cos, -sin, (right - (cos * right - sin * bottom)) / two),
        (sin, cos, (bottom - (sin * right + cos * bottom)) / two),
    )


def _nearest(position: np.ndarray) -> np.ndarray:
    exact = position.astype(np.float64)
    return np.copysign(np.floor(np.abs(exact) + 0.5), exact).astype(np.int64)


PLAIN: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
"""Operations with a level alone."""

SIGNED: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "Rotate": rotate,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
}
"""Operations with a level and a direction, 1 or -1."""

OPERATIONS = (*PLAIN, *SIGNED, "Cutout")
"""The sixteen names; an operation's number is its index here."""


def apply_operation(
    name: str, images: Tensor, magnitude: float, *, sign: int = 1, centres: Tensor | None = None
) -> Tensor:
    """Apply one of `OPERATIONS` to uint8 images `(n, C, H, W)`, at level `l = magnitude / 10`.

    Args:
        sign: 1 or -1, for an operation of `SIGNED`.
        centres: row and column for Cutout, int64 `(n, 2)`, on the device of the images; by default the middle.
    """
    level = magnitude / 10
    if name in PLAIN:
        return PLAIN[name](images, level)
    if name in SIGNED:
        return SIGNED[name](images, level, sign)
    if centres is None:
        centres = send(torch.tensor(images.shape[2:]) // 2, images.device).expand(len(images), 2)
    return cutout(images, level, centres)


def rand_augment(images: Tensor, operations: Tensor, signs: Tensor, centres: Tensor, magnitude: float) -> Tensor:
    """Apply its own operations, one a layer, to each image of a uint8 batch `(n, C, H, W)`.

    Args:
        operations: numbers of `OPERATIONS`, int64 `(n, layers)`, on the CPU.
        signs: 1 or -1, int64 `(n, layers)`, on the CPU.
        centres: row and column of Cutout, int64 `(n, layers, 2)`, on the CPU.

    Raises:
        DataError: for images that are not uint8, or have other than 1 or 3 channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"RandAugment takes uint8 images (n, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}; "
            "clip grey levels to 0..255 and cast them"
        )
    if images.device.type == "cpu" and len(images) > _CHUNK:
        parts = [slice(i, i + _CHUNK) for i in range(0, len(images), _CHUNK)]
        return torch.cat([rand_augment(images[p], operations[p], signs[p], centres[p], magnitude) for p in parts])
    # On the host: in each layer, sort the images by kind of operation, so that equal kinds are contiguous.
    signed = np.array([name in SIGNED for name in OPERATIONS])
    numbers = operations.numpy()
    kinds = 2 * numbers + (signed[numbers] & (signs.numpy() < 0))
    rows = np.arange(len(images))  # the images in their present order
    orders, sorted_centres, groups = [], [], []
    for layer in range(kinds.shape[1]):
        order = np.argsort(kinds[rows, layer], kind="stable")
        rows = rows[order]
        orders.append(order)
        sorted_centres.append(centres.numpy()[rows, layer])
        groups.append(np.unique(kinds[rows, layer], return_index=True))
    order_of = send(torch.from_numpy(np.stack([*orders, np.argsort(rows)])), images.device)
    centres_of = send(torch.from_numpy(np.stack(sorted_centres)), images.device) if sorted_centres else ()
    # On the device: in each layer, sort, apply each kind to its images, and in the end restore the first order.
    for order, centre, (present, starts) in zip(order_of, centres_of, groups, strict=False):
        cuts = starts[1:].tolist()
        parts = zip(
            present.tolist(),
            images.index_select(0, order).tensor_split(cuts),
            centre.tensor_split(cuts),
            strict=True,
        )
        images = torch.cat(
            [
                apply_operation(OPERATIONS[kind // 2], part, magnitude, sign=1 - 2 * (kind % 2), centres=at)
                for kind, part, at in parts
            ]
        )
    return images.index_select(0, order_of[-1])


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to the device without waiting for the device's pending work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
