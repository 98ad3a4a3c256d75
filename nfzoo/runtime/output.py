"""Show text from files, servers and other processes on a terminal, so that none of it can drive the terminal.

A program runs within `guarded`, which makes visible what it prints by any way: results, progress bars, warnings, errors
and tracebacks. Newlines and tabs pass, since the program writes them itself. Text from elsewhere could add lines of its
own by them, so a program prints such text as `escaped`. The log does this to each of its messages.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from nfzoo.errors import without_credentials

# How progress bars move: back to the start of a line before they write it anew, and up by whole lines.
_MOVES = re.compile(r"\r|(?:\x1b\[A)+\Z")

_BAR_SWITCHES = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Variables by which libraries draw no bars, also where there is no terminal."""


_MARKDOWN = frozenset(r"\`*_{}[]<>()#+-.!|~&$:@^=")


def escaped(text: str) -> str:
    r"""Return a text in which the characters that `repr` escapes are escaped in the same way.

    They are control characters, also those above 127; marks of writing direction and other invisible characters; line
    separators; and lone surrogates, which stand for bytes of a file name that are no text. A backslash stays as it is,
    so that paths do.

    >>> print(escaped("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown_text(text: str) -> str:
    """Escape text that would be Markdown, HTML, a formula or a link in a table, and characters that cannot be seen."""
    return "".join(f"\\{c}" if c in _MARKDOWN else c for c in escaped(text))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; the cells are Markdown already, see `markdown_text`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def json_text(value: Any) -> str:
    """Return a value as lines of JSON whose characters can all be seen; reading them gives the value back."""
    lines = json.dumps(value, indent=2, ensure_ascii=False).split("\n")
    return "".join((line if line.isprintable() else "".join(map(_in_json, line))) + "\n" for line in lines)


def _in_json(character: str) -> str:
    if character.isprintable():
        return character
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Make visible what this process, and those that it forks, print in the block.

    The guard outlasts an error that leaves the block, for the error's traceback.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_guard, before)
    try:
        yield
    except Exception:
        os.environ.setdefault("NO_COLOR", "1")  # newer Pythons would colour the traceback, by characters of control
        before = sys.stdout, sys.stderr
        raise
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Let nothing draw a progress bar in the block: standard error is no terminal there, and libraries are told so.

    A library that was imported before may not look at its variable any more.
    """
    before, told = sys.stderr, {name: os.environ.get(name) for name in _BAR_SWITCHES}
    sys.stderr = None if before is None else _NoTerminal(before)  # type: ignore[assignment]
    os.environ |= dict.fromkeys(_BAR_SWITCHES, "1")
    try:
        yield
    finally:
        sys.stderr = before
        for name, value in told.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _NoTerminal:
    """A stream that is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _guard(stream: Any) -> Any:
    return stream if stream is None or isinstance(stream, _Guard) else _Guard(stream)


class _Guard:
    """Write to a stream without credentials, and with escapes for all but newlines, tabs and what its encoding has."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        move = match[0] if (match := _MOVES.match(text)) else ""
        shown = re.sub(r"[^\n\t]+", lambda part: escaped(part[0]), without_credentials(text[len(move) :]))
        self._stream.write(move + shown.encode(self._encoding, "backslashreplace").decode(self._encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def escape_log() -> None:
    """Escape the messages of nfzoo's log in this process, for whatever handlers the log has."""
    log = logging.getLogger("nfzoo")
    if _escape_record not in log.filters:
        log.addFilter(_escape_record)


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = escaped(without_credentials(record.getMessage())), ()
    return True


def csv_cell(text: str) -> str:
    """Return a text as it may stand in a cell of a CSV file: escaped, and no formula of a spreadsheet.

    A `'` precedes what such a program would compute.

    >>> print(csv_cell("=1+1"), csv_cell("cat"))
    '=1+1 cat
    """
    text = escaped(text)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text


def table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Return rows of cells as lines of text, with one of `<` and `>` for each column."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(alignment))]
    lines = ("  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, alignment, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def millions(count: int) -> str:
    """Return `71.5 M` for 71 489 284."""
    return f"{count / 1e6:.1f} M"


def giga(count: int) -> str:
    """Return `12.38 G`, or below a tenth of that unit `12.38 M`."""
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"
