"""Read photographs as tensors, for the tests of the papers' claims: Fashion-MNIST, or other data of `nfzoo train`.

`fashion-mnist` is what Debian's package `dataset-fashion-mnist` installs. Elsewhere name the folder of its four files.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims.stability import digits
from benchmarks.claims.stacked_runs import Data
from nfzoo.data.digits import DIGITS
from nfzoo.data.idx import FASHION_MNIST
from nfzoo.data.source import open_split
from nfzoo.errors import DataError
from nfzoo.train.run_folder import public_data
from nfzoo.transforms.decode import open_image


def photographs(source: str = FASHION_MNIST, *, train: int, held_out: int) -> Data:
    """Return grey images `(N, 1, H, W)`, standardised by those to train on, and labels `(N,)`.

    Args:
        source: data that `nfzoo train` takes, whose images have one size. Of `digits` all images are returned.
        train, held_out: numbers of images, which are drawn at random, always the same.

    Raises:
        DataError: if the data cannot be read, have fewer images, or images of several sizes.
    """
    if source == DIGITS:
        return digits()
    parts = []
    for images, count in zip(open_split(source), (train, held_out), strict=True):
        if len(images) < count:
            raise DataError(f"{source!r} has {len(images):,} of the {count:,} images that are needed of a part")
        chosen = np.random.default_rng(0).permutation(len(images))[:count]
        pixels = [np.asarray(open_image(images[int(i)][0]).convert("L"), dtype=np.float32) for i in chosen]
        if len(sizes := {image.shape for image in pixels}) > 1:
            found = " and ".join(f"{width} x {height}" for height, width in sorted(sizes)[:2])
            raise DataError(f"{source!r} has images of several sizes, such as {found}; resize them to one size")
        parts.append((torch.from_numpy(np.stack(pixels))[:, None], torch.from_numpy(images.labels[chosen]).long()))
    (x, y), (held, labels) = parts
    std, mean = torch.std_mean(x)
    return Data(((x - mean) / std, y), ((held - mean) / std, labels))


def described(data: Data, source: str) -> str:
    """Return what the data are, for a page."""
    (x, _), (held, _) = data
    return f"{public_data(source)}, {len(x):,} images of {x.shape[-2]} x {x.shape[-1]} pixels, {len(held):,} held out"


def spread(values: Tensor | list[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of the seeds' figures; of a single one, 0."""
    x = torch.as_tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std()) if len(x) > 1 else 0.0
