"""The picture of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from nfzoo.benchmark.figures import times_figure
from nfzoo.benchmark.measure import Result
from nfzoo.errors import DataError


def test_a_bar_for_each_that_was_measured(tmp_path: Path) -> None:
    one = Result("eager", "float32", "measured", None, 2.0, 1.9, 2.2, 0.5, 1.0, 0.0, 1.0, 0.1, None)
    rows = [one, one._replace(format="onnx", precision="int8", milliseconds=1.0, low=0.9, high=1.0, accuracy=None)]
    missing = Result("openvino", "bf16", "missing", "needs it")
    heights = []
    for results in ([one], [*rows, missing], [missing]):
        times_figure(results, "a $name", tmp_path / "times.png")
        with Image.open(tmp_path / "times.png") as picture:
            heights.append(picture.height)
    assert heights[1] > heights[0] > heights[2]
    with pytest.raises(DataError, match=r"must end in \.png"):
        times_figure(rows, "x", tmp_path / "times.jpg")
