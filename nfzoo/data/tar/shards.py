"""Images in tar files of the WebDataset layout: random access by an index of the members, without unpacking."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from nfzoo.config import is_int
from nfzoo.data.images import UNLABELLED, Images, Texts, class_name, has_ending
from nfzoo.data.labels import numbered_classes
from nfzoo.data.layouts import is_visible
from nfzoo.data.tar.headers import Member, list_members, read_at
from nfzoo.errors import DataError
from nfzoo.files import open_regular, parse_json, read_text
from nfzoo.transforms.decode import IMAGE_SUFFIXES

CLASSES_FILE = "classes.txt"
COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")
"""Endings of compressed files, whose members allow no random access."""

_MAX_LABEL_SIZE = 1 << 20  # bytes of a label file
_OPEN_FILES = 128
_READERS = 16  # files indexed at a time; on a network disk, reading headers is waiting


class _Shard(NamedTuple):
    """The state of a tar file when it was indexed."""

    path: str
    size: int
    modified: int  # ns


_Index = tuple[_Shard, list[tuple[Member, int]]]  # images with their labels


@dataclass(frozen=True, eq=False)
class TarShards(Images[io.BytesIO]):
    """Images in tar files.

    Reading changes no file position and takes no lock, so threads and processes, forked or pickled, share the object.

    Attributes:
        shards: the files.
        prefixes: the text before the member's name in the names of images, for each file.
        names: names of the image members of all files.
        ranges: shard, first byte and number of bytes of each member, int64 `(len(names), 3)`.
    """

    shards: tuple[_Shard, ...]
    prefixes: tuple[str, ...]
    names: Texts
    ranges: np.ndarray

    @classmethod
    def index(cls, paths: Sequence[str | Path], classes: tuple[str, ...] | None = None) -> TarShards:
        """Read the headers and labels of all files, but no images.

        The label of `KEY.jpg` (or another image) is the number in `KEY.cls`, or `label` in `KEY.json`. `KEY` is the
        member's name up to the first dot of its last part, as in WebDataset.

        Args:
            classes: the class names, if they are known. By default they are the lines of a `classes.txt` beside the
                first file or one folder up. Without that file they are the numbers from 0 to the greatest label.

        Raises:
            DataError: if a file is cut off, compressed or no tar file; if an image has no label, or a label no image;
                if two members have one name; or if a label is no number of a class.
        """
        if not paths:
            raise DataError("there are no tar files to read")
        files = [os.fspath(path) for path in paths]
        if classes is None:
            classes = _class_names(Path(files[0]))
        indices = _read_indices(files, labelled=True)
        samples = [(path, *sample) for path, (_, part) in zip(files, indices, strict=True) for sample in part]
        if not samples:
            raise DataError(f"{_all(files)} holds no images; expected are members KEY.jpg and KEY.cls")
        path, member, greatest = max(samples, key=lambda sample: sample[2])
        if classes is None:
            classes = numbered_classes(greatest, len(samples), f"{member.name!r} in {path!r}")
        elif greatest >= len(classes):
            raise DataError(
                f"{member.name!r} in {path!r} has label {greatest}, beyond the {len(classes)} classes; labels "
                f"count from 0, and {CLASSES_FILE} names one class a line"
            )
        return cls._of(indices, [f"{path}, " for path in files], classes)

    @classmethod
    def unlabelled(cls, paths: Sequence[Path], base: Path) -> TarShards:
        """Read the headers of all files; an image is named by its file's path from `base` and its member's name.

        Raises:
            DataError: as `index`, except for labels.
        """
        files = [str(path) for path in paths]
        indices = _read_indices(files, labelled=False)
        if not any(samples for _, samples in indices):
            raise DataError(f"{_all(files)} holds no images")
        return cls._of(indices, [f"{path.relative_to(base).as_posix()}/" for path in paths], ())

    @classmethod
    def _of(cls, indices: Sequence[_Index], prefixes: Sequence[str], classes: tuple[str, ...]) -> TarShards:
        samples = [(k, *sample) for k, (_, part) in enumerate(indices) for sample in part]
        return cls(
            np.arange(len(samples)),
            np.array([label for _, _, label in samples], np.int64),
            classes,
            tuple(shard for shard, _ in indices),
            tuple(prefixes),
            Texts(member.name for _, member, _ in samples),
            np.array([(k, member.offset, member.size) for k, member, _ in samples], np.int64),
        )

    def row_name(self, row: int) -> str:
        return self.prefixes[self.ranges[row, 0]] + self.names[row]

    def stamp(self) -> str:
        return hashlib.sha256(self.ranges.tobytes()).hexdigest()

    def files(self) -> Iterable[str | Path]:
        return [shard.path for shard in self.shards]

    def read_row(self, row: int) -> io.BytesIO:
        shard, offset, size = self.ranges[row].tolist()
        try:
            content = read_at(_opened(self.shards[shard]).file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{self.row_name(row)} cannot be read: {error.strerror or error}") from error
        if len(content) < size:
            raise DataError(f"{self.row_name(row)} is cut off: the tar file became shorter while it was read")
        image = io.BytesIO(content)
        image.name = self.row_name(row)  # for messages of `open_image`
        return image


class _Opened:
    """A file that is closed with its last reference."""

    def __init__(self, shard: _Shard) -> None:
        self.file = open_regular(shard.path)
        status = os.fstat(self.file.fileno())
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.modified):
            raise DataError(f"{shard.path!r} changed after it was indexed; start again, and keep the files unchanged")

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


# Forked processes inherit descriptors, and reading at an offset does not move them, so all may share them.
_opened = functools.lru_cache(maxsize=_OPEN_FILES)(_Opened)


# -- the index


def _read_indices(files: list[str], *, labelled: bool) -> list[_Index]:
    with ThreadPoolExecutor(min(_READERS, len(files))) as pool:
        return list(pool.map(functools.partial(_read_index, labelled=labelled), files))


def _read_index(path: str, *, labelled: bool) -> _Index:
    """Read the index of one tar file."""
    if path.lower().endswith(COMPRESSED):
        raise DataError(f"{path!r} is compressed, so its members cannot be read at random; decompress it to a .tar")
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            members = [member for member in list_members(file, path) if _is_content(member.name)]
            images = _labelled_images(file, path, members) if labelled else _all_images(path, members)
            return _Shard(path, status.st_size, status.st_mtime_ns), images
    except OSError as error:
        raise DataError(f"the tar file {path!r} cannot be read: {error.strerror or error}") from error


def _is_content(name: str) -> bool:
    """Return whether a member lies in no hidden folder, nor in one that a system made, such as `__MACOSX`."""
    return all(is_visible(part) for part in name.split("/")[:-1] if part not in ("", ".", ".."))


def _all_images(path: str, members: Iterable[Member]) -> list[tuple[Member, int]]:
    suffixes = tuple(IMAGE_SUFFIXES)
    images = {}
    for member in members:
        if has_ending(member.name.rpartition("/")[2], suffixes) and images.setdefault(member.name, member) != member:
            raise DataError(f"{path!r} holds {member.name!r} twice; make it again with one name for each image")
    return [(member, UNLABELLED) for member in images.values()]


def _labelled_images(file: BinaryIO, path: str, members: Iterable[Member]) -> list[tuple[Member, int]]:
    images: dict[str, Member] = {}
    texts: dict[tuple[str, str], Member] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        key, _, ending = base.partition(".")
        ending = ending.rpartition(".")[2].lower()
        key = f"{folder}/{key}" if folder else key
        if not base or base.startswith("."):
            continue
        if f".{ending}" in IMAGE_SUFFIXES:
            first = images.setdefault(key, member)
        elif ending in ("cls", "json"):
            first = texts.setdefault((key, ending), member)
        else:
            continue
        if first is not member:
            raise DataError(
                f"{path!r} holds {first.name!r} and {member.name!r}, both for the key {key!r}; a key, the name up to "
                "its first dot, belongs to one image and one label"
            )
    for key, ending in texts:
        if ending == "cls" and key not in images:
            raise DataError(f"{path!r} holds {texts[key, ending].name!r} and no image {key + '.jpg'!r} to go with it")
    samples = []
    for key, image in images.items():
        text = texts.get((key, "cls")) or texts.get((key, "json"))
        if text is None:
            raise DataError(
                f"{image.name!r} in {path!r} has no label; add {key + '.cls'!r}, which holds the number of its class, "
                "or unpack the file if its folders are the classes"
            )
        samples.append((image, _label(file, path, text)))
    return samples


def _label(file: BinaryIO, path: str, member: Member) -> int:
    if member.size > _MAX_LABEL_SIZE:
        raise DataError(f"{member.name!r} in {path!r} is {member.size:,} bytes long, too long for a label")
    content = read_at(file.fileno(), member.size, member.offset)
    is_json = member.name.lower().endswith(".json")
    try:
        text = content.decode()
        label = parse_json(text) if is_json else int(text)
        if isinstance(label, dict):
            label = label["label"]
        if not is_int(label, 0, (1 << 31) - 1):
            raise ValueError
    except (ValueError, KeyError) as error:
        shown = content[:40].decode(errors="replace")
        raise DataError(
            f"{member.name!r} in {path!r} holds {shown!r} where a class number from 0 on is expected"
            + (", under 'label'" if is_json else "")
        ) from error
    return label


def _class_names(shard: Path) -> tuple[str, ...] | None:
    """Read the lines of `classes.txt`, if it exists; trailing empty lines do not count."""
    for folder in (shard.parent, shard.absolute().parent.parent):
        path = folder / CLASSES_FILE
        if path.exists():
            try:
                names = tuple(class_name(line.strip()) for line in read_text(path).rstrip().splitlines())
            except (OSError, ValueError) as error:
                raise DataError(f"{str(path)!r} cannot be read: {error}") from error
            if not names or not all(names) or len(set(names)) < len(names):
                raise DataError(f"{str(path)!r} must name every class once, one a line, in the order of the labels")
            return names
    return None


def _all(files: list[str]) -> str:
    return repr(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
