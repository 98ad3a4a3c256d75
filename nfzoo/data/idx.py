"""Images in IDX files, the format of MNIST and of the data sets that take its place, such as Fashion-MNIST.

An IDX file has two zero bytes, the type of its numbers (8 for unsigned bytes), the number of dimensions, their sizes as
big-endian 32-bit numbers, and the numbers themselves, row by row. Source: http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image

from nfzoo.data.images import UNLABELLED, Images, Indices, check_classes
from nfzoo.data.labels import numbered_classes
from nfzoo.errors import DataError
from nfzoo.files import open_regular

FASHION_MNIST = "fashion-mnist"
"""The name of data that a package of Debian installs."""
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""The folder of Debian's package dataset-fashion-mnist."""
# Source: arXiv 1708.07747, table 2.
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_NAME = re.compile(r"(.*?)(train|t10k|test)-(images-idx3|labels-idx1)-ubyte(\.gz)?")
_FASHION_FOLDERS = ("fashion-mnist", "fashionmnist", "fashion_mnist")
_LARGEST = 1 << 31  # bytes of pixels
_CHUNK = 1 << 20


class IDXFiles(NamedTuple):
    """The files of one part, `train` or `test`."""

    part: str
    images: Path
    labels: Path


class IDXFolder(NamedTuple):
    """The parts of a folder of IDX files, and the names of the classes where they are known."""

    train: IDXFiles
    held_out: IDXFiles | None
    classes: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class IDXImages(Images[Image.Image]):
    """The grey images of IDX files, in memory.

    Attributes:
        pixels: grey levels, uint8 `(rows, height, width)`.
        starts: the name of each part, and its first row.
    """

    pixels: np.ndarray
    starts: tuple[tuple[str, int], ...]

    @classmethod
    def read(
        cls, files: IDXFiles, names: tuple[str, ...] | None = None, classes: tuple[str, ...] | None = None
    ) -> IDXImages:
        """Return the images of a part.

        Args:
            files: images and labels.
            names: the names of the classes; by default the expected ones, or else the numbers of the labels.
            classes: the expected class names, if they are known.

        Raises:
            DataError: for files that are no IDX files, are cut off, do not belong together, or have other classes.
        """
        pixels, labels = read_idx(files.images, 3), read_idx(files.labels, 1)
        if len(pixels) != len(labels):
            raise DataError(
                f"{str(files.images)!r} has {len(pixels):,} images, and {files.labels.name!r} {len(labels):,} labels"
            )
        highest = int(labels.max())
        known = names or classes or numbered_classes(highest, len(labels), repr(str(files.labels)))
        if highest >= len(known):
            few = f"those of {len(known)} classes are 0 to {len(known) - 1}"
            raise DataError(f"{str(files.labels)!r} has the label {highest}; {few}")
        if classes is not None:
            check_classes(repr(str(files.images.parent)), known, classes)
        return cls(np.arange(len(labels)), labels.astype(np.int64), known, pixels, ((files.part, 0),))

    @classmethod
    def unlabelled(cls, parts: Sequence[IDXFiles]) -> IDXImages:
        """Return the images of several parts, one after the other."""
        pixels = [read_idx(files.images, 3) for files in parts]
        if len({array.shape[1:] for array in pixels}) > 1:
            raise DataError(f"the images of {str(parts[0].images.parent)!r} differ in size; name one part")
        starts = np.cumsum([0, *map(len, pixels)]).tolist()
        rows = np.arange(starts.pop())
        named = tuple(zip((files.part for files in parts), starts, strict=True))
        return cls(rows, np.full(len(rows), UNLABELLED), (), np.concatenate(pixels), named)

    def read_row(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])

    def grey_levels(self, indices: Indices) -> np.ndarray:
        return self.pixels[self.rows[np.asarray(indices, np.int64)]]

    def row_name(self, row: int) -> str:
        part, start = next(pair for pair in reversed(self.starts) if pair[1] <= row)
        return f"{part}, image {row - start}"

    def stamp(self) -> str:
        return f"idx {self.pixels.shape} {zlib.crc32(self.pixels.data)}"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file, which may be compressed by gzip.

    Args:
        path: the file.
        dimensions: the number of dimensions that it has to have.

    Raises:
        DataError: if it is no such file, or has more or fewer bytes than its header says.
    """
    try:
        with open_regular(path) as file:
            opened = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            shape = _shape(cast(BinaryIO, opened), path, dimensions)
            count = math.prod(shape)
            content = bytearray()  # which grows with what is there, not with what the header promises
            while len(content) <= count and (chunk := opened.read(min(_CHUNK, count + 1 - len(content)))):
                content += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read ({error}); fetch it anew") from error
    if not count:
        raise DataError(f"{str(path)!r} is empty: its header says {' x '.join(map(str, shape))}")
    if len(content) != count:
        more = "more" if len(content) > count else f"only {len(content):,}"
        raise DataError(f"{str(path)!r} promises {count:,} bytes and has {more}; fetch it anew")
    numbers = np.frombuffer(content, np.uint8).reshape(shape)
    numbers.setflags(write=False)  # images share their memory
    return numbers


def _shape(file: BinaryIO, path: Path, dimensions: int) -> tuple[int, ...]:
    header = file.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{str(path)!r} is no IDX file of unsigned bytes in {dimensions} dimension(s)")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if math.prod(shape) > _LARGEST:
        raise DataError(f"{str(path)!r} promises {math.prod(shape):,} bytes, more than {_LARGEST:,}")
    return shape


def fashion_mnist() -> Path:
    """Return the folder of Fashion-MNIST.

    Raises:
        DataError: where it is not installed; the message says how to get it.
    """
    if FASHION_FOLDER.is_dir():
        return FASHION_FOLDER
    raise DataError(
        f"{FASHION_MNIST} is not in {str(FASHION_FOLDER)!r}; on Debian and Ubuntu `apt-get install "
        "dataset-fashion-mnist` puts it there, and elsewhere name the folder that holds its four files"
    )


def find_idx(folder: Path) -> IDXFolder | None:
    """Return the parts of a folder of IDX files, or `None` if it has none.

    Raises:
        DataError: for a part without its images or labels, the same file twice, or files of several data sets.
    """
    matches = [match for name in sorted(os.listdir(folder)) if (match := _NAME.fullmatch(name))]
    if not matches:
        return None
    if len(prefixes := {match[1] for match in matches}) > 1:
        raise DataError(
            f"{str(folder)!r} has files of several data sets, {', '.join(sorted(map(repr, prefixes)))}; move one away"
        )
    found: dict[tuple[str, str], Path] = {}
    for match in matches:
        key = "train" if match[2] == "train" else "test", match[3].partition("-")[0]
        if key in found and found[key].name != match[0].removesuffix(".gz"):  # which would be the same, compressed
            raise DataError(f"{str(folder)!r} has {found[key].name!r} and {match[0]!r}; keep one of them")
        found.setdefault(key, folder / match[0])
    parts = {}
    for part in ("train", "test"):
        kinds = [kind for kind in ("images", "labels") if (part, kind) in found]
        if len(kinds) == 1:
            raise DataError(f"{str(folder)!r} has the {kinds[0]} of {part} alone; images and labels belong together")
        if kinds:
            parts[part] = IDXFiles(part, found[part, "images"], found[part, "labels"])
    first, *others = parts.values()
    near = [name.lower() for name in folder.resolve().parts[-2:]]
    known = FASHION_CLASSES if any(name in _FASHION_FOLDERS for name in near) else None
    return IDXFolder(first, others[0] if others else None, known)
