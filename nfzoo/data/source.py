"""Which images to train on and which to hold out: `open_split` reads what the user names as data."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from nfzoo.data.hf_datasets import TableImages, open_hub, open_parquet
from nfzoo.data.images import DIGITS, Digits, ImageFolder, Images
from nfzoo.data.patterns import expand, is_pattern, only, split_options
from nfzoo.data.tar_shards import COMPRESSED, TarShards
from nfzoo.errors import ConfigError, DataError

HELD_OUT = 0.2
"""Part of each class that is held out by default."""
HUB = "hub:"

_VALIDATION_NAMES = ("val", "validation", "valid", "dev", "test")
_FILES = (".tar", ".parquet", ".tgz", *(f".tar{ending}" for ending in COMPRESSED))

Opener: TypeAlias = Callable[[tuple[str, ...] | None], Images]


class Split(NamedTuple):
    """Training and held-out images with the same classes."""

    train: Images
    validation: Images


class HeldOut(NamedTuple):
    """Images to judge a model by: the part that a source holds out, or all that it has.

    Attributes:
        dataset: name of the data, for the record.
        split: name of the part, where the data have one.
        where: what messages call it.
    """

    images: Images
    dataset: str
    split: str | None
    where: str


class _Parts(NamedTuple):
    """What a source offers: one part, or one to train on and one held out. Each is opened when wanted."""

    first: Opener
    held_out: Opener | None = None
    name: str | None = None


def open_split(source: str, *, validation_fraction: float = HELD_OUT, seed: int = 0) -> Split:
    """The two parts of a data set.

    A source is one of

    - `"digits"`: the embedded handwritten digits;
    - a folder with a subfolder of images per class;
    - a folder of tar files, or their names with `*` and `{000..146}`, of the WebDataset layout: see `TarShards`;
    - a folder of parquet files, or their names;
    - `hub:ORG/NAME` or `hub:ORG/NAME:CONFIG`: a data set of the Hugging Face Hub.

    Parquet and Hub take options behind a `?`, such as `?image=img&label=fine_label`: the columns, the names of the
    parts (`train`, `validation`), and for the Hub the `revision`.

    A folder with `train/` and `val/` (or `validation/`, `test/`) inside, tar or parquet files with such names, and a
    data set of the Hub with such parts are split already; of any other source `validation_fraction` of each class is
    held out, the same part for the same `seed`.

    Raises:
        DataError: for data that are not there or cannot be read: see `ImageFolder.scan`, `TarShards.index`,
            `TableImages.wrap`; also if a class is too small to be split.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction must be between 0 and 1, not {validation_fraction!r}")
    parts = _parts(source)
    whole = parts.first(None)
    if parts.held_out is not None:
        return Split(whole, parts.held_out(whole.classes))
    held = _stratified(np.asarray(whole.labels), whole.classes, validation_fraction, seed)
    return Split(whole.subset(np.flatnonzero(~held)), whole.subset(np.flatnonzero(held)))


def has_held_out(source: str) -> bool:
    """Whether the source brings its own held-out part."""
    return _parts(source).held_out is not None


def open_held_out(source: str) -> HeldOut:
    """The part that a source holds out itself, or else all of its images.

    Raises:
        DataError: as `open_split`.
    """
    parts = _parts(source)
    images = (parts.held_out or parts.first)(None)
    place = Path(source)
    if not place.is_dir():
        plain = split_options(source)[0]
        name = plain.removeprefix(HUB) if source.startswith(HUB) else Path(plain).name
        return HeldOut(images, name, parts.name, repr(source))
    if parts.name is not None and (place / parts.name).is_dir():
        place = place / parts.name
    place = place.resolve()
    if place.name in ("train", *_VALIDATION_NAMES):
        return HeldOut(images, place.parent.name, place.name, repr(str(place)))
    return HeldOut(images, place.name, parts.name, repr(str(place)))


def _parts(source: str) -> _Parts:
    if source == DIGITS:
        return _Parts(lambda _: Digits.embedded())
    if source.startswith(HUB):
        return _hub_parts(source)
    path, options = split_options(source)
    root = Path(path)
    held_out = held_out_folder(root)
    if held_out is not None:
        return _Parts(_opener(root / "train", options), _opener(held_out, options), held_out.name)
    if root.is_dir():
        files = _data_files(root)
        return _file_parts(files, source, options) if files else _Parts(_opener(root, options))
    if not root.exists() and is_pattern(path):
        return _file_parts(expand(path, _FILES), source, options)
    if root.name.lower().endswith(_FILES):
        return _file_parts([root], source, options)
    only(options, (), source)
    return _Parts(partial(ImageFolder.scan, root))


def _opener(folder: Path, options: dict[str, str]) -> Opener:
    """A folder without parts: of tar files, of parquet files, or of classes."""
    files = _data_files(folder)
    if files:
        return _files_opener(files, str(folder), options)
    only(options, (), str(folder))
    return partial(ImageFolder.scan, folder)


def _data_files(folder: Path) -> list[Path]:
    """The tar and parquet files directly in a folder, by name; none if there are subfolders, which are then classes."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if any(path.is_dir() for path in entries):
        return []
    return sorted(path for path in entries if path.name.lower().endswith(_FILES))


def _file_parts(files: list[Path], source: str, options: dict[str, str]) -> _Parts:
    """Files are parts where names such as `train-00000.tar` and `data_val.parquet` say so of all of them."""
    words = {path: set(re.split(r"[^a-z]+", path.name.lower())) for path in files}
    names = {
        "train": options.get("train", "train"),
        "validation": options.get("validation") or _first(_VALIDATION_NAMES, set().union(*words.values())),
    }
    train = [path for path in files if names["train"] in words[path]]
    held_out = [path for path in files if names["validation"] in words[path]]
    if not train or not held_out:
        if "train" in options or "validation" in options:
            raise DataError(f"no files of {source!r} have the names that it asks for as parts")
        return _Parts(_files_opener(files, source, options))
    strange = [path for path in files if not words[path] & {names["train"], *_VALIDATION_NAMES, names["validation"]}]
    if strange:
        raise DataError(f"{str(strange[0])!r} names no part, as train and {names['validation']} do; move it elsewhere")
    return _Parts(_files_opener(train, source, options), _files_opener(held_out, source, options), names["validation"])


def _files_opener(files: list[Path], source: str, options: dict[str, str]) -> Opener:
    if all(path.suffix.lower() == ".parquet" for path in files):
        only(options, ("image", "label", "train", "validation"), source)
        return lambda classes: TableImages.wrap(
            open_parquet(files, repr(source)),
            repr(source),
            classes,
            image=options.get("image"),
            label=options.get("label"),
        )
    if any(path.suffix.lower() == ".parquet" for path in files):
        raise DataError(f"{source!r} holds tar files and parquet files; name the ones to read, such as {source}/*.tar")
    only(options, ("train", "validation"), source)
    return partial(TarShards.index, files)


def _hub_parts(source: str) -> _Parts:
    path, options = split_options(source)
    repository, _, config = path.removeprefix(HUB).partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise DataError(f"{source!r} names no data set of the Hub; write hub:ORG/NAME or hub:ORG/NAME:CONFIG")
    found = open_hub(repository, config or None, options.get("revision"), repr(source))
    names = [str(name) for name in found]
    train = options.get("train") or ("train" if "train" in names or len(names) > 1 else names[0])
    validation = options.get("validation") or _first(_VALIDATION_NAMES, set(names) - {train})
    for key, name in (("train", train), ("validation", validation)):
        if name and name not in names:
            raise DataError(f"{source!r} has no part {name!r} but {', '.join(names)}; add ?{key}=PART")

    def opener(name: str) -> Opener:
        return lambda classes: TableImages.wrap(
            found[name],
            f"{path} ({name})",
            classes,
            image=options.get("image"),
            label=options.get("label"),
        )

    return _Parts(opener(train), opener(validation) if validation else None, validation)


def _first(names: tuple[str, ...], present: set[str]) -> str | None:
    return next((name for name in names if name in present), None)


def held_out_folder(root: Path) -> Path | None:
    """The part beside `root/train/` that is not trained on; `None` if there is no `train/`.

    Raises:
        DataError: if there is `train/` and no such part.
    """
    if not (root / "train").is_dir():
        return None
    found = [root / name for name in _VALIDATION_NAMES if (root / name).is_dir()]
    if not found:
        raise DataError(f"{str(root)!r} has train/ but none of {', '.join(n + '/' for n in _VALIDATION_NAMES)}")
    return found[0]


def _stratified(labels: np.ndarray, classes: tuple[str, ...], fraction: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 0x5EED])
    held = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {name!r} has {len(members)} image, too few to hold any out; add images, or split the folder "
                "into train/ and val/ yourself"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held[rng.permutation(members)[:count]] = True
    return held
