"""Images with random access: the interface of every source, and folders of image files."""

from __future__ import annotations

import glob
import logging
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from nfzoo.data.layouts import check_classes_of, files_in, foreign_format, is_visible, subfolders
from nfzoo.errors import DataError
from nfzoo.files import nearest_path
from nfzoo.transforms.decode import HEIF_REMEDY, HEIF_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES

logger = logging.getLogger("nfzoo")

UNLABELLED = -1
"""The label of an image without one."""

ImageSource: TypeAlias = Path | Image.Image | BinaryIO
"""A source that `open_image` accepts."""
Indices: TypeAlias = Sequence[int] | np.ndarray

_Source_co = TypeVar("_Source_co", bound=ImageSource, covariant=True)


@dataclass(frozen=True, eq=False)
class Images(ABC, Generic[_Source_co]):
    """Images with random access, with or without labels: `images[i]` is `(source for open_image, label)`.

    A label is a number, or of multi-label data a row of `labels`.

    A subclass reads and names the rows of a source. Selecting and relabelling images is the same for all.

    Attributes:
        rows: the selected rows of the source, in order, int64 `(len,)`.
        labels: the label of each image, int64 `(len,)`, known before images are read; `UNLABELLED` without labels. Of
            multi-label data, whether an image has each label, bool `(len, classes)`.
        classes: the name of each class; empty without labels.
    """

    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @abstractmethod
    def read_row(self, row: int) -> _Source_co:
        """Return a row of the source, selected or not, for `open_image`.

        Raises:
            DataError: if the row cannot be read.
        """

    @abstractmethod
    def row_name(self, row: int) -> str:
        """Return the unique name of a row of the source."""

    @abstractmethod
    def stamp(self) -> str:
        """Return a text that identifies the contents, apart from names and number, without reading images."""

    def grey_levels(self, indices: Indices) -> np.ndarray | None:
        """Return images that lie in memory, all of one size, uint8 `(n, H, W)`; `None` if they do not."""
        return None

    def files(self) -> Iterable[str | Path]:
        """Return the files that hold the images, always in the same order; none if they are not known."""
        return ()

    def name(self, index: int) -> str:
        """Return the name of an image, for messages and as a key of results."""
        return self.row_name(int(self.rows[index]))

    def subset(self, indices: Indices) -> Self:
        """Return the images of these indices, in this order."""
        selected = np.asarray(indices, np.int64)
        return replace(self, rows=self.rows[selected], labels=self.labels[selected])

    @property
    def multi_label(self) -> bool:
        """Return whether an image has a set of labels."""
        return self.labels.ndim == 2

    def relabelled(self, index: Indices, outputs: int | None = None) -> Self:
        """Return the images with labels `index[label]`; `classes` stay those of the source.

        Args:
            index: the new number of each class.
            outputs: how many numbers there are; by default as many as classes.
        """
        if not self.multi_label:
            return replace(self, labels=np.asarray(index, np.int64)[self.labels])
        labels = np.zeros((len(self), outputs or len(self.classes)), bool)
        labels[:, np.asarray(index, np.int64)] = self.labels
        return replace(self, labels=labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[_Source_co, Any]:
        label = self.labels[index]
        return self.read_row(int(self.rows[index])), label if self.multi_label else int(label)


class Texts(Sequence[str]):
    """Many short texts in two arrays; a million Python strings would take hundreds of megabytes in every process."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])


@dataclass(frozen=True, eq=False)
class ImageFolder(Images[Path]):
    """Image files.

    Attributes:
        root: the folder that relative paths start from.
        paths: path of every file, which is also its name.
    """

    root: Path
    paths: Texts

    @classmethod
    def scan(cls, folder: str | Path, classes: tuple[str, ...] | None = None) -> ImageFolder:
        """Find all images below `folder/CLASS/`, sorted; hidden entries and other files are skipped.

        A warning counts the files that are images of formats which are not read.

        Args:
            classes: the expected class names, if they are known.

        Raises:
            DataError: for a missing folder, no classes, a class without images, unexpected classes, or subfolders that
                are no classes.
        """
        folder = Path(folder)
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            near = nearest_path(folder) if not folder.exists() else ""
            raise DataError(
                f"the data folder {str(folder)!r} {problem}{near or '; give one with a subfolder of images per class'}"
            )
        folders: dict[str, str] = {}  # class -> folder
        for entry in subfolders(folder):
            if any("\ud800" <= c <= "\udfff" for c in entry):  # not UTF-8, so that config.json cannot hold it
                raise DataError(f"the class folder {str(folder / entry)!r} has a name that is no text; rename it")
            if folders.setdefault(class_name(entry), entry) != entry:
                other = folders[class_name(entry)]
                raise DataError(
                    f"{str(folder)!r} has folders {other!a} and {entry!a}, which differ in how a letter is encoded; "
                    "merge them"
                )
        names = tuple(sorted(folders))
        if not names:
            remedy = foreign_format(folder) or "; put the images of each class into a folder of its own"
            raise DataError(f"{str(folder)!r} has no subfolders, one for each class{remedy}")
        if classes is None:
            check_classes_of(folder, sorted(folders.values()))
        else:
            check_classes(repr(str(folder)), names, classes)
        paths: list[str] = []
        counts: list[int] = []
        unread: Counter[str] = Counter()
        for name in names:
            below = folder / folders[name]
            images = files_below(below, tuple(IMAGE_SUFFIXES), unread)
            if not images:
                warn_of_unread(folder, unread)
                remedy = foreign_format(below) or "; remove it or fill it"
                raise DataError(f"the class folder {str(below)!r} holds no images{remedy}")
            paths += (os.path.join(below, image) for image in images)
            counts.append(len(images))
        warn_of_unread(folder, unread)
        loose = [name for name in files_in(folder) if has_ending(name, tuple(IMAGE_SUFFIXES))]
        if loose:
            logger.warning("images in no class folder are left out: %d in %s, such as %s", len(loose), folder, loose[0])
        labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
        return cls(np.arange(len(paths)), labels, names, Path(), Texts(paths))

    @classmethod
    def unlabelled(cls, root: Path, paths: Sequence[str]) -> ImageFolder:
        """Return the files of these paths below `root`, without labels; each is named by its path."""
        return cls(np.arange(len(paths)), np.full(len(paths), UNLABELLED), (), root, Texts(paths))

    def read_row(self, row: int) -> Path:
        return self.root / self.paths[row]

    def row_name(self, row: int) -> str:
        return self.paths[row]

    def files(self) -> Iterable[str | Path]:
        return (os.path.join(self.root, self.paths[row]) for row in self.rows.tolist())

    def stamp(self) -> str:
        return "files"


def check_classes(source: str, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """Raise a `DataError` if the classes of `source` are not those expected."""
    if tuple(map(class_name, names)) != tuple(map(class_name, expected)):
        odd = sorted(set(names) ^ set(expected))
        differ = f"they differ in {', '.join(map(repr, odd[:5]))}" if odd else "the names are the same in another order"
        raise DataError(f"{source} has {len(names)} classes where {len(expected)} are expected; {differ}")


def class_name(text: str) -> str:
    """Return a name with each accented letter as one character (NFC), as file systems differ in this."""
    return unicodedata.normalize("NFC", text)


# -- lists of files


def warn_of_unread(root: Path, unread: Counter[str]) -> None:
    """Warn of image files that are not read; `unread` counts them by suffix."""
    if unread:
        remedy = f"; {HEIF_REMEDY}" if unread.keys() & HEIF_SUFFIXES else ""
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        logger.warning("%s holds images of formats that are not read, and are left out: %s%s", root, kinds, remedy)


def files_below(root: Path, endings: tuple[str, ...], unread: Counter[str] | None = None) -> list[str]:
    """List the visible files below a folder, as relative paths with slashes, sorted part by part.

    Links to folders are followed, and no folder is entered twice.

    Args:
        unread: counts the image files of formats that are not read, by their suffix.

    Raises:
        DataError: for a folder that cannot be read.
    """
    return sorted(_walk(root, endings, unread), key=lambda path: path.split("/"))


def _walk(root: Path, endings: tuple[str, ...], unread: Counter[str] | None) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename!r} cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(filter(is_visible, folders))
        if real in seen:
            continue
        seen.add(real)
        path = Path(folder).relative_to(root).as_posix()
        yield from (name if path == "." else f"{path}/{name}" for name in names if has_ending(name, endings))
        if unread is not None:
            suffixes = (os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
            unread.update(suffix for suffix in suffixes if suffix in UNREAD_SUFFIXES)


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Return whether a file is visible and its name has one of these endings, in upper or lower case."""
    return name.lower().endswith(endings) and not name.startswith(".")


def is_pattern(path: str) -> bool:
    """Return whether a name contains `*`, `?`, `[…]` or braces."""
    return re.search(r"[*?\[]|\{[^{}]*\}", path) is not None


def expand(pattern: str, endings: tuple[str, ...]) -> list[Path]:
    """List the files with one of the endings that match a pattern of `*`, `?`, `[…]`, `{a,b}` and `{000..146}`.

    Raises:
        DataError: if none matches, or if braces give a name without `*`, `?` or `[…]` that does not exist.
    """
    missing: list[str] = []
    files: list[Path] = []
    for name in _braces(pattern):
        if glob.has_magic(name):
            files += [Path(path) for path in sorted(glob.glob(name))]
        elif os.path.exists(name):
            files.append(Path(name))
        else:
            missing.append(name)
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]!r} of {pattern!r} is missing{more}")
    files = [path for path in files if path.name.lower().endswith(endings)]
    if not files:
        raise DataError(f"{pattern!r} matches no files that end in one of {', '.join(endings)}")
    twice = next((path for path, count in Counter(files).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{pattern!r} names {str(twice)!r} twice")
    return files


def _braces(pattern: str) -> list[str]:
    """Expand all pairs of braces, one by one; numbers keep their leading zeros."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds is None:
        inner = match[1].split(",")
    else:
        low, high = int(bounds[1]), int(bounds[2])
        if not 0 <= high - low < 1_000_000:
            raise DataError(f"{match[0]!r} in {pattern!r} does not count upwards; write {{000..146}}")
        inner = [f"{n:0{len(bounds[1])}}" for n in range(low, high + 1)]
    texts = [text for part in inner for text in _braces(pattern[: match.start()] + part + pattern[match.end() :])]
    return list(dict.fromkeys(texts))  # nested pairs give some names more than once
