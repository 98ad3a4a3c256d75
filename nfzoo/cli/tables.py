"""Print tables, numbers and JSON."""

from __future__ import annotations

from collections.abc import Sequence

from nfzoo.runtime.output import json_text, table


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    print(json_text(value), end="")


def print_table(rows: Sequence[Sequence[str]], alignment: str) -> None:
    """Print rows of cells as `table` does."""
    print(table(rows, alignment))


def millions(count: int) -> str:
    """Return `71.5 M` for 71 489 284."""
    return f"{count / 1e6:.1f} M"


def giga(count: int) -> str:
    """Return `12.38 G`, or below a tenth of that unit `12.38 M`."""
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"
