"""Every image that a source holds, by name, whatever labels and parts it has: what bulk prediction reads."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nfzoo.data.hf_datasets import IMAGE_COLUMNS, TableImages, open_hub, open_parquet
from nfzoo.data.images import DIGITS, Digits, Picture, Texts, files_below, has_ending
from nfzoo.data.patterns import expand, is_pattern, only, split_options
from nfzoo.data.source import HUB
from nfzoo.data.tar_index import members, open_to_read, read_at
from nfzoo.data.tar_shards import COMPRESSED
from nfzoo.errors import DataError
from nfzoo.transforms.decode import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import datasets

_TARS = (".tar", ".tgz", *(f".tar{ending}" for ending in COMPRESSED))
_PARQUET = (".parquet",)
_READERS = 16  # tar files indexed at a time: on a network disk the headers cost waiting, not work


class Pictures(Protocol):
    """Images read at random: `pictures[i]` is what `preprocess.open_image` reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...

    def name(self, index: int) -> str:
        """The image's own name, which no other has: what results are joined by."""
        ...

    def stamp(self) -> str:
        """What is known of the contents beside names and number without reading any image."""
        ...


def fingerprint(pictures: Pictures) -> str:
    """SHA-256 of the names and of the stamp: other images, or another order of them, have another one."""
    digest = hashlib.sha256(pictures.stamp().encode())
    for i in range(len(pictures)):
        digest.update(b"\0" + os.fsencode(pictures.name(i)))
    return digest.hexdigest()


def open_all(source: str, *, part: str | None = None) -> Pictures:
    """All images of a source, in an order that is the same each time.

    - `"digits"`: all embedded digits, named `digit 17`.
    - A folder: every image below it, with or without subfolders, named by its path from there. Hidden files and folders
      are passed over. A folder without images stands for the tar or parquet files below it.
    - A tar file, or names of such with `*` and `{000..146}`: every image member, with a label or without, named by its
      file and its own name.
    - A parquet file, or names of such: every row, named `row 17`, counted over the files in the order of their names.
    - `hub:ORG/NAME` or `hub:ORG/NAME:CONFIG`: every row of a data set of the Hub, named `train, row 17`.

    Parquet and Hub take the column of images as `?image=img`, the Hub also `?revision=`.

    Args:
        part: take this part of a Hub data set alone.

    Raises:
        DataError: for data that are not there, hold no images, or cannot be opened.
    """
    if part is not None and not source.startswith(HUB):
        raise DataError(f"{source!r} has no parts to choose from, as {HUB}ORG/NAME has; leave the part {part!r} out")
    if source == DIGITS:
        return _Digits(Digits.embedded())
    if source.startswith(HUB):
        return _hub(source, part)
    path, options = split_options(source)
    root = Path(path)
    if root.is_dir():
        names = sorted(files_below(root, tuple(IMAGE_SUFFIXES)), key=lambda name: name.split("/"))
        if names:
            only(options, (), source)
            return _Files(root, Texts(names))
        found = [
            root / name for name in sorted(files_below(root, (*_TARS, *_PARQUET)), key=lambda name: name.split("/"))
        ]
        if not found:
            raise DataError(f"the folder {source!r} holds no images, nor tar or parquet files; name one that does")
        return _archives(root, found, source, options)
    if not root.exists() and is_pattern(path):
        found = expand(path, (*_TARS, *_PARQUET))
        base = Path(os.path.commonpath([file.absolute().parent for file in found]))
        return _archives(base, [file.absolute() for file in found], source, options)
    if not root.is_file():
        raise DataError(f"the data {source!r} do not exist; give a folder, a tar or parquet file, or {HUB}ORG/NAME")
    if not root.name.lower().endswith((*_TARS, *_PARQUET)):
        raise DataError(f"{source!r} is no folder, tar file or parquet file; single images go without --data")
    return _archives(root.parent, [root], source, options)


@dataclass(frozen=True, eq=False)
class _Digits:
    digits: Digits

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> Picture:
        return self.digits[index][0]

    def name(self, index: int) -> str:
        return self.digits.name(index)

    def stamp(self) -> str:
        return DIGITS


@dataclass(frozen=True, eq=False)
class _Files:
    root: Path
    names: Texts

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Picture:
        return self.root / self.names[index]

    def name(self, index: int) -> str:
        return self.names[index]

    def stamp(self) -> str:
        return "files"


@dataclass(frozen=True, eq=False)
class _Members:
    """Images in tar files.

    Attributes:
        places: file, first byte and number of bytes of each, int64 `(len(names), 3)`.
    """

    files: tuple[str, ...]
    names: Texts
    places: np.ndarray

    @classmethod
    def index(cls, base: Path, files: Sequence[Path]) -> _Members:
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        with ThreadPoolExecutor(min(_READERS, len(files))) as pool:
            found = list(pool.map(_image_members, map(str, files)))
        for k, file in enumerate(files):
            before = len(names)
            inside = file.relative_to(base).as_posix()
            for name, offset, size in found[k]:
                names.append(f"{inside}/{name}")
                places.append((k, offset, size))
            twice = len(names) - before - len(set(names[before:]))
            if twice:
                raise DataError(f"{str(file)!r} holds {twice} images whose names are not their own; make it again")
        if not names:
            raise DataError(f"{str(files[0])!r}{f' and {len(files) - 1} more' * (len(files) > 1)} holds no images")
        return cls(tuple(map(str, files)), Texts(names), np.array(places, np.int64))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Picture:
        k, offset, size = self.places[index].tolist()
        try:
            descriptor = open_to_read(self.files[k])
            try:
                content = read_at(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"{self.name(index)} cannot be read: {error.strerror or error}") from error
        if len(content) < size:
            raise DataError(f"{self.name(index)} is cut off: the tar file became shorter while it was read")
        picture = io.BytesIO(content)
        picture.name = self.name(index)  # for messages of `open_image`
        return picture

    def name(self, index: int) -> str:
        return self.names[index]

    def stamp(self) -> str:
        return hashlib.sha256(self.places.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class _Rows:
    """Images in tables, one after the other.

    Attributes:
        ends: how many rows the tables up to each have together.
        prefixes: what goes before `row 17` in names.
        facts: see `stamp`.
    """

    tables: tuple[TableImages, ...]
    ends: np.ndarray
    prefixes: tuple[str, ...]
    facts: str

    @classmethod
    def of(cls, tables: Iterable[tuple[str, datasets.Dataset]], source: str, column: str | None, facts: str) -> _Rows:
        found = [(prefix, _table(table, source, column)) for prefix, table in tables]
        ends = np.cumsum([len(table) for _, table in found])
        if not ends[-1]:
            raise DataError(f"{source} is empty")
        return cls(tuple(table for _, table in found), ends, tuple(prefix for prefix, _ in found), facts)

    def _place(self, index: int) -> tuple[int, int]:
        k = int(np.searchsorted(self.ends, index, side="right"))
        return k, index - (int(self.ends[k - 1]) if k else 0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Picture:
        k, row = self._place(index)
        return self.tables[k][row][0]

    def name(self, index: int) -> str:
        k, row = self._place(index)
        return f"{self.prefixes[k]}row {row}"

    def stamp(self) -> str:
        return self.facts


def _table(table: datasets.Dataset, source: str, column: str | None) -> TableImages:
    """The images alone of a table that may have no labels; the label 0 stands in."""
    import datasets

    there = ", ".join(table.column_names)
    if column is not None and column not in table.features:
        raise DataError(f"{source} has no column {column!r} for ?image=; its columns are {there}")
    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in IMAGE_COLUMNS if name in table.features]
    choices = [column] if column else [name for name in named if name in typed] or typed or named
    if not choices:
        raise DataError(f"{source} has no column of images known by name; its columns are {there}: add ?image=COLUMN")
    try:
        pictures = table.select_columns([choices[0]]).cast_column(choices[0], datasets.Image(decode=False))
    except Exception as error:  # pyarrow's and datasets' own errors, of many kinds
        raise DataError(
            f"the column {choices[0]!r} of {source} holds no encoded images (bytes, or bytes and path) but "
            f"{table.features[choices[0]]}; name another with ?image=COLUMN"
        ) from error
    rows = np.arange(len(table))
    return TableImages(pictures, source, rows, np.zeros_like(rows), ("",))


def _hub(source: str, part: str | None) -> Pictures:
    path, options = split_options(source)
    only(options, ("image", "revision"), source)
    repository, _, config = path.removeprefix(HUB).partition(":")
    if not repository:
        raise DataError(f"{source!r} names no data set of the Hub; write {HUB}ORG/NAME or {HUB}ORG/NAME:CONFIG")
    found = open_hub(repository, config or None, options.get("revision"), repr(source))
    if part is not None and part not in found:
        raise DataError(f"{source!r} has no part {part!r} but {', '.join(map(str, found))}")
    parts = [part] if part is not None else sorted(map(str, found))
    facts = f"{path} {options.get('revision')} {[len(found[name]) for name in parts]}"
    return _Rows.of(((f"{name}, ", found[name]) for name in parts), repr(source), options.get("image"), facts)


def _archives(base: Path, files: list[Path], source: str, options: dict[str, str]) -> Pictures:
    """Tar files or parquet files, of which `files` are not both."""
    parquet = [file for file in files if file.name.lower().endswith(_PARQUET)]
    if parquet and len(parquet) < len(files):
        raise DataError(f"{source!r} holds tar files and parquet files; name the ones to read, such as {source}/*.tar")
    if parquet:
        only(options, ("image",), source)
        facts = " ".join(f"{file.relative_to(base).as_posix()} {file.stat().st_size}" for file in parquet)
        return _Rows.of([("", open_parquet(parquet, repr(source)))], repr(source), options.get("image"), facts)
    only(options, (), source)
    packed = next((file for file in files if file.name.lower().endswith(COMPRESSED)), None)
    if packed is not None:
        raise DataError(f"{str(packed)!r} is compressed, so its members cannot be read at random; decompress it")
    return _Members.index(base, files)


def _image_members(path: str) -> list[tuple[str, int, int]]:
    """Name, first byte and number of bytes of the images in a tar file, in its order."""
    try:
        descriptor = open_to_read(path)
        try:
            return [
                (member.name, member.offset, member.size)
                for member in members(descriptor, path, os.fstat(descriptor).st_size)
                if has_ending(member.name.rpartition("/")[2], tuple(IMAGE_SUFFIXES))
            ]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"the tar file {path!r} cannot be read: {error.strerror or error}") from error
