"""Models that tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nfzoo.nn import NFNet, create
from tests.support.pictures import picture

LABELS = ["cat", "<script>alert(1)</script>", "\x1b[31mred", "lone \udcff"]


@pytest.fixture(scope="package")
def model() -> NFNet:
    model = create("nfnet-test", labels=LABELS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight.mul_(100)  # type: ignore[operator]  # else all images get almost the same logits
    return model.eval()


@pytest.fixture(scope="package")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{i}.{ending}" for i, ending in enumerate(("png", "jpg", "webp", "jpg"))]
    for i, path in enumerate(paths):
        path.write_bytes(picture(i, path.suffix[1:]))
    return paths
