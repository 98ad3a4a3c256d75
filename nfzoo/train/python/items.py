"""Items of a data set: pairs of an image, in one of several forms, and a label."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nfzoo.data.images import class_name
from nfzoo.errors import DataError, shown

_PAIRS = "a data set gives pairs (image, label), as list(zip(images, labels)) does"
_FLOATS = (
    "remove ToTensor and Normalize from the data set's transform: nfzoo crops and normalises images itself, and takes "
    "PIL images and uint8 arrays"
)


class UnreadableItemError(DataError):
    """An item that the data set itself cannot give."""


def read_item(dataset: Any, row: int, title: str) -> tuple[Any, int | str]:
    """Return image and label of an item.

    Raises:
        UnreadableItemError: if the data set raises an error.
        DataError: if the item is no pair with a label.
    """
    name = f"item {row} of {title}"
    try:
        item = dataset[row]
    except Exception as error:
        text = " ".join(str(error).split())
        raise UnreadableItemError(f"{name} cannot be read ({type(error).__name__}{': ' * bool(text)}{text})") from error
    if isinstance(item, dict):
        keys = ", ".join(map(repr, item))
        raise DataError(f"{name} is a mapping of {keys}; let the data set return (image, label)")
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{len(item)} values" if isinstance(item, tuple | list) else _kind(item)
        raise DataError(f"{name} is {what}; {_PAIRS}")
    return item[0], plain_label(item[1], name)


def plain_label(label: Any, name: str) -> int | str:
    """Return a label as a whole number or a name; raise a `DataError` for what is neither.

    Args:
        name: the item's, for the message.
    """
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, str):
        return class_name(label)
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    raise DataError(f"{name} has the label {_kind(label)}; a label is a class's number, from 0 on, or its name")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} of shape {tuple(value.shape)}"
    return shown(value)


def as_pillow(image: Any, name: str) -> Path | Image.Image:
    """Return an image as `open_image` takes it; messages about it have this name, or that of its file.

    Raises:
        DataError: if it is no image.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image)
    if isinstance(image, Image.Image):
        if getattr(image, "filename", ""):
            return image
        try:
            pillow = image.copy()  # the program's own stays without a name
        except Exception as error:
            raise UnreadableItemError(f"{name} cannot be decoded ({' '.join(str(error).split())})") from error
    elif isinstance(image, Tensor | np.ndarray):
        if image.is_floating_point() if isinstance(image, Tensor) else image.dtype.kind == "f":
            raise DataError(f"{name} has {_kind(image)} as its image; {_FLOATS}")
        array = (
            image
            if isinstance(image, np.ndarray)
            else np.moveaxis(image.cpu().numpy(), 0, -1 if image.ndim == 3 else 0)
        )
        depth = array.shape[2] if array.ndim == 3 else 1
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or depth not in (1, 3, 4) or 0 in array.shape:
            raise DataError(
                f"{name} has {_kind(image)} as its image; an image is uint8: an array (H, W) or (H, W, 1 | 3 | 4), "
                "or a tensor (H, W) or (1 | 3 | 4, H, W)"
            )
        pillow = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))
    else:
        raise DataError(
            f"{name} has {_kind(image)} as its image; an image is a PIL image, a uint8 array or tensor, or a path"
        )
    pillow.filename = name  # type: ignore[attr-defined]
    return pillow
