"""The labels in a row of a table: one, or of multi-label data a set.

See `nfzoo.data.label_files` for the ways in which a table gives sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfzoo.data.images import class_name, logger
from nfzoo.errors import DataError

SEPARATOR = "|"
"""The default sign between the labels of a cell."""
ASK = "sets of labels are for --task multi-label, and models trained with it"
MOST_LABELS = 1 << 33
"""The most images times classes of multi-label data, each of which takes a byte of memory."""

_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")


class Table(NamedTuple):
    """A table as it is named."""

    path: Path
    options: dict[str, str]

    def __str__(self) -> str:
        return repr(str(self.path))

    def at(self, number: int) -> str:
        """Return the name of a row: of CSV the number of its line, in which a text editor finds it."""
        return f"{'row' if self.path.suffix.lower() == '.parquet' else 'line'} {number} of {self}"


def text_of(value: Any, where: str, key: str) -> str:
    """Return the text of a cell, "" for none; raise a `DataError` for what is neither text nor a whole number."""
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise DataError(f"{where} has a {key} that is neither text nor a whole number; name another with ?{key}=COLUMN")
    return str(value).strip()


def listed(names: Sequence[str]) -> str:
    """Return the names of columns in words."""
    return f"the columns are {', '.join(repr(name[:100]) for name in names[:20])}"


class Cell(NamedTuple):
    """Read the label in a cell of the column `number`; `known` keeps one set for equal cells."""

    number: int
    known: dict[Any, frozenset[str]]

    def __call__(self, row: Sequence[Any], where: str) -> frozenset[str]:
        if isinstance(row[self.number], list):
            raise DataError(f"{where} has a list of labels; {ASK}")
        label = text_of(row[self.number], where, "label")
        if not label:
            raise DataError(f"{where} has no label; fill it in, or leave it out; {ASK}")
        return self.known.setdefault(label, frozenset([class_name(label)]))


class Set(NamedTuple):
    """Read the labels in a cell of the column `number`: of a list, or between separators; `known` as of `Cell`."""

    number: int
    known: dict[Any, frozenset[str]]
    separator: str

    def __call__(self, row: Sequence[Any], where: str) -> frozenset[str]:
        cell = row[self.number]
        if isinstance(cell, list):
            parts = [text_of(part, where, "label") for part in cell]
        else:
            text = text_of(cell, where, "label")
            blank = None if self.separator.isspace() else self.separator  # several blanks are one
            parts = [part.strip() for part in text.split(blank)] if text else []
        if not all(parts):
            raise DataError(f"{where} has an empty label among {len(parts)}; remove it, or what separates it")
        labels = frozenset(map(class_name, parts))
        return self.known.setdefault(labels, labels)


class Columns(NamedTuple):
    """Read the labels of columns of 0 and 1, by their numbers."""

    numbers: dict[str, int]

    def __call__(self, row: Sequence[Any], where: str) -> frozenset[str]:
        labels = []
        for name, number in self.numbers.items():
            value = str(row[number]).strip().lower()
            if value not in (*_TRUE, *_FALSE):
                raise DataError(
                    f"{where} has {value[:100]!r} in the column {name!r}, which is neither 0 nor 1; name the columns "
                    "of labels with ?labels=FIRST,SECOND"
                )
            if value in _TRUE:
                labels.append(name)
        return frozenset(labels)


def reader(
    table: Table, header: Sequence[str], numbers: Mapping[str, int | None], *, multi_label: bool
) -> Cell | Set | Columns:
    """Return what reads the labels of a row.

    Args:
        table: as it is named; its options may name the columns.
        header: names of its columns.
        numbers: those of the columns of paths, labels and parts, `None` where there are none.
        multi_label: whether an image has a set of labels.

    Raises:
        DataError: for options that do not fit the data, or each other.
    """
    options = table.options
    for key in ("labels", "separator"):
        if key in options and not multi_label:
            raise DataError(f"the option {key!r} of {table} is for sets of labels; {ASK}")
    if "labels" not in options:
        number = -1 if numbers["label"] is None else numbers["label"]
        if multi_label:
            return Set(number, {}, options.get("separator", SEPARATOR))
        return Cell(number, {})
    for key in ("label", "separator"):
        if key in options:
            raise DataError(f"the options 'labels' and {key!r} of {table} are two ways to give labels; choose one")
    names = [str(name).strip() for name in header]
    if options["labels"] == "*":
        others = (numbers["path"], numbers["split"])
        chosen = [name for number, name in enumerate(names) if number not in others]
    else:
        chosen = [name.strip() for name in options["labels"].split(",")]
    columns: dict[str, int] = {}
    for name in chosen:
        if name not in names or not name:
            raise DataError(f"the labels {table} have no column {name!r} for ?labels=; {listed(names)}")
        if columns.setdefault(class_name(name), names.index(name)) != names.index(name):
            raise DataError(f"two columns of the labels {table} are the same label {name!r}")
    return Columns(columns)


def check_cells(table: Table, labels: Mapping[str, int], *, multi_label: bool, separated: bool) -> None:
    """Raise a `DataError` for cells that plainly hold several labels but are read as one, and for no labels at all.

    Args:
        table: as it is named.
        labels: label -> the first row that has it.
        multi_label: whether an image has a set of labels.
        separated: whether a cell of the table has several.
    """
    if "labels" in table.options:
        return
    if not labels:
        raise DataError(f"no row of the labels {table} has a label; name another column with ?label=COLUMN")
    if separated or "separator" in table.options:
        return
    for sign in (";", ",") if multi_label else (SEPARATOR, ";"):
        found = several_labels(labels, sign)
        if found is None:
            continue
        at = table.at(labels[found])
        if multi_label:
            raise DataError(f"{at} has {found!r}, and no cell has {SEPARATOR!r}; add ?separator={sign}")
        raise DataError(f"{at} has the label {found!r}, which are several; {ASK}; if it is one, rename it")
    if not multi_label and (crossed := _crossed(labels)) is not None:
        at = table.at(labels[crossed])
        logger.warning("%s has the label %r, which is read as one class; %s", at, crossed, ASK)


def indicators(sets: Sequence[frozenset[str]], known: dict[str, int], classes: int, table: Table) -> np.ndarray:
    """Return whether each image has each label, bool `(n, classes)`."""
    if len(sets) * classes > MOST_LABELS:
        raise DataError(
            f"the labels {table} are {len(sets):,} images of {classes:,} classes, which take more than "
            f"{MOST_LABELS >> 30} GiB; name fewer classes"
        )
    labels = np.zeros((len(sets), classes), bool)
    for row, names in enumerate(sets):
        labels[row, [known[name] for name in names]] = True
    return labels


def several_labels(cells: Collection[str], sign: str) -> str | None:
    """Return a cell that plainly has several labels, separated by `sign`; `None` if there is none.

    It has a part that is also the whole of a cell, or that stands at another place in another cell. Names of classes
    with such a sign, as of a hierarchy, seldom do.
    """
    known: dict[str, tuple[int, str]] = {}
    for cell in sorted(cells):
        parts = [part.strip() for part in cell.split(sign)]
        for place, part in enumerate(parts if len(parts) > 1 else [cell.strip()], len(parts) > 1):
            first = known.setdefault(part, (place, cell))
            if part and first[0] != place:
                return cell if place else first[1]
    return None


def _crossed(cells: Collection[str]) -> str | None:
    """Return a cell like `cat|big` beside `cat|small` and `dog|big`, each part of which other cells share; or `None`.

    In a hierarchy the last part seldom recurs.
    """
    parts = {cell: list(enumerate(cell.split(SEPARATOR))) for cell in cells if SEPARATOR in cell}
    counts = Counter(part for cell in parts.values() for part in cell)
    return next((cell for cell, its in parts.items() if all(counts[part] > 1 for part in its)), None)
