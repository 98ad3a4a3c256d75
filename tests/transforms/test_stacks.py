"""Crops of many grey images at a time: the pixels of `preprocess`, which takes one."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from nfzoo.config import Preprocessing
from nfzoo.data.idx import IDXImages
from nfzoo.data.loader import evaluation_batches, training_batches
from nfzoo.transforms.mixing import Augment
from nfzoo.transforms.preprocess import evaluation_transform, training_crop
from nfzoo.transforms.stacks import evaluation_transforms, stackable, training_crops
from tests.support.loops import each

LEVELS = np.random.default_rng(0).integers(0, 256, (7, 28, 20), np.uint8)
CROPS = {"scale": (0.3, 1.0), "ratio": (0.7, 1.4), "flip": 0.5}
SIZES = [(40, 0), (32, 8), (9, 2), (5, 0)]  # side and margin; the last ones leave out pixels of the image


def grey_or_colour(size: int, margin: int, channels: int) -> Preprocessing:
    return Preprocessing(train_size=size, test_size=size, margin=margin).for_channels(channels)


def images(channels: int) -> list[Image.Image]:
    return [Image.fromarray(level).convert("L" if channels == 1 else "RGB") for level in LEVELS]


@each(("size", "margin"), SIZES)
def test_crops_are_those_of_single_images(size: int, margin: int) -> None:
    for channels in (1, 3):
        preprocessing = grey_or_colour(size, margin, channels)
        rngs = [np.random.default_rng([3, i]) for i in range(len(LEVELS))]
        made = training_crops(LEVELS, preprocessing, rngs, size=size, **CROPS)
        for i, image in enumerate(images(channels)):
            single = training_crop(image, preprocessing, np.random.default_rng([3, i]), size=size, **CROPS)
            assert torch.equal(made[i], single)


@each(("size", "margin"), SIZES)
def test_held_out_images_are_those_of_single_images(size: int, margin: int) -> None:
    for channels in (1, 3):
        preprocessing = grey_or_colour(size, margin, channels)
        made = evaluation_transforms(LEVELS, preprocessing, size=size)
        for i, image in enumerate(images(channels)):
            assert torch.equal(made[i], evaluation_transform(image, preprocessing, size=size))


class OneByOne(IDXImages):
    """Images that the loader takes one at a time."""

    def grey_levels(self, indices: object) -> None:  # type: ignore[override]
        return None


def test_the_loader_gives_the_same_batches() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 2])
    fields = np.arange(7), labels, ("a", "b", "c"), LEVELS, (("train", 0),)
    for resize in ("deepmind", "shortest-edge"):
        preprocessing = Preprocessing(train_size=12, test_size=12, margin=0, resize=resize)
        assert stackable(preprocessing) == (resize == "deepmind")
        options = {"epoch": 1, "seed": 2, "batch_size": 3, "augment": Augment(**CROPS), "balanced": True}
        stacked, single = ([*training_batches(cls(*fields), preprocessing, **options)] for cls in (IDXImages, OneByOne))
        assert len(stacked) == 2
        for ours, theirs in zip(stacked, single, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
            assert ours[3:] == theirs[3:]
        held_out = ([*evaluation_batches(cls(*fields), preprocessing, batch_size=4)] for cls in (IDXImages, OneByOne))
        for ours, theirs in zip(*held_out, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
