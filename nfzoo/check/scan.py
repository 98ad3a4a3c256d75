"""Read every image of a data set once, in several processes, and keep a few numbers of each.

An image takes some 20 bytes besides its name, and 32 more if another has the same number of bytes, so that a million
images fit into any memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from nfzoo.analysis.sheets import thumbnail
from nfzoo.data.images import ImageFolder, Images, ImageSource
from nfzoo.data.tables.cells import SEPARATOR
from nfzoo.data.tar.shards import TarShards
from nfzoo.data.workers import load
from nfzoo.errors import DataError
from nfzoo.files import open_regular
from nfzoo.transforms.decode import ODD, describe_image, open_image

MOST_KEPT = 10_000
"""The most unreadable images whose reasons are kept; the number counts all."""

_BATCH = 64  # images that a process reads for one answer


@dataclass(eq=False)
class Facts:
    """What all images of a data set are. Indices count the images of all parts, one part after the other.

    Attributes:
        parts: the images by the name of their part.
        readable: whether an image can be decoded, bool `(n,)`.
        width, height: in pixels, of upright images, int32 `(n,)`; 0 where unreadable.
        modes: mode of Pillow's -> number of images.
        odd: an entry of `decode.ODD` -> number of images.
        problems: index -> why the image cannot be read, of the first `MOST_KEPT`.
        copies: groups of images with the same bytes, each as rising indices, in the order of the first.
    """

    parts: Mapping[str, Images]
    readable: np.ndarray
    width: np.ndarray
    height: np.ndarray
    modes: dict[str, int] = field(default_factory=dict)
    odd: dict[str, int] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    copies: list[np.ndarray] = field(default_factory=list)

    def where(self, index: int) -> tuple[str, int]:
        """Return the part of an image, and its index there."""
        return _where(list(self.parts.items()), index)

    def name(self, index: int) -> str:
        """Return the name of an image."""
        part, i = self.where(index)
        return self.parts[part].name(i)

    def class_of(self, index: int) -> str:
        """Return the name of an image's class, or the names of all its labels between bars."""
        part, i = self.where(index)
        images = self.parts[part]
        if images.multi_label:
            return SEPARATOR.join(images.classes[label] for label in np.flatnonzero(images.labels[i]).tolist())
        return images.classes[int(images.labels[i])]


def _where(parts: Sequence[tuple[str, Images]], index: int) -> tuple[str, int]:
    for name, images in parts:
        if index < len(images):
            return name, index
        index -= len(images)
    raise IndexError(index)


def scan(parts: Mapping[str, Images], *, workers: int = 0) -> Facts:
    """Decode every image, and find those with the same bytes.

    Images are compared by the SHA-256 of their bytes. Where the number of bytes is known beforehand, as of files and
    members of tar files, those alone are hashed that share it with another image.

    Args:
        workers: processes that read; see `nfzoo.data.workers.load`.
    """
    count = sum(map(len, parts.values()))
    sizes = np.concatenate([_sizes(images) for images in parts.values()])
    hashed = _shared(sizes)
    facts = Facts(parts, np.zeros(count, bool), np.zeros(count, np.int32), np.zeros(count, np.int32))
    place = np.cumsum(hashed) - 1  # of an image's hash in the table of hashes
    digests = np.zeros((int(hashed.sum()), 32), np.uint8)
    modes, odd = dict[str, int](), dict.fromkeys(ODD, 0)
    batches = (range(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH))
    with _bar(count) as bar:
        for answers in load(_Readings(parts, hashed), batches, list, workers if count > _BATCH else 0):
            for answer in answers:
                i = answer.image
                if answer.problem is not None:
                    if len(facts.problems) < MOST_KEPT:
                        facts.problems[i] = answer.problem
                    continue
                facts.readable[i], facts.width[i], facts.height[i] = True, answer.width, answer.height
                modes[answer.mode] = modes.get(answer.mode, 0) + 1
                for name in answer.odd:
                    odd[name] += 1
                if answer.digest is not None:
                    digests[place[i]] = np.frombuffer(answer.digest, np.uint8)
            bar.update(len(answers))
    facts.modes = dict(sorted(modes.items(), key=lambda item: (-item[1], item[0])))
    facts.odd = {name: number for name, number in odd.items() if number}
    rows = np.flatnonzero(hashed)
    known = facts.readable[rows]
    facts.copies = _equal(rows[known], digests[known])
    return facts


def _sizes(images: Images) -> np.ndarray:
    """Return the number of bytes of each image, int64; -1 where it is unknown before the image is read."""
    if isinstance(images, TarShards):
        return images.ranges[images.rows, 2]
    sizes = np.full(len(images), -1, np.int64)
    for i, file in enumerate(images.files() if isinstance(images, ImageFolder) else ()):
        try:
            sizes[i] = os.stat(file).st_size
        except OSError:  # reading it says what is wrong
            continue
    return sizes


def _shared(sizes: np.ndarray) -> np.ndarray:
    """Return which sizes occur more than once, or are unknown; bool."""
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return (counts[inverse] > 1) | (sizes < 0)


def _equal(rows: np.ndarray, digests: np.ndarray) -> list[np.ndarray]:
    """Return groups of two and more rows whose digests `(n, 32)` are equal."""
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort((rows, *words.T))
    ordered = words[order]
    starts = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(1))) if len(rows) else np.array([], int)
    ends = np.append(starts[1:], len(rows))
    several = ends - starts > 1
    groups = [rows[order[a:b]] for a, b in zip(starts[several], ends[several], strict=True)]
    return sorted(groups, key=lambda group: int(group[0]))


class _Reading(NamedTuple):
    image: int  # its index
    width: int = 0
    height: int = 0
    mode: str = ""
    odd: tuple[str, ...] = ()
    digest: bytes | None = None
    problem: str | None = None


@dataclass
class _Readings(TorchDataset[_Reading]):
    """What is read of each image."""

    parts: Mapping[str, Images]
    hashed: np.ndarray

    def __getitem__(self, index: int) -> _Reading:  # type: ignore[override]
        part, i = _where(list(self.parts.items()), index)
        try:
            source, _ = self.parts[part][i]
            described = describe_image(source)
            return _Reading(index, *described, _digest(source) if self.hashed[index] else None)
        except (DataError, OSError) as error:  # the latter for a file that goes away
            return _Reading(index, problem=str(error))


def _digest(source: ImageSource) -> bytes:
    """Return the SHA-256 of a file's bytes, or of the size and pixels of an image that has none."""
    if isinstance(source, Image.Image):
        return hashlib.sha256(f"{source.mode} {source.size} ".encode() + source.tobytes()).digest()
    if isinstance(source, Path):
        with open_regular(source) as file:
            return hashlib.file_digest(file, "sha256").digest()
    source.seek(0)
    return hashlib.sha256(source.read()).digest()


def _bar(total: int) -> tqdm:
    return tqdm(desc="check", total=total, unit="image", leave=False, disable=not sys.stderr.isatty())


# -- pictures


def pictures(facts: Facts, indices: Sequence[int], *, workers: int = 0) -> Iterator[tuple[int, Image.Image]]:
    """Yield thumbnails of images by their indices, in this order, without those that cannot be read."""
    batches = [indices[first : first + _BATCH] for first in range(0, len(indices), _BATCH)]
    for answers in load(_Thumbnails(facts.parts), batches, list, workers if len(batches) > 1 else 0):
        for index, content in answers:
            if content is not None:
                yield index, Image.open(io.BytesIO(content), formats=("PNG",))


@dataclass
class _Thumbnails(TorchDataset["tuple[int, bytes | None]"]):
    """Indices with thumbnails as PNG files, which any kind of process can send."""

    parts: Mapping[str, Images]

    def __getitem__(self, index: int) -> tuple[int, bytes | None]:  # type: ignore[override]
        part, i = _where(list(self.parts.items()), index)
        try:
            source, _ = self.parts[part][i]
            file = io.BytesIO()
            thumbnail(open_image(source)).save(file, "PNG", compress_level=1)
            return index, file.getvalue()
        except (DataError, OSError):
            return index, None
