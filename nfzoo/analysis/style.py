"""Hold the colours of all pictures, and check the names that pictures are written under."""

from __future__ import annotations

from pathlib import Path

from nfzoo.errors import DataError

INK, QUIET, RULE, PAPER, PAGE = "#1c2530", "#66717f", "#dfe3e8", "#ffffff", "#f4f5f7"
BLUE, LIGHT_BLUE, ORANGE = "#2563c9", "#a8c2ec", "#d9730d"  # told apart by the colour-blind, too


def check_png(output: Path) -> None:
    """Raise a `DataError` unless a picture can be called so."""
    if output.suffix.lower() != ".png":
        raise DataError(f"the picture {str(output)!r} must end in .png")
