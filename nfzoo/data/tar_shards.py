"""Images in tar files of the WebDataset layout, read at random from an index of their members, without unpacking."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nfzoo.config import is_int
from nfzoo.data.images import Indices, Texts
from nfzoo.data.tar_index import LONGEST_TEXT, Member, members, open_to_read, read_at
from nfzoo.errors import DataError
from nfzoo.transforms.decode import IMAGE_SUFFIXES

CLASSES_FILE = "classes.txt"
COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")
"""Endings of what is no plain tar file and has no members that could be read at random."""

_OPEN_FILES = 128
_READERS = 16  # files indexed at a time: on a network disk the headers cost waiting, not work


class _Shard(NamedTuple):
    """A tar file as it was when it was indexed."""

    path: str
    size: int
    modified: int  # ns


class _Sample(NamedTuple):
    name: str
    offset: int
    size: int
    label: int


@dataclass(frozen=True, eq=False)
class TarShards:
    """Images and labels in tar files: members `KEY.jpg` (or another image) and `KEY.cls`, or `KEY.json` with a `label`.

    `KEY` is the member's name up to the first dot of its last part, as in WebDataset. Reading needs no position and no
    lock, so threads and processes share the object, forked or pickled.

    Attributes:
        shards: the files.
        names: the image members of all of them; `rows` are those that count, in order.
        places: shard, first byte and number of bytes of each member, int64 `(len(names), 3)`.
    """

    shards: tuple[_Shard, ...]
    names: Texts
    places: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def index(cls, paths: Sequence[str | Path], classes: tuple[str, ...] | None = None) -> TarShards:
        """Read the headers and labels of all files, and of the images nothing.

        Args:
            classes: the class names, where they are known already. Else they are the lines of a `classes.txt` beside
                the first file or one folder up, or, without one, the numbers from 0 to the greatest label.

        Raises:
            DataError: for a file that is cut off, compressed or no tar file, for an image without a label or the
                reverse, for two members of the same name, and for a label that is no number of a class.
        """
        if not paths:
            raise DataError("there are no tar files to read")
        files = [os.fspath(path) for path in paths]
        if classes is None:
            classes = _class_names(Path(files[0]))
        with ThreadPoolExecutor(min(_READERS, len(files))) as pool:
            found = list(pool.map(_samples, files))
        samples = [(k, sample) for k, (_, part) in enumerate(found) for sample in part]
        if not samples:
            raise DataError(f"{files[0]!r}{_more(files)} holds no images; expected are members KEY.jpg and KEY.cls")
        labels = np.array([sample.label for _, sample in samples], np.int64)
        if classes is None:
            classes = tuple(map(str, range(int(labels.max()) + 1)))
        elif labels.max() >= len(classes):
            k, sample = samples[int(labels.argmax())]
            raise DataError(
                f"{sample.name!r} in {files[k]!r} has label {sample.label}, beyond the {len(classes)} classes; labels "
                f"count from 0, and {CLASSES_FILE} names one class a line"
            )
        places = np.array([(k, sample.offset, sample.size) for k, sample in samples], np.int64)
        names = Texts(sample.name for _, sample in samples)
        return cls(tuple(shard for shard, _ in found), names, places, np.arange(len(names)), labels, classes)

    def subset(self, indices: Indices) -> TarShards:
        chosen = np.asarray(indices, np.int64)
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def relabelled(self, index: Indices) -> TarShards:
        return replace(self, labels=np.asarray(index, np.int64)[self.labels])

    def name(self, index: int) -> str:
        row = self.rows[index]
        return f"{self.shards[self.places[row, 0]].path}, {self.names[row]}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        shard, offset, size = self.places[self.rows[index]].tolist()
        try:
            content = read_at(_opened(self.shards[shard]).descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{self.name(index)} cannot be read: {error.strerror or error}") from error
        if len(content) < size:
            raise DataError(f"{self.name(index)} is cut off: the tar file became shorter while it was read")
        picture = io.BytesIO(content)
        picture.name = self.name(index)  # for messages of `open_image`
        return picture, int(self.labels[index])


class _Opened:
    """A file descriptor that is closed with its last user."""

    def __init__(self, shard: _Shard) -> None:
        self.descriptor = open_to_read(shard.path)
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.modified):
            raise DataError(f"{shard.path!r} was changed after it was indexed; start again with files that stay")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# A descriptor is inherited by a forked process and reading by offset moves nothing in it, so all may share it.
_opened = functools.lru_cache(maxsize=_OPEN_FILES)(_Opened)


def _samples(path: str) -> tuple[_Shard, list[_Sample]]:
    """The labelled images of one tar file, in its order."""
    if path.lower().endswith(COMPRESSED):
        raise DataError(f"{path!r} is compressed, so its members cannot be read at random; decompress it to a .tar")
    try:
        descriptor = open_to_read(path)
        try:
            return _indexed(descriptor, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"the tar file {path!r} cannot be read: {error.strerror or error}") from error


def _indexed(descriptor: int, path: str) -> tuple[_Shard, list[_Sample]]:
    images: dict[str, Member] = {}
    texts: dict[tuple[str, str], Member] = {}
    status = os.fstat(descriptor)
    for member in members(descriptor, path, status.st_size):
        folder, _, base = member.name.rpartition("/")
        key, _, ending = base.partition(".")
        ending = ending.rpartition(".")[2].lower()
        key = f"{folder}/{key}" if folder else key
        if not base or base.startswith("."):
            continue
        if f".{ending}" in IMAGE_SUFFIXES:
            other = images.setdefault(key, member)
        elif ending in ("cls", "json"):
            other = texts.setdefault((key, ending), member)
        else:
            continue
        if other is not member:
            raise DataError(
                f"{path!r} holds {other.name!r} and {member.name!r}, both for the key {key!r}; a key, the name up to "
                "its first dot, belongs to one image and one label"
            )
    for key, ending in texts:
        if ending == "cls" and key not in images:
            raise DataError(f"{path!r} holds {texts[key, ending].name!r} and no image {key + '.jpg'!r} to go with it")
    found = [
        _Sample(image.name, image.offset, image.size, _label(descriptor, path, key, image, texts))
        for key, image in images.items()
    ]
    return _Shard(path, status.st_size, status.st_mtime_ns), found


def _label(descriptor: int, path: str, key: str, image: Member, texts: dict[tuple[str, str], Member]) -> int:
    member = texts.get((key, "cls")) or texts.get((key, "json"))
    if member is None:
        raise DataError(
            f"{image.name!r} in {path!r} has no label; beside it belongs {key + '.cls'!r}, which holds the number of "
            "its class"
        )
    if member.size > LONGEST_TEXT:
        raise DataError(f"{member.name!r} in {path!r} is {member.size:,} bytes long, and no label")
    whole = len(member.beginning) >= member.size
    content = member.beginning[: member.size] if whole else read_at(descriptor, member.size, member.offset)
    try:
        text = content.decode()
        label = json.loads(text) if member.name.lower().endswith(".json") else int(text)
        if isinstance(label, dict):
            label = label["label"]
        if not is_int(label, 0, (1 << 31) - 1):
            raise ValueError
    except (ValueError, KeyError, RecursionError) as error:
        shown = content[:40].decode(errors="replace")
        raise DataError(
            f"{member.name!r} in {path!r} holds {shown!r} where a class number from 0 on is expected"
            + (", under 'label'" if member.name.lower().endswith(".json") else "")
        ) from error
    return label


def _class_names(shard: Path) -> tuple[str, ...] | None:
    """The lines of `classes.txt`; empty ones at the end do not count."""
    for folder in (shard.parent, shard.absolute().parent.parent):
        path = folder / CLASSES_FILE
        if path.is_file():
            try:
                names = tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{str(path)!r} cannot be read: {error}") from error
            if not names or not all(names) or len(set(names)) < len(names):
                raise DataError(f"{str(path)!r} must name every class once, one a line, in the order of the labels")
            return names
    return None


def _more(files: list[str]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""
