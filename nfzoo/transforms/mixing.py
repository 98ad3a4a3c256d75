"""Augment training batches: MixUp and CutMix of pairs, then RandAugment, on the device that holds the batch.

The loader crops and flips single images; this module works on batches of grey levels. All random numbers are drawn
beforehand from the seed, the epoch and the image's index. A batch may therefore be split between any two pairs.

Source: arXiv 2102.06171 and the code released with it, dataset.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.config import Preprocessing, is_int
from nfzoo.errors import ConfigError, DataError
from nfzoo.transforms.randaugment import OPERATIONS, rand_augment, send

MAX_LAYERS, MAX_MAGNITUDE = 16, 20.0

# The last word of a generator's key, which tells these from each other and from the loader's.
_RANDAUGMENT_KEY, _PAIR_KEY = 0x2A06, 0x3177


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Options of the augmentation of training images.

    Each image is cropped, resized and flipped by itself. Then pairs of the batch are mixed. RandAugment comes last.
    With both `mixup` and `cutmix`, half of the batch's pairs get MixUp and the other half CutMix.

    Attributes:
        scale: smallest and largest part of the image's area that a crop covers.
        ratio: smallest and largest ratio of a crop's width to its height.
        flip: probability of a horizontal flip.
        layers: number of operations that RandAugment applies to each image in turn; 0 for none.
        magnitude: strength of RandAugment's operations, 0 to 20.
        mixup: alpha of the distribution Beta(alpha, alpha) of MixUp's ratio; 0 for none.
        cutmix: whether boxes are exchanged between images.
        draft: whether large JPEG photographs are decoded at 1/2, 1/4 or 1/8 of their size. That is faster, and pixels
            differ slightly. It sets the argument `min_side` of `decode.open_image` to twice the training size.

    Source: arXiv 1710.09412 (MixUp), 1905.04899 (CutMix), 1909.13719 (RandAugment). NFNets take a mixup of 0.2, cutmix,
    and four layers of magnitude 5 (F0), 10 (F1, F2) or 15 (F3 to F6).
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    layers: int = 0
    magnitude: float = 10.0
    mixup: float = 0.0
    cutmix: bool = False
    draft: bool = False

    def __post_init__(self) -> None:
        for name, high in (("scale", 1.0), ("ratio", float("inf"))):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
                raise ConfigError(f"{name} must be two rising positive numbers, not {value!r}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip must be a probability, not {self.flip!r}")
        if not is_int(self.layers, 0, MAX_LAYERS):
            raise ConfigError(f"layers must be a whole number from 0 (none) to {MAX_LAYERS}, not {self.layers!r}")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ConfigError(f"magnitude must be from 0 to {MAX_MAGNITUDE:g}, not {self.magnitude!r}")
        if not 0 <= self.mixup < math.inf:
            raise ConfigError(f"mixup must be the alpha of a Beta distribution, or 0 for none; not {self.mixup!r}")
        for name in ("cutmix", "draft"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {value!r}")

    @property
    def mixes(self) -> bool:
        """True if images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix


GENTLE = Augment(scale=(0.7, 1.0), ratio=(0.85, 1.18), flip=0.0)
"""Augmentation of images whose class a flip or a tight crop would change, such as digits."""


class Draws(NamedTuple):
    """The random numbers of one micro-batch of n images, small tensors on the CPU.

    Attributes:
        operations: RandAugment's, as numbers of `randaugment.OPERATIONS`, int64 `(n, layers)`.
        signs: 1 or -1, the direction of an operation, int64 `(n, layers)`.
        centres: row and column of Cutout, int64 `(n, layers, 2)`.
        cut: which images get CutMix, bool `(n,)`; the others get MixUp.
        boxes: top, left, bottom and right of the box that an image keeps in CutMix, int64 `(n, 4)`.
        weights: share of the image itself in the mixture, float32 `(n,)`; its partner has the rest.
    """

    operations: Tensor
    signs: Tensor
    centres: Tensor
    cut: Tensor
    boxes: Tensor
    weights: Tensor


def draw(
    augment: Augment, *, seed: int, epoch: int, indices: Sequence[int] | np.ndarray, offset: int, size: int
) -> Draws:
    """Draw the random numbers for the images `indices` of a data set, which are consecutive rows of a global batch.

    For RandAugment, each image has its own numbers. For MixUp and CutMix, rows 2 k and 2 k + 1 of the global batch are
    partners: one draw, by the index of the first, mixes each into the other. With both, pairs of even k get MixUp. (The
    released code mixes the two halves of a batch of twice the size; each output has the same distribution.)

        MixUp:  weight ~ Beta(alpha, alpha)
        CutMix: a box of side `int(size sqrt(1 - u))`, u uniform, around a uniform pixel, clipped to the image;
                weight = box area / image area

    Args:
        offset: row of the first image in the global batch.
        size: side of the images in pixels.

    Raises:
        ConfigError: if images are to be mixed, and the first or the last of them is without its partner.
    """
    n = len(indices)
    if augment.mixes and (n % 2 or offset % 2):
        raise ConfigError(
            f"MixUp and CutMix mix pairs, and {n} images from row {offset} on would break one; let each process take "
            "an even number of images at a time, or set mixup to 0 and cutmix to false"
        )
    uniform = np.zeros((n, augment.layers, 4))
    if augment.layers:
        for row, index in enumerate(indices):
            uniform[row] = np.random.default_rng([seed, epoch, int(index), _RANDAUGMENT_KEY]).random(uniform.shape[1:])
    integers = torch.from_numpy((uniform * (len(OPERATIONS), 2, size, size)).astype(np.int64))
    cut, boxes, weights = np.zeros(n, bool), np.zeros((n, 4), np.int64), np.ones(n, np.float32)
    if augment.mixes:
        for row in range(0, n, 2):
            rng = np.random.default_rng([seed, epoch, int(indices[row]), _PAIR_KEY])
            pair = slice(row, row + 2)
            cut[pair] = augment.cutmix and (augment.mixup == 0 or (offset + row) // 2 % 2 == 1)
            if cut[row]:
                top, left, bottom, right = boxes[pair] = _box(rng, size)
                weights[pair] = (bottom - top) * (right - left) / size**2
            else:
                weights[pair] = rng.beta(augment.mixup, augment.mixup)
    return Draws(
        integers[..., 0],
        1 - 2 * integers[..., 1],
        integers[..., 2:],
        torch.from_numpy(cut),
        torch.from_numpy(boxes),
        torch.from_numpy(weights),
    )


def _box(rng: np.random.Generator, size: int) -> tuple[int, int, int, int]:
    """Draw a box of CutMix; half its side is rounded down, as in the released code."""
    row, column = rng.integers(size, size=2).tolist()
    half = int(math.sqrt(1 - rng.random()) * size) // 2
    return max(row - half, 0), max(column - half, 0), min(row + half, size), min(column + half, size)


def mix(pixels: Tensor, cut: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
    """Mix each image of `(n, C, H, W)` with its partner, row 2 k with row 2 k + 1, to float32 `m x + (1 - m) partner`.

    In MixUp, m is the image's weight. In CutMix, m is 1 inside the box and 0 outside. The other arguments are fields of
    `Draws`, on the device of the pixels.
    """
    rows, columns = (torch.arange(side, device=pixels.device) for side in pixels.shape[2:])
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    inside = ((top <= rows) & (rows < bottom))[:, :, None] & ((left <= columns) & (columns < right))[:, None, :]
    mask = torch.where(cut[:, None, None], inside.float(), weights[:, None, None])[:, None]
    values = pixels.float()
    return (mask * values).add_((1 - mask) * partners(values))


def mix_labels(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Return `w onehot(label) + (1 - w) onehot(partner's label)`, float32 `(n, num_classes)`.

    Of sets of labels, `(n, num_classes)`, it is `w set + (1 - w) partner's set`, whose labels in common have 1.
    """
    if labels.ndim == 2:
        own, w = labels.float(), weights[:, None]
        return torch.lerp(partners(own), own, w)
    targets = torch.zeros(len(labels), num_classes, device=labels.device)
    targets.scatter_(1, labels[:, None], weights[:, None])
    return targets.scatter_add_(1, partners(labels)[:, None], 1 - weights[:, None])


def partners(rows: Tensor) -> Tensor:
    """Exchange rows 2 k and 2 k + 1."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def augment_batch(
    pixels: Tensor, labels: Tensor, draws: Draws, augment: Augment, *, num_classes: int, preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    """Return the model's input and the loss's targets: mix, apply RandAugment, then `(x / 255 - mean) / std`.

    Before RandAugment, grey levels are clipped to 0..255 and truncated. Label smoothing is left to the loss: the papers
    smooth the mixed labels, as `torch.nn.functional.cross_entropy` does.

    For XLA devices, call this on the CPU. The sizes of RandAugment's groups change with each batch, and each new size
    would be compiled anew.

    Args:
        pixels: grey levels `(n, C, S, S)`, uint8, or float32 that may overshoot; already cropped and flipped.
        labels: int64 `(n,)`, or sets of labels, bool `(n, num_classes)`; on the device of the pixels.
        draws: random numbers for these images, from `draw` with the same `augment` and size.

    Returns:
        Float32 images `(n, C, S, S)`. The targets: float32 `(n, num_classes)`, with rows that sum to 1, if images are
        mixed; else the labels. Of sets of labels float32 `(n, num_classes)`, with values from 0 to 1.

    Raises:
        DataError: if the pixels' dtype or shape does not fit the draws and the preprocessing.
    """
    n, channels = len(draws.weights), len(preprocessing.mean)
    if pixels.dtype not in (torch.uint8, torch.float32):
        raise DataError(f"grey levels are uint8 or float32, not {pixels.dtype}")
    if pixels.ndim != 4 or pixels.shape[:2] != (n, channels) or labels.shape not in ((n,), (n, num_classes)):
        raise DataError(
            f"the draws and the preprocessing are for {n} images of {channels} channels, not for pixels "
            f"{tuple(pixels.shape)} with labels {tuple(labels.shape)}"
        )
    targets = labels if labels.ndim == 1 else labels.float()
    if augment.mixes:
        cut, boxes, weights = (send(t, pixels.device) for t in (draws.cut, draws.boxes, draws.weights))
        pixels, targets = mix(pixels, cut, boxes, weights), mix_labels(labels, weights, num_classes)
    if augment.layers:
        levels = pixels if pixels.dtype == torch.uint8 else pixels.clamp(0, 255).to(torch.uint8)
        pixels = rand_augment(levels, draws.operations, draws.signs, draws.centres, augment.magnitude)
    mean, std = (
        send(torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), pixels.device)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (pixels / 255).sub_(mean).div_(std), targets
