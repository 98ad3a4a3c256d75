"""Labelled images whose labels are indices of a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nfzoo.data.digits import DIGITS
from nfzoo.data.images import ImageFolder, Images
from nfzoo.data.label_files import LabelFiles
from nfzoo.data.labels import match_classes
from nfzoo.data.source import HELD_OUT, Part, open_held_out, open_split


class Labelled(NamedTuple):
    """Images whose labels are indices of the model's outputs.

    Attributes:
        dataset, split: names for the result; `split` is `None` if the data have no parts.
        matched_by: the table of names that matched the classes, see `match_classes`.
    """

    images: Images
    dataset: str
    split: str | None
    matched_by: str


def open_labelled(
    source: str,
    classes: int,
    labels: Sequence[str] | None,
    *,
    held_out: float = HELD_OUT,
    files: LabelFiles | None = None,
) -> Labelled:
    """Open the images of a source (see `nfzoo.data.source`) for a model with `classes` outputs named `labels`.

    A source with a held-out part, such as a folder with `train/` and `val/`, gives that part. `"digits"` gives the
    share `held_out` that training does not see. Any other source gives all images.

    Args:
        files: tables of the labels of a folder's images, of which the held-out part is taken if they have one.

    Raises:
        DataError: see `open_split` and `match_classes`.
    """
    if source == DIGITS and files is None:
        digits = open_split(DIGITS, validation_fraction=held_out).validation
        part = Part(digits, DIGITS, "held out", "the digits")
    else:
        part = open_held_out(source, labels=files)
    names = part.images.classes
    numbered = not isinstance(part.images, ImageFolder) and names == tuple(map(str, range(len(names))))
    if numbered and len(names) <= classes and not {*names} & {*(labels or ())}:
        index, matched_by = tuple(range(len(names))), "numbers"  # unnamed classes are numbers of outputs
    else:
        index, matched_by = match_classes(names, classes, labels, source=part.source)
    return Labelled(part.images.relabelled(index, classes), part.dataset, part.split, matched_by)
