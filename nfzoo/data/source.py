"""Sources of data by name: split for training, held-out images for evaluation, or all images.

A source is one of

- `"digits"`: the embedded handwritten digits;
- `"fashion-mnist"`: 70,000 photographs of clothing, where a package of Debian put them;
- a folder of IDX files, as MNIST and its successors have: see `idx`;
- a folder with a subfolder of images per class, or with a table of labels: see `label_files`;
- a folder of tar files, or their names with `*` and `{000..146}`: see `TarShards`;
- a folder of parquet files, or their names;
- `hub:ORG/NAME` or `hub:ORG/NAME:CONFIG`: a data set of the Hugging Face Hub.

Parquet and Hub take options behind a `?`, such as `?image=img&label=fine_label`: the columns, the names of the parts
(`train`, `validation`), and for the Hub the `revision`.

The module is long because every command names its data in the same way.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from nfzoo.data.digits import DIGITS, Digits
from nfzoo.data.hf_datasets import HFDataset, folders_of_hub, open_hub, open_parquet
from nfzoo.data.idx import FASHION_MNIST, IDXImages, fashion_mnist, find_idx
from nfzoo.data.images import ImageFolder, Images, expand, files_below, is_pattern, logger, warn_of_unread
from nfzoo.data.label_files import LabelFiles, has_split, open_label_files, split_query
from nfzoo.data.layouts import (
    HELD_OUT_NAMES,
    TRAIN_NAMES,
    check_more_than_one,
    find_parts,
    is_visible,
)
from nfzoo.data.tar.shards import COMPRESSED, TarShards
from nfzoo.errors import ConfigError, DataError, shown
from nfzoo.files import nearest_path
from nfzoo.transforms.decode import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import datasets

HELD_OUT = 0.2
"""Share of each class that is held out by default."""
HUB = "hub:"
MEMORY = "memory:"
"""The begin of the name of data, or of a model, that a Python program gave to `nfzoo.fit`; no command opens it."""

_ARCHIVES = (".tar", ".parquet", ".tgz", *(f".tar{ending}" for ending in COMPRESSED))
_OPTIONS = ("image", "label", "train", "validation", "revision")

Opener: TypeAlias = Callable[[tuple[str, ...] | None], Images]
"""Opens images; the argument is the expected class names, or `None` if they are unknown."""


class Split(NamedTuple):
    """Training and held-out images with the same classes."""

    train: Images
    validation: Images


class Part(NamedTuple):
    """Images for evaluation: the held-out part of a source, or all of its images.

    Attributes:
        dataset: name of the data, for the result.
        split: name of the part, if the data have parts.
        source: the data's name in messages.
    """

    images: Images
    dataset: str
    split: str | None
    source: str


class _Source(NamedTuple):
    """The parts of a source, opened on demand: one with all images, or one for training and one held out."""

    first: Opener
    held_out: Opener | None = None
    name: str | None = None  # of the held-out part


def open_split(
    source: str, *, validation_fraction: float = HELD_OUT, seed: int = 0, labels: LabelFiles | None = None
) -> Split:
    """Open a source as training and held-out images.

    Some sources are split already: a folder with `train/` and `val/` (or `validation/`, `test/`), tar or parquet files
    with such names, and a data set of the Hub with such parts. Of any other source, `validation_fraction` of each class
    is held out; the same `seed` holds out the same images.

    Args:
        labels: the files that say what the images of a folder are; by default their folders say it.

    Raises:
        DataError: if the data are missing or unreadable (see `ImageFolder.scan`, `TarShards.index`,
            `HFDataset.labelled`), or if a class is too small to be split.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction must be between 0 and 1, not {validation_fraction!r}")
    parts = _parts(source, labels)
    images = parts.first(None)
    if parts.held_out is not None:
        return Split(images, parts.held_out(images.classes))
    if labels is None:
        check_more_than_one(Path(source), images.classes)
    return hold_out(images, validation_fraction, seed=seed)


def hold_out(images: Images, fraction: float, *, seed: int = 0) -> Split:
    """Split images, holding out `fraction` of each class; the same `seed` holds out the same images.

    Raises:
        DataError: if a class is too small to be split.
    """
    if images.multi_label:
        held_out = _stratified_sets(images.labels, fraction, seed)
    else:
        held_out = _stratified(images.labels, images.classes, fraction, seed)
    return Split(images.subset(np.flatnonzero(~held_out)), images.subset(np.flatnonzero(held_out)))


def open_part(source: str, classes: tuple[str, ...] | None = None, *, held_out: bool = False) -> Images:
    """Open the training part of a source, or its held-out part; all images of a source without parts.

    Args:
        classes: the expected class names, if they are known.

    Raises:
        DataError: as `open_split`.
    """
    parts = _parts(source)
    return (parts.held_out if held_out and parts.held_out is not None else parts.first)(classes)


def open_parts(source: str, *, labels: LabelFiles | None = None) -> dict[str, Images]:
    """Open the parts of a source by name, each with the classes that it has itself; `"all"` without parts.

    A warning counts the images of a folder that its `labels` do not name.

    Raises:
        DataError: as `open_split`, except for parts whose classes differ.
    """
    parts = _parts(source, labels)
    opened = {"all" if parts.held_out is None else TRAIN_NAMES[0]: parts.first(None)}
    if parts.held_out is not None:
        opened[parts.name or HELD_OUT_NAMES[0]] = parts.held_out(None)
    if labels is not None:
        named = {images.name(i) for images in opened.values() for i in range(len(images))}
        others = [name for name in files_below(Path(source), tuple(IMAGE_SUFFIXES)) if name not in named]
        if others:
            which = "that no row names" if labels.multi_label else "without a label"
            logger.warning("images %s are left out: %d in %s, such as %s", which, len(others), source, others[0])
    return opened


def has_held_out(source: str, *, labels: LabelFiles | None = None) -> bool:
    """Return whether the source has a held-out part of its own."""
    if source.startswith(MEMORY):
        return "validation" in split_options(source)[1]
    return _parts(source).held_out is not None if labels is None else has_split(labels)


def open_held_out(source: str, *, labels: LabelFiles | None = None) -> Part:
    """Open the held-out part of a source, or all of its images if it has none.

    Raises:
        DataError: as `open_split`.
    """
    source = source_text(source)
    parts = _parts(source, labels)
    images = (parts.held_out or parts.first)(None)
    folder = Path(source)
    if not folder.is_dir():
        plain = split_options(source)[0]
        name = plain.removeprefix(HUB) if source.startswith(HUB) else Path(plain).name
        return Part(images, name, parts.name, repr(source))
    if parts.name is not None and (folder / parts.name).is_dir():
        folder = folder / parts.name
    folder = folder.resolve()
    if folder.name.lower() in (*TRAIN_NAMES, *HELD_OUT_NAMES):
        return Part(images, folder.parent.name, folder.name, repr(str(folder)))
    return Part(images, folder.name, parts.name, repr(str(folder)))


def open_all(source: str, *, part: str | None = None) -> Images:
    """Open every image of a source, with or without labels, of all its parts, always in the same order.

    - Digits are named `digit 17`.
    - A folder gives every image at any depth, named by its path from the folder. A folder without images gives those
      of the tar or parquet files below it.
    - Tar files give every image member, named by file and member.
    - Parquet files give every row, named `row 17`, counted over the files in the order of their names.
    - A Hub data set gives every row, named `train, row 17`.

    Hidden files and folders are skipped.

    Args:
        part: open only this part of a Hub data set.

    Raises:
        DataError: if the data are missing, hold no images, or cannot be opened.
    """
    source = source_text(source)
    if part is not None and not source.startswith(HUB):
        raise DataError(f"{source!r} has no parts to choose from, as {HUB}ORG/NAME has; leave the part {part!r} out")
    if source == DIGITS:
        return Digits.embedded()
    if source == FASHION_MNIST and not Path(source).exists():
        source = str(fashion_mnist())
    if source.startswith(HUB):
        path, options, dataset = _hub(source, ("image", "revision"))
        if part is not None and part not in dataset:
            raise DataError(f"{source!r} has no part {part!r} but {', '.join(map(str, dataset))}")
        names = [part] if part is not None else sorted(map(str, dataset))
        facts = f"{path} {options.get('revision')} {[len(dataset[name]) for name in names]}"
        tables = {f"{name}, ": dataset[name] for name in names}
        folders = folders_of_hub(_repository(path))
        return HFDataset.unlabelled(tables, repr(source), image=options.get("image"), folders=folders, facts=facts)
    # Local files: a folder of images, or the archives that the source names.
    path, options = split_options(source)
    root = Path(path)
    if root.is_dir() and (idx := find_idx(root)) is not None:
        _check_options(options, (), source)
        return IDXImages.unlabelled([files for files in (idx.train, idx.held_out) if files is not None])
    if root.is_dir():
        unread: Counter[str] = Counter()
        images = files_below(root, tuple(IMAGE_SUFFIXES), unread)
        warn_of_unread(root, unread)
        if images:
            _check_options(options, (), source)
            return ImageFolder.unlabelled(root, images)
        base, archives = root, [root / name for name in files_below(root, _ARCHIVES)]
        if not archives:
            raise DataError(f"the folder {source!r} holds no images, nor tar or parquet files; name one that does")
    elif not root.exists() and is_pattern(path):
        archives = [file.absolute() for file in expand(path, _ARCHIVES)]
        base = Path(os.path.commonpath([file.parent for file in archives]))
    elif not root.is_file():
        near = nearest_path(root) or f"; give a folder, a tar or parquet file, or {HUB}ORG/NAME"
        raise DataError(f"the data {source!r} do not exist{near}")
    elif not root.name.lower().endswith(_ARCHIVES):
        raise DataError(f"{source!r} is no folder, tar file or parquet file; give single images without --data")
    else:
        base, archives = root.parent, [root]
    # Archives: parquet files, or else tar files.
    if _are_parquet(archives, source):
        _check_options(options, ("image",), source)
        facts = " ".join(f"{file.relative_to(base).as_posix()} {file.stat().st_size}" for file in archives)
        tables = {"": open_parquet(archives, repr(source))}
        return HFDataset.unlabelled(tables, repr(source), image=options.get("image"), folders=[base], facts=facts)
    _check_options(options, (), source)
    return TarShards.unlabelled(archives, base)


def fingerprint(images: Images) -> str:
    """Return the SHA-256 of names and stamp, which differs for other images or another order."""
    digest = hashlib.sha256(images.stamp().encode())
    for i in range(len(images)):
        digest.update(b"\0" + os.fsencode(images.name(i)))
    return digest.hexdigest()


# -- the parts of a source


def _parts(source: str, labels: LabelFiles | None = None) -> _Source:
    source = source_text(source)
    if source.startswith(MEMORY):
        raise DataError(f"{source!r} names data of a Python program, which no command opens; nfzoo.fit takes them")
    if labels is not None:
        first, held_out, name = open_label_files(source, labels)
        return _Source(lambda _: first, None if held_out is None else lambda _: held_out, name)
    if source == DIGITS:
        return _Source(lambda _: Digits.embedded())
    if source == FASHION_MNIST and not Path(source).exists():
        source = str(fashion_mnist())
    if source.startswith(HUB):
        return _hub_parts(source)
    path, options = split_options(source)
    root = Path(path)
    if root.is_dir() and (idx := find_idx(root)) is not None:
        _check_options(options, (), source)
        first = partial(IDXImages.read, idx.train, idx.classes)
        if idx.held_out is None:
            return _Source(first)
        return _Source(first, partial(IDXImages.read, idx.held_out, idx.classes), idx.held_out.part)
    split = find_parts(root) if root.is_dir() else None
    if split is not None:
        train, held_out = (_open_folder(folder, options) for folder in split)
        return _Source(train, held_out, split.held_out.name)
    if root.is_dir():
        files = _archives_in(root)
        return _file_parts(files, source, options) if files else _Source(_open_folder(root, options))
    if not root.exists() and is_pattern(path):
        return _file_parts(expand(path, _ARCHIVES), source, options)
    if root.name.lower().endswith(_ARCHIVES):
        return _file_parts([root], source, options)
    _check_options(options, (), source)
    return _Source(partial(ImageFolder.scan, root))


def _open_folder(folder: Path, options: dict[str, str]) -> Opener:
    """Open a folder without parts: of tar files, of parquet files, or of classes."""
    files = _archives_in(folder)
    if files:
        return _open_files(files, str(folder), options)
    _check_options(options, (), str(folder))
    return partial(ImageFolder.scan, folder)


def _archives_in(folder: Path) -> list[Path]:
    """List the tar and parquet files directly in a folder; none if it has subfolders, which are then classes."""
    entries = [path for path in folder.iterdir() if is_visible(path.name)]
    if any(path.is_dir() for path in entries):
        return []
    return sorted(path for path in entries if path.name.lower().endswith(_ARCHIVES))


def _file_parts(files: list[Path], source: str, options: dict[str, str]) -> _Source:
    """Split files if all their names tell the part, such as `train-00000.tar` and `data_val.parquet`."""
    words = {path: set(re.split(r"[^a-z]+", path.name.lower())) for path in files}
    known = set().union(*words.values())
    train = options.get("train") or _first(TRAIN_NAMES, known) or TRAIN_NAMES[0]
    validation = options.get("validation") or _first(HELD_OUT_NAMES, known)
    training = [path for path in files if train in words[path]]
    held_out = [path for path in files if validation in words[path]]
    if not training or not held_out:
        if "train" in options or "validation" in options:
            raise DataError(f"{source!r} needs files named after both parts, {train} and {validation or 'validation'}")
        return _Source(_open_files(files, source, options))
    strange = [path for path in files if not words[path] & {train, validation, *HELD_OUT_NAMES}]
    if strange:
        raise DataError(f"{str(strange[0])!r} has the name of no part ({train}, {validation}); move it elsewhere")
    return _Source(_open_files(training, source, options), _open_files(held_out, source, options), validation)


def _open_files(files: list[Path], source: str, options: dict[str, str]) -> Opener:
    if not _are_parquet(files, source):
        _check_options(options, ("train", "validation"), source)
        return partial(TarShards.index, files)
    _check_options(options, ("image", "label", "train", "validation"), source)
    image, label = options.get("image"), options.get("label")
    folder = Path(os.path.commonpath([file.absolute().parent for file in files]))
    facts = " ".join(str(file.stat().st_size) for file in files)
    return lambda classes: HFDataset.labelled(
        open_parquet(files, repr(source)),
        repr(source),
        classes,
        image=image,
        label=label,
        folders=[folder],
        facts=facts,
    )


def _are_parquet(files: list[Path], source: str) -> bool:
    kinds = {path.suffix.lower() == ".parquet" for path in files}
    if len(kinds) > 1:
        raise DataError(f"{source!r} holds tar files and parquet files; name the ones to read, such as {source}/*.tar")
    return kinds == {True}


def _hub(source: str, known: tuple[str, ...]) -> tuple[str, dict[str, str], datasets.DatasetDict]:
    """Return the name, the options and the parts of a data set on the Hub."""
    path, options = split_options(source)
    _check_options(options, known, source)
    repository, config = _repository(path), path.removeprefix(HUB).partition(":")[2]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise DataError(f"{source!r} names no data set of the Hub; write {HUB}ORG/NAME or {HUB}ORG/NAME:CONFIG")
    return path, options, open_hub(repository, config or None, options.get("revision"), repr(source))


def _repository(path: str) -> str:
    return path.removeprefix(HUB).partition(":")[0]


def _hub_parts(source: str) -> _Source:
    path, options, dataset = _hub(source, _OPTIONS)
    names = [str(name) for name in dataset]
    train = options.get("train") or ("train" if "train" in names or len(names) > 1 else names[0])
    validation = options.get("validation") or _first(HELD_OUT_NAMES, set(names) - {train})
    for key, name in (("train", train), ("validation", validation)):
        if name and name not in names:
            raise DataError(f"{source!r} has no part {name!r} but {', '.join(names)}; add ?{key}=PART")
    image, label = options.get("image"), options.get("label")

    def opener(name: str) -> Opener:
        source = f"{path} ({name})"
        return lambda classes: HFDataset.labelled(
            dataset[name], source, classes, image=image, label=label, folders=folders_of_hub(_repository(path))
        )

    return _Source(opener(train), opener(validation) if validation else None, validation)


def _first(names: tuple[str, ...], present: set[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _stratified(labels: np.ndarray, classes: tuple[str, ...], fraction: float, seed: int) -> np.ndarray:
    """Select `fraction` of each class at random, as a bool mask `(len(labels),)`."""
    rng = np.random.default_rng([seed, 0x5EED])
    held_out = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {name!r} has {len(members)} image, too few to hold any out; add images, or hold some out "
                "yourself, in train/ and val/ or as the validation of nfzoo.fit"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out[rng.permutation(members)[:count]] = True
    return held_out


def _stratified_sets(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Select `fraction` of the images of multi-label data at random, as a bool mask `(len(labels),)`.

    Images are drawn from groups by the rarest of their labels, of equally rare ones the first, and from the group of
    those without a label. Of a group of one image none is drawn.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    counts = labels.sum(0)
    rarest = np.where(labels.any(1), np.where(labels, counts, len(labels) + 1).argmin(1), -1)
    held_out = np.zeros(len(labels), dtype=bool)
    for group in np.unique(rarest).tolist():
        members = np.flatnonzero(rarest == group)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out[rng.permutation(members)[:count]] = True
    if not held_out.any():
        raise DataError(
            f"{len(labels)} images are too few to hold any out by their rarest labels; add images, or name those to "
            "hold out in a column split"
        )
    return held_out


# -- the names of sources


def source_text(source: str | os.PathLike[str]) -> str:
    """Return the name of a source as text; raise a `DataError` for data in memory."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    raise DataError(
        f"data are a folder, tar or parquet files, {HUB}ORG/NAME, {FASHION_MNIST!r} or {DIGITS!r}, by name, not "
        f"{shown(source)}; write images of a data set in memory into one folder per class"
    )


def split_options(source: str) -> tuple[str, dict[str, str]]:
    """Split a source into name and options `?image=…&label=…`; a `?` of a file pattern stays in the name."""
    return split_query(source, _OPTIONS)


def _check_options(options: dict[str, str], known: tuple[str, ...], source: str) -> None:
    for name in options:
        if name not in known:
            remedy = f"it takes {', '.join(known)}" if known else "it takes none"
            raise DataError(f"{source!r} does not take the option {name!r}; {remedy}")
