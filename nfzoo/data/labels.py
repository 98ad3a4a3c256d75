"""Classes: names of ImageNet's, names that are numbers, a model's outputs for them; numbers of images, and weights."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np

from nfzoo.config import MAX_SIZE
from nfzoo.data.images import Images, class_name
from nfzoo.errors import DataError, nearest
from nfzoo.files import read_text

MANY_CLASSES = 1 << 16
"""Classes that data may have whatever their number of images; a part may lack most of them."""

_LISTED = 20  # classes whose numbers of images are told one by one

FEW_IMAGES = 10
"""Classes with fewer images to train on get a warning."""


def class_counts(images: Images) -> dict[str, int]:
    """Return the number of images of each class, in the order of the classes; one of several labels counts for each."""
    classes = len(images.classes)
    counts = images.labels.sum(0) if images.multi_label else np.bincount(images.labels, minlength=classes)
    return dict(zip(images.classes, counts.tolist(), strict=True))


def few_images(counts: Mapping[str, int]) -> str:
    """Return a sentence about classes with fewer than `FEW_IMAGES` images to train on; "" if there are none."""
    few = {name: count for name, count in counts.items() if count < FEW_IMAGES}
    have = f"{len(few):,} {'class has' if len(few) == 1 else 'classes have'}"
    return f"{have} fewer than ten images to train on: {listed_counts(few)}" if few else ""


def histogram(counts: Mapping[str, int]) -> str:
    """Return the number of images of each class in one line; of many classes the least, the median and the greatest."""
    if len(counts) <= _LISTED:
        return listed_counts(counts, _LISTED)
    low, high = (least_or_most(counts, key=lambda name: counts[name]) for least_or_most in (min, max))
    middle = float(np.median(list(counts.values())))
    return f"{len(counts):,} classes from {low} {counts[low]:,} to {high} {counts[high]:,}, median {middle:,g}"


def listed_counts(counts: Mapping[str, int], most: int = 10) -> str:
    """Return `cat 12, dog 3 and 5 more`."""
    more = f" and {len(counts) - most:,} more" if len(counts) > most else ""
    return ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:most]) + more


def class_weights(given: Mapping[str, float] | str, counts: Mapping[str, int]) -> tuple[float, ...] | None:
    """Return the weight of each class in the loss; `None` for `"none"`.

    `"balanced"` is `n / (k count)` for n images of k classes, whose mean over the images is 1. Classes that a mapping
    does not name have weight 1.

    Args:
        counts: the number of images to train on, of each class.

    Raises:
        DataError: for a mapping with a name that is no class or no weight above 0, and for a balance with a class that
            has no images.

    Source: scikit-learn's `compute_class_weight`.
    """
    if given == "none":
        return None
    if isinstance(given, str):
        empty = next((name for name, count in counts.items() if not count), None)
        if empty is not None:
            raise DataError(f"class {empty!r} has no image to train on, so that balanced class weights do not exist")
        total = sum(counts.values())
        return tuple(total / (len(counts) * count) for count in counts.values())
    strange = next((name for name in given if name not in counts), None)
    if strange is not None:
        raise DataError(f"class_weights name {strange!r}, which is no class of the data{nearest(strange, counts)}")
    weights = tuple(given.get(name, 1.0) for name in counts)
    if not any(weights):
        raise DataError("all class_weights are 0, so that there is nothing to learn")
    return weights


def positive_weights(given: Mapping[str, float] | str, counts: Mapping[str, int], images: int) -> list[float] | None:
    """Return the weight of each class's positive term in the loss of multi-label data; `None` for `"none"`.

    `"balanced"` is `(images - count) / count`. Classes that a mapping does not name have weight 1.

    Args:
        given: as of `class_weights`.
        counts: the number of images to train on that have each label.
        images: the number of images to train on.

    Raises:
        DataError: as `class_weights`, and for a balance with a class that every image has.

    Source: `pos_weight` of torch's `BCEWithLogitsLoss`.
    """
    balanced = class_weights(given, counts)
    if balanced is None or not isinstance(given, str):
        return None if balanced is None else list(balanced)
    full = next((name for name, count in counts.items() if count == images), None)
    if full is not None:
        raise DataError(f"every image to train on has the label {full!r}, so that its balanced class weight would be 0")
    return [(images - count) / count for count in counts.values()]


@functools.cache
def _table() -> tuple[tuple[str, ...], tuple[str, ...]]:
    text = files("nfzoo").joinpath("assets/imagenet_classes.txt").read_text(encoding="utf-8")
    rows = [line.split(" ", 1) for line in text.splitlines()]
    return tuple(row[0] for row in rows), tuple(row[1] for row in rows)


def imagenet() -> tuple[str, ...]:
    """Return the 1,000 labels of ILSVRC-2012, in the order of the logits; they differ even in lower case.

    Source: WordNet 3.0, the first word of each class; see `assets/README.md`.
    """
    return _table()[1]


def imagenet_wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the same classes, such as `n01440764`, sorted: the names of ImageNet's folders."""
    return _table()[0]


def match_classes(
    names: Sequence[str], classes: int, labels: Sequence[str] | None, *, source: str
) -> tuple[tuple[int, ...], str]:
    """Return the model's output for each folder name, and the name of the table that has all of them.

    The first of these tables that has every name is used: the model's labels; for an ImageNet model, the WordNet ids,
    then ImageNet's labels; for a model without labels, the numbers of its outputs. Otherwise, for a model without
    labels and with as many outputs as folders, the folders' sorted order counts.

    Args:
        source: the data's name in messages.

    Raises:
        DataError: if a name is no class of the model, or two names are the same class.
    """
    names = [class_name(name) for name in names]
    labels = None if labels is None else [class_name(label) for label in labels]
    own = dict(zip(labels, range(classes), strict=True)) if labels is not None else {}
    tables = [("labels", own)]
    wnids = dict(zip(imagenet_wnids(), range(1000), strict=True))
    if classes == 1000 and (
        labels is None or tuple(labels) in (imagenet(), imagenet_wnids()) or wnids.keys() == {*names}
    ):
        tables.append(("WordNet ids", wnids))
        tables.append(("ImageNet labels", dict(zip(imagenet(), range(1000), strict=True))))
    if labels is None:
        numbers = {name: int(name) for name in names if re.fullmatch("[0-9]{1,6}", name)}
        tables.append(("numbers", {name: number for name, number in numbers.items() if number < classes}))
    for matched_by, table in tables:
        if table.keys() >= {*names}:
            _check_one_to_one(names, table, labels, source)
            return tuple(table[name] for name in names), matched_by
    if labels is None:
        if len(names) == classes and not (classes == 1000 and wnids.keys() & {*names}):
            return tuple(range(classes)), "sorted order"
        raise DataError(
            f"the model has {classes} classes without names, and {source} has the {len(names)} folders {_some(names)}; "
            f"name the folders after the model's outputs, 0 to {classes - 1}"
        )
    known = max((table for _, table in tables), key=lambda table: len(table.keys() & {*names}))
    strange = [name for name in names if name not in known]
    raise DataError(
        f"{len(strange)} of the {len(names)} folders in {source} are no classes of the model: {_some(strange)}"
        f"{nearest(strange[0], known)}; its classes are {_some(list(labels))}"
    )


def _check_one_to_one(
    names: Sequence[str], table: Mapping[str, int], labels: Sequence[str] | None, source: str
) -> None:
    twice = [label for label, count in Counter(labels or ()).items() if count > 1 and label in names]
    if twice:
        raise DataError(f"the model has more than one class {twice[0]!r}: the images of that folder cannot be judged")
    first: dict[int, str] = {}
    for name in names:
        if first.setdefault(table[name], name) != name:
            raise DataError(f"{first[table[name]]!r} and {name!r} in {source} are the same class; merge the folders")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def numbered_classes(highest: int, images: int, where: str) -> tuple[str, ...]:
    """Return the names of classes that have numbers alone, from 0 to the greatest label.

    Raises:
        DataError: for far more classes than there are images: one number in a file would take any amount of memory.
    """
    most = min(max(images, MANY_CLASSES), MAX_SIZE)
    if highest >= most:
        raise DataError(f"{where} has label {highest:,}; {images:,} images have at most {most:,} classes, from 0 on")
    return tuple(map(str, range(highest + 1)))


def read_class_names(path: str) -> tuple[str, ...]:
    """Return the names of classes in a text file, one in each line; lines at the end may be empty.

    Raises:
        DataError: for a file that cannot be read, and for a name that is empty or there twice.
    """
    try:
        lines = read_text(path).removeprefix("\ufeff").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"the class names {path!r} are not in UTF-8; save them in it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"the class names {path!r} cannot be read: {error}") from error
    names = [class_name(line.strip()) for line in lines]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(f"line {number} of the class names {path!r} is empty; each line names a class")
        if first.setdefault(name, number) != number:
            raise DataError(f"the class names {path!r} have {name!r} in lines {first[name]} and {number}")
    if not names:
        raise DataError(f"the class names {path!r} are empty; each line names a class")
    return tuple(names)
