"""Open files that may come from strangers: regular ones alone, JSON and other text of a sensible size, and CSV."""

from __future__ import annotations

import codecs
import csv
import difflib
import itertools
import json
import os
import stat
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

MOST_TEXT = 32 << 20  # bytes; a configuration with names for a million classes takes 20 MB
_MOST_NAMES = 10_000  # of a folder, that a misspelt name is compared with, which takes 0.1 s
_LONGEST_LINE = 1 << 20  # bytes of a first line that tell what separates its cells


class UnreadableFileError(OSError):
    """A file that is there, and is not read: no regular file, or too long."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; a pipe would keep its reader waiting, and a device may never end.

    Raises:
        UnreadableFileError: for a pipe, a socket or a device.
        OSError: as `open`.
    """
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # for a folder `open` has its own error
        return descriptor
    os.close(descriptor)
    raise UnreadableFileError("it is no regular file but a pipe, a socket or a device")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise as `open_regular`, before a library opens the file by its name."""
    open_regular(path).close()


def read_text(path: str | os.PathLike[str], most: int = MOST_TEXT) -> str:
    """Return the text of a regular file in UTF-8.

    Raises:
        UnreadableFileError: also for a file of more than `most` bytes.
        OSError: as `open`.
        ValueError: for what is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnreadableFileError(f"it is longer than {most:,} bytes")
    return content.decode("utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file; raise as `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: for what is no JSON, is nested too deeply, or has a key twice, of which readers take either.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"it has {key[:200]!r} twice")
        fields[key] = value
    return fields


def csv_rows(file: BufferedReader, *, tabs: bool = False) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the cells of a CSV file's first line, and an iterator over the other lines with their numbers.

    Cells are separated by what the first line has most often of commas, semicolons and tabs. Empty lines are left out.

    Args:
        tabs: whether tabs separate the cells, whatever the first line has.

    Raises:
        csv.Error: now or later, for lines of another number of cells than the first, and for quotes that do not fit.
        ValueError: for what is not UTF-8.
    """
    first = file.readline(_LONGEST_LINE).decode("utf-8", "replace")
    file.seek(0)
    lines = codecs.iterdecode(file, "utf-8-sig")
    reader = csv.reader(lines, delimiter="\t" if tabs else max(",;\t", key=first.count), strict=True)
    header = next(reader, [])

    def rows() -> Iterator[tuple[int, list[str]]]:
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise csv.Error(f"line {reader.line_num} has {len(cells)} cells, and the first has {len(header)}")
            yield reader.line_num, cells

    return header, rows()


def nearest_path(name: str | os.PathLike[str]) -> str:
    """Return `; did you mean 'runs/digits'?` for a path that does not exist, or "" if there is none of like parts."""
    found = [Path()]
    for part in Path(os.path.expanduser(name)).parts:
        found = [path for folder in found for path in _like(folder, part)][:3]
    return f"; did you mean {' or '.join(repr(str(path)) for path in found)}?" if found and found != [Path()] else ""


def _like(folder: Path, part: str) -> list[Path]:
    """List what is in a folder under a name, or else under names that are similar."""
    if os.path.lexists(folder / part):
        return [folder / part]
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in itertools.islice(entries, _MOST_NAMES) if e.name[0] != "." or part[0] == "."]
    except (OSError, ValueError):
        return []
    return [folder / near for near in difflib.get_close_matches(part, sorted(names), n=3)]
