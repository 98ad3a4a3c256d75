"""Labelled images read at random: what every source of them offers, the embedded digits, and folders of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO, Protocol, Self, TypeAlias

import numpy as np
from PIL import Image

from nfzoo.errors import DataError
from nfzoo.transforms.decode import IMAGE_SUFFIXES

DIGITS = "digits"

_DIGITS_SIZE = 32

Picture: TypeAlias = Path | Image.Image | BinaryIO
"""What `preprocess.open_image` reads."""
Indices: TypeAlias = Sequence[int] | np.ndarray


class Images(Protocol):
    """Labelled images, read at random: `images[i]` is `(what open_image reads, label)`.

    Attributes:
        classes: the name of each label.
        labels: the label of each image, int64 `(len,)`, known without reading any.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Picture, int]: ...

    def name(self, index: int) -> str:
        """What error messages call the image."""
        ...

    def subset(self, indices: Indices) -> Self:
        """These images alone, in this order."""
        ...

    def relabelled(self, index: Indices) -> Self:
        """The same images with the labels `index[label]`; the names of the classes stay those of the source."""
        ...


class Texts(Sequence[str]):
    """Many short texts in two arrays: a million Python strings would take hundreds of megabytes in every process."""

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
class Digits:
    """The embedded 1,797 handwritten digits, as 32x32 greyscale images with white strokes on black."""

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    classes: tuple[str, ...] = tuple("0123456789")

    @classmethod
    def embedded(cls) -> Digits:
        with files("nfzoo").joinpath("assets/digits.npz").open("rb") as file, np.load(file) as arrays:
            labels = arrays["labels"].astype(np.int64)
            return cls(arrays["images"], labels, np.arange(len(labels)))

    def subset(self, indices: Indices) -> Digits:
        return replace(self, images=self.images[indices], labels=self.labels[indices], rows=self.rows[indices])

    def relabelled(self, index: Indices) -> Digits:
        return replace(self, labels=np.asarray(index, np.int64)[self.labels])

    def name(self, index: int) -> str:
        return f"digit {self.rows[index]}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        grey = np.round(self.images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(grey).resize((_DIGITS_SIZE, _DIGITS_SIZE), Image.Resampling.BICUBIC)
        return image, int(self.labels[index])


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images in one folder per class.

    Attributes:
        files: every file that was found; `rows` are those that count, in order.
    """

    files: Texts
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def scan(cls, folder: str | Path, classes: tuple[str, ...] | None = None) -> ImageFolder:
        """All images below `folder/CLASS/`, sorted; hidden entries and files that are not images are passed over.

        Args:
            classes: the class names to expect, where they are known already.

        Raises:
            DataError: for a missing folder, no classes, a class without images, or other classes than expected.
        """
        folder = Path(folder)
        if not folder.is_dir():
            kind = "is not a folder" if folder.exists() else "does not exist"
            raise DataError(f"the data folder {str(folder)!r} {kind}; give one with a subfolder of images per class")
        found = tuple(sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")))
        if not found:
            raise DataError(f"{str(folder)!r} has no subfolders; put the images of each class into a folder of its own")
        for name in found:
            if any("\ud800" <= c <= "\udfff" for c in name):  # bytes that are no UTF-8, which no file of ours can hold
                raise DataError(f"the class folder {str(folder / name)!r} has a name that is no text; rename it")
        if classes is not None:
            check_classes(repr(str(folder)), found, classes)
        paths: list[str] = []
        counts: list[int] = []
        for name in found:
            images = sorted(files_below(folder / name, tuple(IMAGE_SUFFIXES)), key=lambda path: path.split("/"))
            if not images:
                raise DataError(f"the class folder {str(folder / name)!r} holds no images; remove it or fill it")
            paths += (os.path.join(folder, name, image) for image in images)
            counts.append(len(images))
        labels = np.repeat(np.arange(len(found), dtype=np.int64), counts)
        return cls(Texts(paths), np.arange(len(paths)), labels, found)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that count, in order."""
        return tuple(self[i][0] for i in range(len(self)))

    def subset(self, indices: Indices) -> ImageFolder:
        chosen = np.asarray(indices, np.int64)
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def relabelled(self, index: Indices) -> ImageFolder:
        return replace(self, labels=np.asarray(index, np.int64)[self.labels])

    def name(self, index: int) -> str:
        return self.files[self.rows[index]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Path, int]:
        return Path(self.name(index)), int(self.labels[index])


def check_classes(source: str, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """Raise a `DataError` if the classes of `source` are not those expected."""
    if found != expected:
        odd = sorted(set(found) ^ set(expected))
        differ = f"they differ in {', '.join(map(repr, odd[:5]))}" if odd else "the names are the same in another order"
        raise DataError(f"{source} has {len(found)} classes where {len(expected)} are expected; {differ}")


def files_below(root: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """The files below a folder, by their path from there with slashes, but those that are hidden.

    Links to folders are followed, none is entered twice. A `DataError` for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename!r} cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for folder, inner, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        inner[:] = [] if real in seen else sorted(name for name in inner if not name.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        path = Path(folder).relative_to(root).as_posix()
        below = "" if path == "." else path + "/"
        for name in names:
            if has_ending(name, endings):
                yield below + name


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a file's name ends like that, in whatever case, and is not hidden."""
    return name.lower().endswith(endings) and not name.startswith(".")
