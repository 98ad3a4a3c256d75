"""How the names of data are written: patterns of file names, and options behind a `?`."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qsl

from nfzoo.errors import DataError

_OPTIONS = ("image", "label", "train", "validation", "revision")
_PATTERN = re.compile(r"[*?\[]|\{[^{}]*\}")


def is_pattern(path: str) -> bool:
    """Whether a name has `*`, `?`, `[…]` or braces."""
    return _PATTERN.search(path) is not None


def split_options(source: str) -> tuple[str, dict[str, str]]:
    """What stands before `?image=…&label=…`, and the options; a `?` of a file pattern is none."""
    path, mark, query = source.rpartition("?")
    if not mark or not re.fullmatch(r"\w+=[^&=]*(&\w+=[^&=]*)*", query):
        return source, {}
    options = dict(parse_qsl(query, keep_blank_values=True))
    only(options, _OPTIONS, source)
    if not all(options.values()):
        raise DataError(f"{source!r} leaves an option empty")
    return path, options


def only(options: dict[str, str], known: tuple[str, ...], source: str) -> None:
    """Raise a `DataError` for an option of `source` that is not known."""
    for name in options:
        if name not in known:
            may = f"there {', '.join(known)} can stand" if known else "it takes none"
            raise DataError(f"{source!r} does not take the option {name!r}; {may}")


def expand(pattern: str, endings: tuple[str, ...]) -> list[Path]:
    """The files of a pattern with `*`, `?`, `[…]`, `{a,b}` and `{000..146}` that have one of the endings.

    Raises:
        DataError: if there are none, or a name that the braces alone make is missing.
    """
    missing: list[str] = []
    found: list[Path] = []
    for name in _braces(pattern):
        if glob.has_magic(name):
            found += [Path(path) for path in sorted(glob.glob(name))]
        elif os.path.exists(name):
            found.append(Path(name))
        else:
            missing.append(name)
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]!r} of {pattern!r} is missing{more}")
    found = [path for path in found if path.name.lower().endswith(endings)]
    if not found:
        raise DataError(f"{pattern!r} matches no files that end in one of {', '.join(endings)}")
    twice = next((path for path, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{pattern!r} names {str(twice)!r} twice")
    return found


def _braces(pattern: str) -> list[str]:
    """A pattern with the first pair of braces expanded, and so on; numbers keep their leading zeros."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds is None:
        inner = match[1].split(",")
    else:
        low, high = int(bounds[1]), int(bounds[2])
        if not 0 <= high - low < 1_000_000:
            raise DataError(f"{match[0]!r} in {pattern!r} does not count upwards; write {{000..146}}")
        inner = [f"{n:0{len(bounds[1])}}" for n in range(low, high + 1)]
    texts = [text for part in inner for text in _braces(pattern[: match.start()] + part + pattern[match.end() :])]
    return list(dict.fromkeys(texts))  # pairs inside of pairs give some more than once
