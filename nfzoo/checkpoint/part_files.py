"""A folder of results in parts: each file whole or absent, a manifest that says what they are, and going on later.

`part-00000-of-00013.npz` and so on hold the results of consecutive images, `manifest.json` of what, made by what.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nfzoo.checkpoint.atomic import replaced
from nfzoo.errors import ConfigError, DataError

MANIFEST = "manifest.json"
FORMATS = {"top-k": ("jsonl", "parquet"), "embeddings": ("npz", "parquet")}
"""Kind of results -> the formats it can have, of which the first is the usual one."""

_VERSION = 1
_OURS = re.compile(r"\.?part-\d{5,}-of-\d{5,}\..*|\.manifest\..*\.json")  # with what a killed run left of either


@dataclass(frozen=True)
class Parts:
    """Where results belong.

    Attributes:
        images: number of images in all.
        size: images of each part but the last, which may have fewer.
        format: ending of the files, one of `FORMATS`.
    """

    folder: Path
    images: int
    size: int
    format: str

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def rows(self, k: int) -> range:
        """Return the images of part k."""
        return range(k * self.size, min((k + 1) * self.size, self.images))

    def path(self, k: int) -> Path:
        """Return the file of part k."""
        return self.folder / f"part-{k:05}-of-{len(self):05}.{self.format}"

    def broken_path(self, k: int) -> Path:
        """Return the file that says what was wrong with images of part k, if anything was, until `finish`."""
        return self.path(k).with_suffix(".broken.json")

    def unfinished(self) -> list[int]:
        """Return the parts that are still to be written."""
        return [k for k in range(len(self)) if not self.path(k).exists()]


def start(
    parts: Parts,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> list[int]:
    """Write the manifest, or take up the run that it tells of; the parts that are still to be written.

    Args:
        identity: what makes two runs the same, and has to agree with what the folder holds.
        facts: what the manifest says besides.
        run: what may differ from run to run, such as versions; noted for each that wrote parts.
        overwrite: remove the parts of an earlier run, whatever it was.

    Raises:
        ConfigError: if the folder holds the results of another run; nothing is changed then.
    """
    folder = parts.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; give a folder for the results")
    results = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)] if folder.is_dir() else []
    manifest = _read(folder / MANIFEST)
    remedy = "give another folder, or --overwrite to replace them"
    if manifest is not None and not isinstance(manifest.get("identity"), dict):
        raise ConfigError(f"{str(folder / MANIFEST)!r} is no manifest of predictions; give another folder")
    if not overwrite:
        if manifest is None and any(not path.name.startswith(".") for path in results):
            raise ConfigError(f"{str(folder)!r} holds parts without a {MANIFEST} that says of what; {remedy}")
        if manifest is not None:
            different = _differences(manifest["identity"], identity)
            if different:
                raise ConfigError(f"{str(folder)!r} holds the results of another run: {different}; {remedy}")
    for path in results:  # parts before the manifest that describes them
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


def finish(parts: Parts) -> list[dict[str, Any]]:
    """Note in the manifest that all parts are written; return which images could not be read, and why.

    Raises:
        DataError: if none could be read.
    """
    path = parts.folder / MANIFEST
    manifest = _read(path) or {}
    broken: list[dict[str, Any]] = manifest["broken"]
    notes = [note for note in map(parts.broken_path, range(len(parts))) if note.exists()]
    if not manifest["complete"]:
        for note in notes:
            broken += json.loads(note.read_text(encoding="utf-8"))
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
    """Write part k: one row for each of `names`, and a note of what is `broken`.

    Args:
        columns: arrays of one row for each name; of `labels` a list of texts for each.
        broken: names of images that are not among `names` -> what is wrong with them.
    """
    note = parts.broken_path(k)
    if broken:
        _write(note, [{"part": k, "image": name, "problem": problem} for name, problem in broken.items()])
    else:
        note.unlink(missing_ok=True)  # of a run that was killed between note and part
    with replaced(parts.path(k)) as scratch:
        {"jsonl": _write_jsonl, "npz": _write_npz, "parquet": _write_parquet}[parts.format](scratch, names, columns)


def check_format(kind: str, format: str) -> None:
    """Raise a `ConfigError` for a format that results of this kind do not have, or that needs what is not installed."""
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
            columns["classes"].tolist(),
            columns["labels"],
            columns["probabilities"].tolist(),
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
        if key == "embeddings":  # (n, F): n lists of one length in one piece of memory
            table[key] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(value.reshape(-1)), value.shape[1])
        else:
            rows = [list(map(_text, row)) for row in value] if key == "labels" else list(value)
            kind = pyarrow.string() if key == "labels" else pyarrow.from_numpy_dtype(value.dtype)
            table[key] = pyarrow.array(rows, pyarrow.list_(kind))
    parquet.write_table(pyarrow.table(table), path)


def _text(name: str) -> str:
    """Return a file name, escaped where its bytes are not UTF-8, which parquet cannot hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {_short(found.get(key))} and not {_short(wanted.get(key))}" for key in keys)


def _short(value: Any) -> str:
    if value is None:
        return "unset"
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: object) -> None:
    with replaced(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")
