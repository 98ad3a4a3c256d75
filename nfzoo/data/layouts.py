"""Layouts of data folders, told apart by their names: parts, classes, and what is neither."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nfzoo.errors import DataError
from nfzoo.transforms.decode import IMAGE_SUFFIXES

logger = logging.getLogger("nfzoo")

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
_HOLDERS = frozenset(["images", "image", "imgs", "img", "jpegimages", "photos", "pictures"])
_ANNOTATIONS = frozenset(
    [
        *("annotation", "annotations", "label", "labels", "mask", "masks", "trimaps", "bboxes", "meta", "metadata"),
        *("segmentations", "segmentationclass", "segmentationobject", "imagesets", "devkit"),
        *("ground_truth", "groundtruth", "gt", "unlabeled", "unlabelled"),
    ]
)

# What else data sets are kept in: pattern of file names -> what is to be said of such a file.
_CONVERT = "which is not read; write tar or parquet files"
_FOREIGN = {
    r".*\.(zip|7z|rar|tar\.gz|tgz|tar\.bz2|tar\.xz)": "is an archive that is not read; unpack it",
    r".*\.(tar|parquet)": "is read if you give the folder that holds it",
    r".*\.(csv|tsv)": "may hold labels: give it as --labels",
    r"metadata\.jsonl": "holds labels, which are not read; write the data set as parquet, by `load_dataset` and "
    "`to_parquet` of Hugging Face's datasets",
    r".*\.arrow": "is a data set that `save_to_disk` wrote, which is not read; write it with `to_parquet`",
    r".*\.tfrecords?(-.*)?": f"is a TFRecord file, {_CONVERT}",
    r"(data|lock)\.mdb|.*\.lmdb": f"is an LMDB database, {_CONVERT}",
    r".*\.(h5|hdf5|npz|npy|mat|rec|beton)": f"is a file of arrays or records, {_CONVERT}",
    r".*-ubyte(\.gz)?|data_batch_\d.*|.*\.(pkl|pickle|pt|pth)": f"is a file of arrays, {_CONVERT}",
    r".*\.(jsonl?|xml)": "may hold labels, which are not read; put the images of each class into a folder of its own",
}


class Parts(NamedTuple):
    """The folders for training and for validation."""

    train: Path
    held_out: Path


def is_visible(name: str) -> bool:
    """Return whether a file or folder is neither hidden nor made by a system."""
    return not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS


def subfolders(folder: Path) -> list[str]:
    """List the names of the visible subfolders, sorted; raise a `DataError` for a link to nothing, which may be one."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_visible(entry.name):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path) and not os.path.splitext(entry.name)[1]:
                target = os.readlink(entry.path)
                raise DataError(f"{entry.path!r} is a link to {target!r}, which does not exist; mend or remove it")
    return sorted(names)


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
    for i, name in enumerate(others):
        if not _is_flat(root / name):
            if i:
                raise DataError(
                    f"the images in {others[0]}/ of {str(root)!r} are of no class; put them into a folder for each "
                    f"class, or move them away to hold out {name}/"
                )
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
    parts = [name for name in names if _PART_WORDS & _words(name)]
    stems = [re.sub("|".join(sorted(_PART_WORDS, key=len, reverse=True)), "", name.lower()) for name in parts]
    if len(parts) > 1 and (2 * len(parts) >= len(names) or len(set(stems)) < len(stems)):
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
    _check_common(folder, names)
    for name in names:
        if name.lower() in _ANNOTATIONS:
            logger.warning(
                "%s is taken for a class; if its images are no photographs but annotations, move it away", folder / name
            )


def _check_common(folder: Path, names: Sequence[str]) -> None:
    """Refuse folders that all have parts or annotations below them; warn if their subfolders may be the classes."""
    inner: list[set[str]] = []
    for name in names:
        inner.append(set(subfolders(folder / name)))
        if len(set.intersection(*inner)) < 2:
            return  # most often at the first, so that few folders are listed
    common = set.intersection(*inner)
    if len(names) < 2:
        return
    shown, lower = _listed(sorted(common)), {name.lower() for name in common}
    annotated = bool(lower & _HOLDERS and lower & _ANNOTATIONS)
    if annotated or lower <= {*TRAIN_NAMES, *HELD_OUT_NAMES}:
        raise DataError(
            f"every class folder of {str(folder)!r} has the subfolders {shown}, whose images do not belong together; "
            "make train/ and val/ with a folder of images for each class"
        )
    if all(these == common for these in inner):
        logger.warning(
            "the classes of %s are %s, and all have the same subfolders, %s; if those are the classes, put the images "
            "of each into one folder",
            folder,
            _listed(names),
            shown,
        )


def _words(name: str) -> set[str]:
    """Return the words of a name in lower case: `TrainData`, `train_data` and `train2017` have `train`."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def check_more_than_one(folder: Path, names: Sequence[str]) -> None:
    """Raise a `DataError` for a folder of a single class, which a classifier cannot learn."""
    if len(names) == 1:
        tables = (
            [name for name in files_in(folder) if name.lower().endswith((".csv", ".tsv"))] if folder.is_dir() else []
        )
        table = f"; if {tables[0]!r} holds the labels, give it as --labels" if tables else ""
        raise DataError(
            f"{str(folder)!r} has one class alone, {names[0]!r}, and a classifier needs two; "
            f"{_remedy(folder / names[0])}{table}"
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
