"""Leave out what every training run draws, and what one test sees drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from nfzoo.train import progress, run_folder, trainer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty pictures of curves, confusion matrices and batches, which take as long as a small epoch to train.

    Tests with the marker `draws` have them drawn.
    """
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(run_folder, "training_curves", lambda _, target: Path(target).write_bytes(PNG))
        monkeypatch.setattr(progress, "confusion_figure", lambda counts, _, file: Image.new("RGB", (4, 4)).save(file))
        monkeypatch.setattr(trainer, "augmentation_sheet", lambda _, file, **__: Image.new("RGB", (4, 4)).save(file))
