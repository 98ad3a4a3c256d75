"""The images that ranges of eight bits are taken from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nfzoo import create
from nfzoo.data.source import open_split
from nfzoo.export import quantize
from nfzoo.export.quantize import calibration_batches
from tests.support.pictures import write_images


def test_calibration_sees_training_images_of_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is sorted by class: its first images are all cats."""
    monkeypatch.setattr(quantize, "_CALIBRATION", 6)
    folder = str(write_images(tmp_path / "pets", {"cat": 10, "dog": 10}))
    model = create("nfnet-test", num_classes=2)
    split = open_split(folder)
    known = [model.preprocess(split.train[i][0]) for i in range(len(split.train))]
    held_out = [model.preprocess(split.validation[i][0]) for i in range(len(split.validation))]
    for size, batch, shapes in ((None, None, [6]), (None, 4, [4]), (None, 1, [1] * 6), (48, None, [6])):
        batches = calibration_batches(model, folder, size, batch)
        assert [len(x) for x in batches] == shapes
        if size:
            assert batches[0].shape[-1] == size
            continue
        rows = [i for x in torch.cat(batches) for i, image in enumerate(known) if torch.equal(x, image)]
        assert len(rows) == sum(shapes)
        assert not any(torch.equal(x, image) for x in torch.cat(batches) for image in held_out)
        if shapes != [4]:
            assert sorted(split.train.labels[rows].tolist()) == [0, 0, 0, 1, 1, 1]
