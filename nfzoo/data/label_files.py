"""Labels of the images of a folder from a table beside them: CSV, TSV or parquet, with a row for each image.

Columns are found by their names, or named by options behind a `?`, as in `labels.csv?path=file&label=breed`:

- `path`: the image, relative to the folder of the data;
- `label`: its class;
- `split`: its part, if the table tells; `train` and `validation` are the values that stand for the parts.

Of multi-label data, where it is asked for, an image has a set of labels, which may be empty. A table gives it in one of
three ways:

- a cell of labels between `|`, or another `separator`; in parquet a list. Where no cell has the former, and parts of
  cells between `;` or `,` are labels elsewhere, the table is refused;
- a row for each label of an image;
- a column of 0 and 1 for each of the `labels`, as in `labels.csv?labels=cat,dog`, or with `labels=*` for each other
  column of the table.

The module is long because a table can be wrong in many ways, each of which has its message.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from nfzoo.data.hf_datasets import LABEL_COLUMNS, parquet_rows
from nfzoo.data.images import ImageFolder, Texts, logger
from nfzoo.data.labels import read_class_names
from nfzoo.data.layouts import HELD_OUT_NAMES, TRAIN_NAMES
from nfzoo.data.tables.cells import ASK, SEPARATOR, Columns, Table, check_cells, indicators, listed, reader, text_of
from nfzoo.errors import ConfigError, DataError, NfzooError, nearest
from nfzoo.files import csv_rows, open_regular

PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img")
SPLIT_COLUMNS = ("split", "part", "subset", "partition", "fold")

_USUAL = {"path": PATH_COLUMNS, "label": (*LABEL_COLUMNS, "class_name", "label_name"), "split": SPLIT_COLUMNS}
_OPTIONS = (*_USUAL, "train", "validation", "labels", "separator")
_REMEDY = "its first line must name its columns"


class LabelFiles(NamedTuple):
    """The files that say what the images of a folder are.

    Attributes:
        labels: a table, with options.
        validation: a table of the images that are held out; by default the split column of `labels` tells, or chance.
        class_names: a text file with the name of a class in each line, in the order of the model's outputs; by default
            the labels of the tables, sorted.
        multi_label: whether an image has a set of labels.
    """

    labels: str
    validation: str | None = None
    class_names: str | None = None
    multi_label: bool = False


def label_files(
    labels: str | None, validation: str | None, class_names: str | None, *, multi_label: bool = False
) -> LabelFiles | None:
    """Return the files that options name; `None` where there are none.

    Raises:
        ConfigError: for one of the others without `labels`, and for multi-label data without.
    """
    if labels is not None:
        return LabelFiles(labels, validation, class_names, multi_label)
    if multi_label:
        raise ConfigError("multi-label data have a table of the labels of each image; give it as labels")
    for name, value in {"validation_labels": validation, "class_names": class_names}.items():
        if value is not None:
            raise ConfigError(f"{name} {value!r} goes with a file of labels; give that as labels")
    return None


class LabelledParts(NamedTuple):
    """Images by their tables: those to train on, and those to hold out with the name of that part, if there are any."""

    first: ImageFolder
    held_out: ImageFolder | None
    name: str | None


class _Row(NamedTuple):
    label: frozenset[str]  # one, where the data are not multi-label
    split: str | None
    where: int  # line, or row from 1 on
    each: bool = False  # whether it has one label, and may be a row for each label

    def shown(self) -> str:
        return SEPARATOR.join(sorted(self.label))


def open_label_files(folder: str, files: LabelFiles) -> LabelledParts:
    """Open the images of a folder that tables name; the order of the rows does not matter.

    Classes are sorted, as numbers if all labels are numbers. With `class_names`, labels are names of that file, or
    numbers of its lines from 0 on.

    Raises:
        DataError: for a table that cannot be read or has no such columns; a row without path, label or part; a path
            outside of the folder, or in two rows that differ; a missing image; or a label that is no class.
        ConfigError: for a folder that is none, and for two ways to hold images out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"labels are for the images of a folder, and {folder!r} is none; give the folder as --data")
    table = other = _named(files.labels)
    rows, names = _read(table, root, files)
    if files.validation is not None:
        if _values(rows):
            raise ConfigError(
                f"{table} has a column that splits its images, and {files.validation!r} holds images out as well; "
                "leave one of them out"
            )
        other = _named(files.validation)
        more, more_names = _read(other, root, files)
        names |= more_names
        twice = next(iter(rows.keys() & more.keys()), None)
        if twice is not None:
            raise DataError(f"{twice!r} is both in {table} and in {other}; an image is to train on or held out")
        _check_there(root, rows, table)
        _check_there(root, more, other)
        split = dict.fromkeys(rows, True) | dict.fromkeys(more, False)
        name, rows = HELD_OUT_NAMES[1], rows | more
    else:
        split = _split(table, rows)
        _check_there(root, rows, table)
        name = None if split is None else _held_out_name(table, rows)
    known, classes = _classes(rows, names, files, lambda path: table if split is None or split.get(path) else other)
    paths = sorted(rows, key=lambda path: path.split("/"))
    if files.multi_label:
        labels = indicators([rows[path].label for path in paths], known, len(classes), table)
    else:
        labels = np.array([known[label] for path in paths for label in rows[path].label], np.int64)
    images = ImageFolder(np.arange(len(paths)), labels, classes, root, Texts(paths))
    if split is None:
        return LabelledParts(images, None, None)
    training = np.array([split.get(path, False) for path in paths], bool)
    known = np.array([path in split for path in paths], bool)
    return LabelledParts(
        images.subset(np.flatnonzero(training)), images.subset(np.flatnonzero(known & ~training)), name
    )


@functools.lru_cache(maxsize=8)  # it is asked after each epoch
def has_split(files: LabelFiles) -> bool:
    """Return whether the tables say which images are held out."""
    table = _named(files.labels)
    with _opened(table) as (header, _):
        return files.validation is not None or _column(table, header, "split") is not None


# -- tables


def split_query(source: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Split a source into name and options `?path=…&label=…`; a `?` of a file pattern stays in the name.

    Raises:
        DataError: for an option that is not among those `known`, or has no value.
    """
    path, mark, query = source.rpartition("?")
    if not mark or not re.fullmatch(r"\w+=[^&=]*(&\w+=[^&=]*)*", query):
        return source, {}
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        if name not in known:
            raise DataError(f"{source!r} does not take the option {name!r}; it takes {', '.join(known)}")
        if not value:
            raise DataError(f"{source!r} has an option without a value; write ?NAME=VALUE")
    return path, options


def _named(source: str) -> Table:
    path, options = split_query(source, _OPTIONS)
    return Table(Path(path), options)


@contextmanager
def _opened(table: Table) -> Iterator[tuple[list[str], Iterator[tuple[int, Sequence[Any]]]]]:
    """Yield the names of a table's columns, and its rows with their numbers."""
    try:
        with open_regular(table.path) as file:
            if table.path.suffix.lower() == ".parquet":
                yield parquet_rows(table.path, file)
            else:
                yield csv_rows(file, tabs=table.path.suffix.lower() == ".tsv")
    except FileNotFoundError as error:
        raise DataError(f"the labels {table} do not exist") from error
    except NfzooError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"the labels {table} are not in UTF-8; save them in it") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"the labels {table} cannot be read: {error}") from error


def _column(table: Table, header: Sequence[str], key: str) -> int | None:
    """Return the number of a column: the one that an option names, or the first that has a usual name."""
    names = [str(name).strip() for name in header]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"the labels {table} have two columns {twice!r}; {_REMEDY}, each by a name of its own")
    chosen = table.options.get(key)
    if chosen is not None:
        if chosen not in names:
            raise DataError(f"the labels {table} have no column {chosen!r} for ?{key}=; {listed(names)}")
        return names.index(chosen)
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in _USUAL[key] if name in lower), None)


def _read(table: Table, root: Path, files: LabelFiles) -> tuple[dict[str, _Row], set[str]]:
    """Return the rows of a table by the paths of their images from `root` on, with slashes; and labels of columns."""
    rows: dict[str, _Row] = {}
    names: set[str] = set()
    first: dict[str, int] = {}  # label -> row
    repeated, separated = 0, False
    base = os.path.abspath(root)
    with _opened(table) as (header, cells):
        if not header:
            raise DataError(f"the labels {table} are empty, or their first line is; {_REMEDY}")
        numbers = {key: _column(table, header, key) for key in _USUAL}
        read = reader(table, header, numbers, multi_label=files.multi_label)
        if isinstance(read, Columns):
            names, numbers["label"] = set(read.numbers), -1
        for key in ("path", "label"):
            if numbers[key] is None:
                columns = ", or ?labels=* for columns of 0 and 1" if key == "label" else ""
                hint = columns and columns + ("" if files.multi_label else f"; {ASK}")
                raise DataError(
                    f"the labels {table} have no column of {key}s with a usual name; {listed(header)}; {_REMEDY}, or "
                    f"add ?{key}=COLUMN{hint}"
                )
        for where, row in cells:
            at = table.at(where)
            places = {k: n for k, n in numbers.items() if n is not None and k != "label"}
            values = {k: text_of(row[n], at, k) for k, n in places.items()}
            for key, value in values.items():
                if not value:
                    raise DataError(f"{at} has no {key}; fill it in, or leave it out")
            path = _inside(values["path"], base, where, table)
            labels = read(row, at)
            separated |= len(labels) > 1
            for label in labels:
                first.setdefault(label, where)
            new = _Row(labels, values.get("split"), where, files.multi_label and len(labels) == 1)
            old = rows.setdefault(path, new)
            if old is new:
                continue
            if old.each and new.each and old.split == new.split and not new.label <= old.label:
                rows[path] = old._replace(label=old.label | new.label)
                continue
            repeated += 1
            hint = "" if files.multi_label else f"; {ASK}"
            same = old.label == new.label or (old.each and new.each and new.label <= old.label)
            for kind, equal, before, now in (
                ("label", same, old.shown(), new.shown()),
                ("part", old.split == new.split, old.split, new.split),
            ):
                if not equal:
                    raise DataError(
                        f"{at} has {path!r} with the {kind} {now!r}, and {old.where} has it with "
                        f"{before!r}; keep one of them{hint if kind == 'label' else ''}"
                    )
    if not rows:
        raise DataError(f"the labels {table} have no rows but the first, which names the columns")
    check_cells(table, first, multi_label=files.multi_label, separated=separated)
    if repeated:
        logger.warning("%s repeats the rows of %d images, which count once", table.path, repeated)
    return rows, names


def _inside(path: str, base: str, where: int, table: Table) -> str:
    """Return a path from the folder on; raise a `DataError` if it leads out of the folder by its name."""
    inside = os.path.normpath(path)
    if os.path.isabs(inside):
        inside = os.path.relpath(inside, base)
    if inside.split(os.sep)[0] == os.pardir or "\0" in inside:
        raise DataError(
            f"{table.at(where)} names {path!r}, which is not in the folder of the data, {base!r}; other files are "
            "not read: move it there"
        )
    return inside.replace(os.sep, "/")


def _check_there(root: Path, rows: dict[str, _Row], table: Table) -> None:
    missing = [path for path in rows if not os.path.isfile(root / path)]
    if missing:
        first = missing[0]
        raise DataError(
            f"{len(missing):,} of the {len(rows):,} images that {table} names are missing in {str(root)!r}, such as "
            f"{first!r} in {table.at(rows[first].where)}; paths start from the folder of the data"
        )


# -- parts


def _split(table: Table, rows: dict[str, _Row]) -> dict[str, bool] | None:
    """Return which images are to train on and which are held out; `None` if the table does not tell."""
    values = _values(rows)
    if not values:
        for key in ("train", "validation"):
            if key in table.options:
                raise DataError(f"{table} has no column that splits its images, for ?{key}=; add ?split=COLUMN")
        return None
    held_out, chosen = _held_out_name(table, rows), table.options.get("train")
    train = [value for value in values if (value == chosen if chosen else value.lower() in TRAIN_NAMES)]
    if not train and not chosen and "validation" in table.options:  # such as folds, of which one is held out
        train = [value for value in values if value != held_out]
    if not train:
        option = f" {chosen!r} for ?train=" if chosen else " to train on"
        raise DataError(f"{table} has no part{option}; {_parts(values)}; add ?train=VALUE")
    left = [value for value in values if value not in (*train, held_out)]
    odd = next((value for value in left if value.lower() not in HELD_OUT_NAMES), None)
    if odd is not None and "validation" not in table.options:
        row = next(row for row in rows.values() if row.split == odd)
        raise DataError(
            f"{table.at(row.where)} has the part {odd!r}, which is none of {TRAIN_NAMES[0]}, "
            f"{', '.join(HELD_OUT_NAMES)}; name the parts with ?train=VALUE&validation=VALUE"
        )
    for value in left:
        count = sum(row.split == value for row in rows.values())
        logger.warning("%s has %d images of the part %r, which are left out", table.path, count, value)
    return {path: row.split in train for path, row in rows.items() if row.split not in left}


def _values(rows: dict[str, _Row]) -> list[str]:
    return list(dict.fromkeys(row.split for row in rows.values() if row.split is not None))


def _held_out_name(table: Table, rows: dict[str, _Row]) -> str:
    values, chosen = _values(rows), table.options.get("validation")
    found = [value for value in values if value == chosen]
    if chosen is None:
        found = [value for name in HELD_OUT_NAMES for value in values if value.lower() == name]
    if not found:
        raise DataError(f"{table} has no part to hold out; {_parts(values)}; add ?validation=VALUE")
    return found[0]


def _parts(values: Sequence[str]) -> str:
    return f"its parts are {', '.join(repr(value[:100]) for value in values[:5])}"


# -- classes


def _classes(
    rows: dict[str, _Row], names: set[str], files: LabelFiles, table_of: Callable[[str], Table]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the number of each label's class, and the names of the classes.

    Args:
        names: labels besides those of the rows.
        table_of: is asked for a message.
    """
    distinct = {label for row in rows.values() for label in row.label} | names
    numbered = all(re.fullmatch("[0-9]{1,9}", label) for label in distinct)
    if files.class_names is None:
        classes = tuple(sorted(distinct, key=lambda label: (int(label), label) if numbered else (0, label)))
        known = {name: i for i, name in enumerate(classes)}
    else:
        classes = read_class_names(files.class_names)
        known = {name: i for i, name in enumerate(classes)}
        if numbered and not distinct <= known.keys():
            known = {label: int(label) for label in distinct if int(label) < len(classes)}
    strange = distinct - known.keys()
    if strange:
        having = (
            (table_of(path).at(row.where), min(row.label & strange))
            for path, row in rows.items()
            if row.label & strange
        )
        where, label = next(having, (files.labels, min(strange)))
        raise DataError(
            f"{where} has the label {label!r}, which is none of the {len(classes):,} classes of "
            f"{files.class_names!r}{nearest(label, classes)}"
        )
    return known, classes
