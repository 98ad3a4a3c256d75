"""A folder of results in parts, with a manifest; each file appears whole or not at all, and a run can be resumed.

`part-00000-of-00013.npz` and so on hold the results of consecutive images. `manifest.json` describes the model, the
data and the runs.
"""

from __future__ import annotations

import bisect
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import is_int
from nfzoo.errors import ConfigError, DataError
from nfzoo.files import read_json

MANIFEST = "manifest.json"
FORMATS = {"top-k": ("jsonl", "parquet"), "embeddings": ("npz", "parquet")}
"""Kind of results -> its formats, the default first."""
MOST_IMAGES = 4096  # of a part, where no other number is given

_VERSION = 1
_DTYPES = {"classes": np.dtype(np.int64), "probabilities": np.dtype(np.float32)}  # of columns of labels
_OURS = re.compile(r"\.?part-\d{5,}-of-\d{5,}\..*|\.manifest\..*\.json")  # also hidden files that a killed run left


@dataclass(frozen=True)
class Parts:
    """The files of a folder of results.

    Attributes:
        images: number of all images.
        size: number of images in a part; the last part may have fewer.
        format: suffix of the files, one of `FORMATS`.
        removed: images that were there when the run began, and that the user has removed since as they were broken;
            rising. They count among `images`, so that other parts keep theirs.
    """

    folder: Path
    images: int
    size: int
    format: str
    removed: tuple[int, ...] = ()

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def rows(self, k: int) -> range:
        """Return the indices of the images in part k, among those that are there now."""
        ends = (k * self.size, min((k + 1) * self.size, self.images))
        first, end = (row - bisect.bisect_left(self.removed, row) for row in ends)
        return range(first, end)

    def path(self, k: int) -> Path:
        """Return the file of part k."""
        return self.folder / f"part-{k:05}-of-{len(self):05}.{self.format}"

    def broken_path(self, k: int) -> Path:
        """Return the file that lists unreadable images of part k until `finish` moves them to the manifest."""
        return self.path(k).with_suffix(".broken.json")

    def unfinished(self) -> list[int]:
        """Return the parts that are not yet written."""
        return [k for k in range(len(self)) if not self.path(k).exists()]


def start(
    parts: Parts,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> list[int]:
    """Begin a run, or resume the one in the folder; write the manifest, and return the parts that are not yet written.

    Args:
        identity: facts that determine the results; a resumed run must have the same.
        facts: further fields of the manifest.
        run: facts that may differ between runs, such as versions; the manifest lists those of each run.
        overwrite: remove the parts of an earlier run.

    Raises:
        ConfigError: if the folder holds the results of another run; nothing changes then.
    """
    folder = parts.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; give a folder for the results")
    existing = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)] if folder.is_dir() else []
    manifest = _read(folder / MANIFEST)
    remedy = "give another folder, or --overwrite to replace them"
    if manifest is not None and not isinstance(manifest.get("identity"), dict):
        raise ConfigError(f"{str(folder / MANIFEST)!r} is no manifest of predictions; give another folder")
    if not overwrite:
        if manifest is None and any(not path.name.startswith(".") for path in existing):
            raise ConfigError(f"{str(folder)!r} holds parts without a {MANIFEST}; {remedy}")
        if manifest is not None:
            if list(parts.removed) != manifest.get("removed", []):
                manifest |= {"removed": list(parts.removed)}
                manifest["identity"] = {**manifest["identity"], "data": identity.get("data")}
            different = _differences(manifest["identity"], identity)
            if different:
                raise ConfigError(f"{str(folder)!r} holds the results of another run: {different}; {remedy}")
    for path in existing:  # parts go before the manifest that describes them
        if overwrite or path.name.startswith("."):
            path.unlink()
    todo = parts.unfinished()
    if overwrite or manifest is None:
        manifest = {"format": _VERSION, **facts, "identity": dict(identity), "parts": len(parts), "runs": []}
    if todo:
        missing = set(todo)
        manifest |= {
            "complete": False,
            "broken": [entry for entry in manifest.get("broken", []) if entry["part"] not in missing],
            "runs": [*manifest["runs"], {**run, "parts": len(todo)}],
        }
        _write(folder / MANIFEST, manifest)
    return todo


def stop(parts: Parts, k: int, row: int, fingerprint: Callable[[list[int]], str]) -> None:
    """Note that part k cannot be written because of the image `row`, so that a run goes on when the user removes it.

    Args:
        fingerprint: identifies the images of some indices.
    """
    present = parts.images - len(parts.removed)
    index = row
    for gone in parts.removed:
        index += gone <= index
    kept = fingerprint([i for i in range(present) if i != row])
    _write(_stopped_path(parts.path(k)), {"image": index, "data": kept})


def removed_since(folder: Path, images: int, data: str) -> tuple[int, ...]:
    """Return the images that a run in the folder had and that are not there any more: see `Parts.removed`.

    Args:
        images: number of images that are there.
        data: their fingerprint, which tells that no other is missing than the one that stopped the run.
    """
    manifest = _read(folder / MANIFEST) or {}
    identity, removed = manifest.get("identity"), manifest.get("removed", [])
    if not isinstance(identity, dict) or not isinstance(removed, list) or not all(is_int(i, 0) for i in removed):
        return ()
    if identity.get("images") == images + len(removed) + 1:
        for path in folder.glob(".part-*.stopped.json"):
            note = _read(path) or {}
            if note.get("data") == data and is_int(note.get("image"), 0):
                return tuple(sorted({*removed, note["image"]}))
    return tuple(removed)


def _stopped_path(part: Path) -> Path:
    return part.with_name(f".{part.name}.stopped.json")  # hidden, so that the next start removes it


def earlier_size(folder: Path) -> int | None:
    """Return the number of images in a part of the run whose results are in the folder, if there is one."""
    identity = (_read(folder / MANIFEST) or {}).get("identity")
    size = identity.get("shard_size") if isinstance(identity, dict) else None
    return size if is_int(size, 1) else None


def share_size(images: int, processes: int, batch_size: int) -> int:
    """Return the number of images in a file, in whole batches: four files for each process, of at most 4096 images."""
    share = -(-images // (4 * processes))
    return min(MOST_IMAGES, -(-share // batch_size) * batch_size)


def finish(parts: Parts) -> list[dict[str, Any]]:
    """Mark the manifest as complete, and return its list of unreadable images with their errors.

    Raises:
        DataError: if no image could be read.
    """
    path = parts.folder / MANIFEST
    manifest = _read(path) or {}
    broken: list[dict[str, Any]] = manifest["broken"]
    notes = [note for note in map(parts.broken_path, range(len(parts))) if note.exists()]
    if not manifest["complete"]:
        for note in notes:
            broken += read_json(note)
        broken.sort(key=lambda entry: entry["part"])
        if len(broken) == parts.images:
            raise DataError(f"none of the {parts.images:,} images can be read, such as: {broken[0]['problem']}")
        _write(path, {**manifest, "complete": True})
    for note in notes:
        note.unlink()
    return broken


def write_part(
    parts: Parts, k: int, names: Sequence[str], columns: Mapping[str, Any], broken: Mapping[str, str]
) -> None:
    """Write part k, with one row for each of `names`, and the list of its unreadable images.

    Args:
        columns: arrays with one row for each name, or lists of such rows, which may differ in length; `labels` has a
            list of texts for each name.
        broken: names of unreadable images, which are not among `names` -> error.
    """
    note = parts.broken_path(k)
    if broken:
        _write(note, [{"part": k, "image": name, "problem": problem} for name, problem in broken.items()])
    else:
        note.unlink(missing_ok=True)  # left by a run that was killed between note and part
    with replaced(parts.path(k)) as scratch:
        {"jsonl": _write_jsonl, "npz": _write_npz, "parquet": _write_parquet}[parts.format](scratch, names, columns)


def check_format(kind: str, format: str) -> None:
    """Raise a `ConfigError` if results of this kind do not have the format, or its package is not installed."""
    if format not in FORMATS[kind]:
        raise ConfigError(f"{kind} are written as {' or '.join(FORMATS[kind])}, not {format}")
    if format == "parquet":
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise ConfigError("parquet is written by the `data` extra: pip install 'nfzoo[data]'") from error


def _write_jsonl(path: Path, names: Sequence[str], columns: Mapping[str, Any]) -> None:
    with path.open("w", encoding="ascii", newline="\n") as file:
        for name, classes, labels, probabilities in zip(
            names,
            (row.tolist() for row in columns["classes"]),
            columns["labels"],
            (row.tolist() for row in columns["probabilities"]),
            strict=True,
        ):
            top = [
                {"class": number, "label": label, "probability": value}
                for number, label, value in zip(classes, labels, probabilities, strict=True)
            ]
            file.write(json.dumps({"image": name, "predictions": top}) + "\n")


def _write_npz(path: Path, names: Sequence[str], columns: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, image=np.array(names, dtype=np.str_), **columns)


def _write_parquet(path: Path, names: Sequence[str], columns: Mapping[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = {"image": pyarrow.array([_text(name) for name in names], pyarrow.string())}
    for key, value in columns.items():
        if key == "embeddings":  # (n, F), as n lists of one length in contiguous memory
            table[key] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(value.reshape(-1)), value.shape[1])
        else:
            rows = [list(map(_text, row)) for row in value] if key == "labels" else list(value)
            kind = pyarrow.string() if key == "labels" else pyarrow.from_numpy_dtype(_DTYPES[key])
            table[key] = pyarrow.array(rows, pyarrow.list_(kind))
    parquet.write_table(pyarrow.table(table), path)


def _text(name: str) -> str:
    """Escape bytes of a file name that are not UTF-8, which parquet cannot hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def _differences(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    keys = [key for key in {**present, **earlier} if earlier.get(key) != present.get(key)]
    return ", ".join(f"{key} {_short(earlier.get(key))} and not {_short(present.get(key))}" for key in keys)


def _short(value: Any) -> str:
    if value is None:
        return "unset"
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: object) -> None:
    with replaced(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")
