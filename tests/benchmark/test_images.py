"""Images of a comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nfzoo.benchmark.images import images_of, random_images
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.data.source import open_split
from nfzoo.errors import DataError
from nfzoo.nn import create
from tests.support.pictures import write_images


def test_held_out_images_with_their_labels() -> None:
    model = create("nfnet-test", num_classes=10, labels=[str(i) for i in range(10)])
    data = images_of(model, "digits", 50)
    held_out = open_split("digits").validation
    rows = np.linspace(0, len(held_out) - 1, 50).astype(int)
    assert data.labels is not None
    assert data.labels.tolist() == held_out.labels[rows].tolist()
    assert data.calibration is not None
    assert (data.images.shape, data.calibration.shape) == ((50, 3, 32, 32), (256, 3, 32, 32))
    assert torch.equal(data.images[7], model.preprocess(held_out[int(rows[7])][0]))
    assert "digits" in data.about
    assert len(images_of(model, "digits", 10**6).images) == len(held_out)


def test_folders_of_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"cat": 4, "dog": 4})
    model = create("nfnet-test", labels=["dog", "cat"])
    data = images_of(model, str(tmp_path / "data"), 100)
    assert data.labels is not None
    assert sorted(data.labels.tolist()) == [0] * 4 + [1] * 4
    model.problem_type = MULTI_LABEL
    assert images_of(model, str(tmp_path / "data"), 3).labels is None
    with pytest.raises(DataError):
        images_of(create("nfnet-test", labels=["a", "b"]), str(tmp_path / "data"), 3)


def test_random_images_are_normalised_grey_levels() -> None:
    model = create("nfnet-test", num_classes=10)
    data = random_images(model, 3)
    again = random_images(model, 3)
    assert torch.equal(data.images, again.images)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    levels = data.images * std + mean
    assert levels.min() >= -1e-6
    assert levels.max() <= 1 + 1e-6
    assert abs(float(levels.mean()) - 0.5) < 0.02
