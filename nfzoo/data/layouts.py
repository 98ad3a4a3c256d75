"""Layouts of data folders, told apart by their names: parts, classes, and what is neither."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nfzoo.errors import DataError
from nfzoo.transforms.decode import IMAGE_SUFFIXES

SYSTEM_FOLDERS = frozenset(
    [
        *("__macosx", "lost+found", "$recycle.bin", "system volume information", "thumbnails.lrdata"),
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@sharebin", "@appstore", "@database"),  # Synology
        *("@recycle", "@recently-snapshot", "@transcode"),  # QNAP
    ]
)
"""Folders that systems and programs make, in lower case: thumbnails, trash, file fragments. Hidden ones count too."""

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "validation", "valid", "dev", "test", "testing", "eval", "evaluation")
"""Names of parts, in lower case, the preferred first. Source: those that Hugging Face's datasets knows."""

# Words of names such as `train2017`, `cars_test` and `training_set`, and of folders that lie beside images.
_PART_WORDS = frozenset([*TRAIN_NAMES, *HELD_OUT_NAMES, "trainset", "trainval", "valset", "testset"])
_HOLDERS = frozenset(["images", "image", "imgs", "img", "jpegimages"])
_ANNOTATIONS = frozenset(
    [
        *("annotation", "annotations", "label", "labels", "mask", "masks", "trimaps", "bboxes", "meta", "metadata"),
        *("segmentations", "segmentationclass", "segmentationobject", "imagesets", "devkit"),
    ]
)

# What else data sets are kept in: pattern of file names -> what is to be said of such a file.
_CONVERT = "which is not read; write tar or parquet files"
_FOREIGN = {
    r".*\.(zip|7z|rar|tar\.gz|tgz|tar\.bz2|tar\.xz)": "is an archive that is not read; unpack it",
    r".*\.(tar|parquet)": "is read if you give the folder that holds it",
    r"metadata\.(csv|jsonl)": "holds labels, which are not read; write the data set as parquet, by `load_dataset` and "
    "`to_parquet` of Hugging Face's datasets",
    r".*\.arrow": "is a data set that `save_to_disk` wrote, which is not read; write it with `to_parquet`",
    r".*\.tfrecords?(-.*)?": f"is a TFRecord file, {_CONVERT}",
    r"(data|lock)\.mdb|.*\.lmdb": f"is an LMDB database, {_CONVERT}",
    r".*\.(h5|hdf5|npz|npy|mat|rec|beton)": f"is a file of arrays or records, {_CONVERT}",
    r".*-ubyte(\.gz)?|data_batch_\d.*|.*\.(pkl|pickle|pt|pth)": f"is a file of arrays, {_CONVERT}",
    r".*\.(csv|tsv|jsonl?|xml)": "may hold labels, which are not read; put the images of each class into a folder of "
    "its own",
}


class Parts(NamedTuple):
    """The folders for training and for validation."""

    train: Path
    held_out: Path


def is_visible(name: str) -> bool:
    """Return whether a file or folder is neither hidden nor made by a system."""
    return not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS


def subfolders(folder: Path) -> list[str]:
    """List the names of the visible subfolders, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and is_visible(entry.name))


def find_parts(root: Path) -> Parts | None:
    """Return the parts of a folder that is split; `None` if its subfolders are no parts.

    Names count in upper and lower case. A folder `train/` of images, without subfolders and beside other classes, is a
    class.

    Raises:
        DataError: if there is a part for training but none to hold out that has classes, or one twice.
    """
    names = subfolders(root)
    train = _one_part(root, names, TRAIN_NAMES)
    if train is None:
        return None
    others = [name for known in HELD_OUT_NAMES if (name := _one_part(root, names, (known,)))]
    for name in others:
        if not _is_flat(root / name):
            return Parts(root / train, root / name)
    if not others and len(names) > 1 and _is_flat(root / train):
        return None
    lack = f"the images in {others[0]}/ are of no class" if others else f"none of {', '.join(HELD_OUT_NAMES[:5])}"
    raise DataError(
        f"{str(root)!r} has {train}/, but {lack}; to hold out a share of the images of {train}/, give "
        f"{str(root / train)!r}"
    )


def _is_flat(folder: Path) -> bool:
    """Return whether a folder holds images and no subfolders."""
    return not subfolders(folder) and any(name.lower().endswith(tuple(IMAGE_SUFFIXES)) for name in files_in(folder))


def _one_part(root: Path, names: Sequence[str], known: tuple[str, ...]) -> str | None:
    found = [name for name in names if name.lower() in known]
    if len(found) > 1:
        raise DataError(f"{str(root)!r} has {' and '.join(f'{name}/' for name in found)}; keep one of them")
    return found[0] if found else None


def check_classes_of(folder: Path, names: Sequence[str]) -> None:
    """Raise a `DataError` if subfolders of these names are parts, or images and their annotations, and no classes."""
    parts = [name for name in names if _PART_WORDS & set(re.findall("[a-z]+", name.lower()))]
    if len(parts) > 1 and 2 * len(parts) >= len(names):
        raise DataError(
            f"the folders {_listed(parts)} of {str(folder)!r} are parts and no classes; name them train/ and val/, and "
            "put the images of each class into a folder of its own"
        )
    lower = {name.lower() for name in names}
    if lower & _HOLDERS and lower & _ANNOTATIONS and lower <= _HOLDERS | _ANNOTATIONS:
        images = next(name for name in names if name.lower() in _HOLDERS)
        raise DataError(
            f"the folders {_listed(names)} of {str(folder)!r} are images and their annotations and no classes; "
            f"{_remedy(folder / images)}"
        )


def check_more_than_one(folder: Path, names: Sequence[str]) -> None:
    """Raise a `DataError` for a folder of a single class, which a classifier cannot learn."""
    if len(names) == 1:
        raise DataError(
            f"{str(folder)!r} has one class alone, {names[0]!r}, and a classifier needs two; "
            f"{_remedy(folder / names[0])}"
        )


def _remedy(folder: Path) -> str:
    if folder.is_dir() and subfolders(folder):
        return f"if the classes are below it, give {str(folder)!r}"
    return "put the images of each class into a folder of its own"


def foreign_format(folder: Path) -> str:
    """Return what the files of a folder without images are, as the end of a message; "" if that is unknown."""
    names = sorted(name for _, _, found in os.walk(folder) for name in found if is_visible(name))
    for pattern, kind in _FOREIGN.items():
        for name in names:
            if re.fullmatch(pattern, name.lower()):
                return f"; {name!r} {kind}"
    return ""


def files_in(folder: Path) -> list[str]:
    """List the names of the files directly in a folder, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" and more" if len(names) > 5 else "")
