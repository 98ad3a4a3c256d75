"""What pages and notebooks print, and whether it is what they show."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_BLOCK = re.compile(r"^```python\n(.*?)^```\n\n^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown_blocks(page: Path) -> list[tuple[str, str]]:
    """Each `python` block of a page that a `console` block follows, and the text of that."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def printed_by(code: str, title: str) -> str:
    """What a program prints that runs in a namespace of its own."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, title, "exec", dont_inherit=True), {"__name__": "__main__"})
    return out.getvalue()


def assert_alike(printed: str, shown: str, *, any_numbers: bool = False) -> None:
    """Assert that two texts differ in their numbers alone, and in these by one unit of the last place at most.

    Args:
        any_numbers: whether the numbers may differ by more, since they depend on the machine.
    """
    texts = [re.sub(r"[ \t]+", " ", _NUMBER.sub("#", text)).strip() for text in (printed, shown)]
    assert texts[0] == texts[1], f"printed:\n{printed}\nshown:\n{shown}"
    if not any_numbers:
        for a, b in zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=True):
            x, y = (float(value.replace(",", "")) for value in (a, b))
            assert math.isclose(x, y, rel_tol=0.0, abs_tol=1.01 * _last_place(b)), f"{a} is not {b}, in:\n{printed}"


def _last_place(number: str) -> float:
    """The unit of a number's last digit; of an integer less than 1, as it counts something."""
    mantissa, _, exponent = number.partition("e")
    places = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - places) if places or exponent else 0.0
