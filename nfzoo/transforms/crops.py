"""Random crops for training, as TensorFlow and as torchvision draw them."""

from __future__ import annotations

import math

import numpy as np

_ATTEMPTS = 10  # to draw a random part that fits
_LEAST_COVERED = 0.1  # min_object_covered, the "object" being the whole image


def distorted_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    kept: float,
) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom of a crop, as TensorFlow's `sample_distorted_bounding_box` does.

    The aspect a = width / height is uniform in `ratio`. The height is a uniform integer between `sqrt(A s_min / a)` and
    `sqrt(A s_max / a)`, as far as the crop fits; A is the image's area, and `scale` holds s_min and s_max. The position
    is uniform. A crop below s_min, or below a tenth of the image, is drawn again, up to ten times. If none fits, or the
    crop is the whole image, the result is the central square with `kept` times the shorter edge.

    There are three differences from TensorFlow: random numbers are NumPy's, arithmetic is in float64, and the last row
    and column are as likely to be in the crop as the first. TensorFlow never draws the last position.

    Args:
        kept: share of the shorter edge that evaluation keeps, `size / (size + margin)`.

    Source: tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc, called with `area_range` (0.08, 1),
    `aspect_ratio_range` (3/4, 4/3), `min_object_covered` 0.1 and `max_attempts` 10 by the code released with
    arXiv 2102.06171 (dataset.py), which has the same fallback.
    """
    min_area, max_area = (share * width * height for share in scale)
    for _ in range(_ATTEMPTS):
        aspect = rng.uniform(*ratio)
        low, high = round(math.sqrt(min_area / aspect)), round(math.sqrt(max_area / aspect))
        if round(high * aspect) > width:
            high = math.ceil((width + 0.5) / aspect) - 1  # the last whose width still rounds to `width` or less
        high = min(high, height)
        h = high if low >= high else int(rng.integers(low, high + 1))
        if h * round(h * aspect) < min_area:  # the height was rounded down
            h += 1
        if h * round(h * aspect) > max_area:
            h -= 1
        w = round(h * aspect)
        fits = 0 < w <= width and 0 < h <= height and min_area <= w * h <= max_area
        if fits and w * h >= _LEAST_COVERED * width * height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            if (w, h) == (width, height):
                break
            return left, top, left + w, top + h
    side = max(1, int(kept * min(width, height)))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    return left, top, left + side, top + side


def random_box(
    width: int, height: int, rng: np.random.Generator, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom of a crop with a uniform share of the area and a log-uniform aspect.

    After ten draws that do not fit, the result is the largest central crop within `ratio`.

    Source: arXiv 1409.4842, section 6; fallback as torchvision's RandomResizedCrop, which timm follows.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
