"""A table of sets of labels for the few digits of `tests.support.pictures`."""

from pathlib import Path
from typing import Any

from sklearn import metrics

from tests.support.pictures import few_digits

SK: Any = metrics
"""scikit-learn's measures, without the types of its stubs, which refuse arguments that it documents."""

SETS = {
    digit: tuple(
        n for n, there in (("big", digit > 4), ("even", digit % 2 == 0), ("round", digit in (0, 6, 8, 9))) if there
    )
    for digit in range(10)
}
CLASSES = ("big", "even", "round")


def write_sets(path: Path, separator: str = "|") -> Path:
    """Write a table of three labels, of which 1 and 3 have none."""
    root = Path(few_digits())
    rows = [f"{p.relative_to(root)},{separator.join(SETS[int(p.parent.name)])}\n" for p in sorted(root.glob("*/*.png"))]
    path.write_text(f"path,label\n{''.join(rows)}")
    return path
