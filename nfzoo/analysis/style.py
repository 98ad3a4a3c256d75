"""Colours of all pictures, and the check of their file names."""

from __future__ import annotations

from pathlib import Path

from nfzoo.errors import DataError

INK, QUIET, RULE, PAPER, PAGE = "#1c2530", "#66717f", "#dfe3e8", "#ffffff", "#f4f5f7"
BLUE, LIGHT_BLUE, ORANGE = "#2563c9", "#a8c2ec", "#d9730d"  # distinct for the colour-blind, too


def check_png(output: Path) -> None:
    """Raise a `DataError` unless the file name ends in `.png`."""
    if output.suffix.lower() != ".png":
        raise DataError(f"the picture {str(output)!r} must end in .png")
