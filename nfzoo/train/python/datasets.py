"""Data sets of a Python program as `Images`: map-style data sets of torch, lists of pairs, and tables of `datasets`."""

from __future__ import annotations

import bisect
import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from nfzoo.data.hf_datasets import HFDataset
from nfzoo.data.images import Images, Texts, check_classes, class_name
from nfzoo.data.labels import numbered_classes
from nfzoo.errors import ConfigError, DataError, shown
from nfzoo.train.python.items import UnreadableItemError, as_pillow, plain_label, read_item

logger = logging.getLogger("nfzoo")

_COMPARED = 64  # items whose pixels, where they lie in memory, identify the data
_MANY = 1000  # items that are not read without saying so


@dataclass(frozen=True, eq=False)
class DatasetImages(Images[Path | Image.Image]):
    """The items of a map-style data set.

    Attributes:
        dataset: gives pairs (image, label) by number.
        title: the data set's name in messages.
        numbers: the class of each item of the data set, int64; -1 for one that could not be read.
        paths: the files of the items, if they are known; else empty.
        digest: the value of `stamp`.
    """

    dataset: Any
    title: str
    numbers: np.ndarray
    paths: Texts
    digest: str

    def read_row(self, row: int) -> Path | Image.Image:
        name = f"item {row} of {self.title}"
        image, label = read_item(self.dataset, row, self.title)
        number = self.classes.index(label) if isinstance(label, str) and label in self.classes else label
        if number != self.numbers[row]:
            said = self.classes[int(self.numbers[row])]
            raise DataError(
                f"{name} has the label {label!r}, where the data set's own list of labels, or an earlier look, says "
                f"{said!r}; make them agree"
            )
        return as_pillow(image, name)

    def row_name(self, row: int) -> str:
        return self.paths[row] if len(self.paths) else f"item {row} of {self.title}"

    def files(self) -> Iterable[str | Path]:
        return (self.paths[row] for row in self.rows.tolist()) if len(self.paths) else ()

    def stamp(self) -> str:
        return self.digest


def open_dataset(
    dataset: Any, *, classes: Sequence[str] | None = None, expected: tuple[str, ...] | None = None, max_broken: int = 0
) -> Images:
    """Return the images of a data set; see `nfzoo.fit` for what it may be.

    Args:
        classes: names of the classes; by default those of the data set.
        expected: the names that it must have, as the data set that is trained on has them.
        max_broken: items that may be unreadable when all are read for their labels; they are left out.

    Raises:
        DataError: for what is no such data set.
        ConfigError: for `classes` that are no names.
    """
    title = title_of(dataset)
    _refuse(dataset, title)
    names = None if classes is None else _names(classes)
    if isinstance(dataset, Images):
        return _renamed(dataset, title, names, expected)
    if _is_table(dataset):
        return _table(dataset, title, expected or names)
    for row in sorted({0, len(dataset) // 2, len(dataset) - 1}):  # their form; what cannot be read is met again
        try:
            as_pillow(read_item(dataset, row, title)[0], f"item {row} of {title}")
        except UnreadableItemError:
            continue
    labels, unread = _labels(dataset, title, max_broken)
    own = names or _own_classes(dataset, title)
    if expected is not None and own is not None:
        check_classes(title, own, expected)
    numbers, known = _numbers(labels, title, expected or own)
    rows = np.flatnonzero(numbers >= 0) if unread else np.arange(len(numbers))
    return DatasetImages(rows, numbers[rows], known, dataset, title, numbers, _paths(dataset), _digest(dataset))


def title_of(dataset: Any) -> str:
    """Return the name of a data set, for messages and the record of a run: that of its class."""
    return type(_origins(dataset)[0]).__name__


def _origins(dataset: Any) -> list[Any]:
    """Return the data sets whose items are in a `Subset` or `ConcatDataset`."""
    if type(dataset) is Subset:
        return _origins(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return [origin for part in dataset.datasets for origin in _origins(part)]
    return [dataset]


# ---------------------------------------------------------------- what is no such data set


def _refuse(dataset: Any, title: str) -> None:
    """Raise a `DataError` for what has no items by number."""
    if isinstance(dataset, DataLoader):
        raise DataError("a DataLoader makes batches of its own; give its data set, loader.dataset")
    if isinstance(dataset, dict):
        parts = ", ".join(map(str, dataset))
        raise DataError(f"a {title} of {parts} is no data set; give its parts by themselves, as data['train']")
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not by_number or isinstance(dataset, type | bytes):
        raise DataError(
            f"{shown(dataset)} has no items by number, which shuffling and resuming need; give a map-style data set "
            "(__len__ and __getitem__), a list of pairs (image, label), or the name of a folder or of tar shards"
        )
    try:
        length = len(dataset)
    except Exception as error:  # of the data set's own code, or of a length that is no size
        raise DataError(f"the data set {title} does not know its length: {error}") from error
    if not length:
        raise DataError(f"the data set {title} is empty")


def _is_table(dataset: Any) -> bool:
    library = sys.modules.get("datasets")  # who has a table has imported it
    return library is not None and isinstance(dataset, library.Dataset)


def _renamed(images: Images, title: str, names: tuple[str, ...] | None, expected: tuple[str, ...] | None) -> Images:
    """Return images of nfzoo's own, with other names of their classes where those are given."""
    if not images.classes:
        raise DataError(f"the images of {title} have no labels")
    if names is not None and len(names) != len(images.classes):
        raise DataError(f"classes name {len(names)} classes, and {title} has {len(images.classes)}")
    if expected is not None:
        check_classes(title, names or images.classes, expected)
    return replace(images, classes=names or images.classes)


def _table(table: Any, title: str, classes: tuple[str, ...] | None) -> HFDataset:
    """Return the images of a table of `datasets`, which are read as they are stored."""
    if table.format["type"] == "custom":
        raise DataError(
            "the table has a transform (set_transform), which nfzoo would leave out; give table.with_format(None)"
        )
    # The program has made the table itself, so that the files it names are read wherever they lie.
    return HFDataset.labelled(table.with_format(None), title, classes, folders=[Path.cwd(), Path("/")])


# ---------------------------------------------------------------- labels and classes


def _leaf(dataset: Any, row: int) -> tuple[Any, int]:
    """Return the data set that an item of a `Subset` or `ConcatDataset` comes from, and its number there."""
    while True:
        if type(dataset) is Subset:
            dataset, row = dataset.dataset, int(dataset.indices[row])
        elif type(dataset) is ConcatDataset:
            ends = dataset.cumulative_sizes
            k = bisect.bisect_right(ends, row)
            dataset, row = dataset.datasets[k], row - (ends[k - 1] if k else 0)
        else:
            return dataset, row


def _leaves(dataset: Any) -> Iterator[tuple[Any, int]]:
    return (_leaf(dataset, row) for row in range(len(dataset)))


def _labels(dataset: Any, title: str, max_broken: int) -> tuple[list[int | str | None], bool]:
    """Return the label of each item, and whether some are missing, as these items cannot be read."""
    lists: dict[int, Sequence[Any] | None] = {}
    labels: list[int | str | None] = []
    for leaf, row in _leaves(dataset):
        if id(leaf) not in lists:
            lists[id(leaf)] = _targets(leaf)
        own = lists[id(leaf)]
        if own is None:
            break
        labels.append(plain_label(own[row], f"item {len(labels)} of {title}"))
    else:
        return labels, False
    if len(dataset) > _MANY:
        logger.warning(
            "%s has no list of labels (an attribute targets), so that all %d items are read for theirs",
            *(title, len(dataset)),
        )
    labels, problems = [], []
    for row in range(len(dataset)):
        try:
            labels.append(read_item(dataset, row, title)[1])
        except UnreadableItemError as error:
            labels.append(None)
            problems.append(str(error))
            if len(problems) > max_broken:
                raise DataError(
                    f"{'; '.join(problems[-3:])}; max_broken=N lets training go on with up to N such images"
                ) from error
            logger.warning("left out: %s", error)
    return labels, bool(problems)


def _targets(dataset: Any) -> Sequence[Any] | None:
    """Return the labels of a data set that tells them without its images, `None` of others."""
    if isinstance(dataset, list | tuple):
        return [read_item(dataset, row, type(dataset).__name__)[1] for row in range(len(dataset))]
    if isinstance(dataset, Images):
        return dataset.labels.tolist()
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2 and dataset.tensors[1].ndim == 1:
        return dataset.tensors[1].tolist()
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None)
        values = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
        if isinstance(values, list | tuple) and len(values) == len(dataset):
            change = getattr(dataset, "target_transform", None)
            return values if change is None else [change(value) for value in values]
    return None


def _own_classes(dataset: Any, title: str) -> tuple[str, ...] | None:
    """Return the names of the classes that a data set knows."""
    lists = [getattr(origin, "classes", None) for origin in _origins(dataset)]
    names = {None if found is None or not len(found) else _names(found) for found in lists}
    if len(names) > 1:
        raise DataError(f"the parts of a ConcatDataset of {title} have different classes; give them the same")
    return names.pop()


def _names(classes: Sequence[Any]) -> tuple[str, ...]:
    # torchvision's ImageNet has the synonyms of each class.
    joined = [", ".join(map(str, name)) if isinstance(name, tuple | list) else name for name in classes]
    if isinstance(classes, str) or not all(isinstance(name, str) and name.strip() for name in joined):
        raise ConfigError(f"classes must be a list of names, not {shown(classes)}")
    names = tuple(map(class_name, joined))
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ConfigError(f"classes have {twice!r} twice; name each class once")
    return names


def _numbers(
    labels: Sequence[int | str | None], title: str, classes: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class number of each item, -1 where it is unknown, and the names of the classes."""
    kinds = {type(label) for label in labels if label is not None}
    if len(kinds) != 1:
        raise DataError(f"{title} has {'numbers and names' if kinds else 'nothing'} as labels; give one kind of them")
    if str in kinds:
        if (
            blank := next(
                (row for row, label in enumerate(labels) if isinstance(label, str) and not label.strip()), None
            )
        ) is not None:
            raise DataError(
                f"item {blank} of {title} has a blank label, {labels[blank]!r}; leave the item out, or name its class"
            )
        known = classes or tuple(sorted({label for label in labels if isinstance(label, str)}))
        number = {name: i for i, name in enumerate(known)}
        for row, label in enumerate(labels):
            if label is not None and label not in number:
                raise DataError(f"item {row} of {title} has the label {label!r}, which is no class of {len(known)}")
        return np.array([-1 if label is None else number[str(label)] for label in labels], np.int64), known
    highest = max(label for label in labels if isinstance(label, int))
    known = classes or numbered_classes(highest, len(labels), title)
    for row, label in enumerate(labels):
        if isinstance(label, int) and not 0 <= label < len(known):
            raise DataError(
                f"item {row} of {title} has the label {label}; those of {len(known)} classes are 0 to {len(known) - 1}"
            )
    return np.array([-1 if label is None else label for label in labels], np.int64), known


# ---------------------------------------------------------------- identity


def _paths(dataset: Any) -> Texts:
    """Return the files of the items of folders as torchvision has them; nothing of other data sets."""
    lists: dict[int, Any] = {}
    paths: list[str] = []
    for leaf, row in _leaves(dataset):
        samples = lists.setdefault(id(leaf), getattr(leaf, "samples", None))
        if not isinstance(samples, list) or len(samples) != len(leaf):
            return Texts(())
        if not isinstance(samples[row], tuple) or not isinstance(samples[row][0], str | os.PathLike):
            return Texts(())
        paths.append(os.fspath(samples[row][0]))
    return Texts(paths)


def _digest(dataset: Any) -> str:
    """Return a hash of some of the pixels that lie in memory, for data sets that are arrays."""
    digest = hashlib.sha256()
    for i in np.unique(np.linspace(0, len(dataset) - 1, _COMPARED).astype(int)).tolist():
        leaf, row = _leaf(dataset, i)
        if isinstance(leaf, list | tuple):
            value: Any = leaf[row][0]
        elif type(leaf) is TensorDataset:
            value = leaf.tensors[0][row]
        else:
            data = getattr(leaf, "data", None)
            value = data[row] if isinstance(data, Tensor | np.ndarray) and len(data) == len(leaf) else None
        if isinstance(value, Tensor | np.ndarray):
            array = np.ascontiguousarray(value.cpu() if isinstance(value, Tensor) else value)
            digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
