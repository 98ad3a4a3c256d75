"""The images with which ways to run a model are compared."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.data.loader import evaluation_batches
from nfzoo.data.source import open_all
from nfzoo.errors import DataError
from nfzoo.evaluate import open_labelled
from nfzoo.export.quantize import calibration_batches
from nfzoo.nn import NFNet


class Data(NamedTuple):
    """Images to compute distances with.

    Attributes:
        images: `(N, C, size, size)`, prepared.
        labels: their classes `(N,)`, or `None` where no accuracy can be measured.
        calibration: prepared images for the ranges of int8, or `None`.
        about: what they are, in words.
    """

    images: Tensor
    labels: Tensor | None
    calibration: Tensor | None
    about: str


def random_images(model: NFNet, count: int) -> Data:
    """Return images of random grey levels, normalised, for want of better ones."""
    size, channels = model.preprocessing.test_size, model.config.in_channels
    levels = torch.rand((count, channels, size, size), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    return Data((levels - mean) / std, None, None, "random images")


def images_of(model: NFNet, source: str, count: int) -> Data:
    """Return at most `count` held-out images of a data set, evenly from its beginning to its end.

    The ranges of int8 are taken from the images that training sees. A multi-label model gets no labels.

    Raises:
        DataError: for data that cannot be read, or whose classes are not the model's.
    """
    if model.multi_label:
        images, about = open_all(source), source
    else:
        found = open_labelled(source, model.config.num_classes, model.labels)
        images, about = found.images, found.dataset if found.split is None else f"{found.dataset}, {found.split}"
    if not len(images):
        raise DataError(f"{source!r} has no images to compare with")
    some = images.subset(np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64))
    pixels, labels = zip(*evaluation_batches(some, model.preprocessing, batch_size=32), strict=True)
    known = None if model.multi_label else torch.cat(labels)
    return Data(torch.cat(pixels), known, torch.cat(calibration_batches(model, source)), about)
