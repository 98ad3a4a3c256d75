"""Say what is in a data set and what is wrong with it: as text, as JSON, and as a sheet of pictures for each class."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nfzoo.analysis.sheets import SheetEntry, prediction_sheet
from nfzoo.check.scan import Facts, pictures, scan
from nfzoo.data.images import ImageFolder, Images
from nfzoo.data.label_files import LabelFiles
from nfzoo.data.labels import FEW_IMAGES, class_counts, few_images, listed_counts
from nfzoo.data.source import open_parts
from nfzoo.data.tar.shards import TarShards
from nfzoo.errors import ConfigError
from nfzoo.runtime.output import escaped

MOST_LISTED = 10_000
"""The most names of a finding that the JSON lists; its number counts all."""

PICTURES = 24
"""The most images on the sheet of a class."""

_SHOWN, _SHOWN_CLASSES = 10, 30  # in the text


@dataclass(frozen=True, eq=False)
class Report:
    """Hold what a check of data found.

    Attributes:
        source: the data's name.
        facts: what the images are.
        warnings: what the log said as the data were opened, such as of files that are left out.
        counts: part -> class -> number of images.
    """

    source: str
    facts: Facts
    warnings: Sequence[str]
    counts: Mapping[str, Mapping[str, int]]

    @property
    def layout(self) -> str:
        """The kind of the data, in words."""
        return _layout(next(iter(self.facts.parts.values())), list(self.facts.parts))

    @property
    def unreadable(self) -> int:
        """Number of images that cannot be read."""
        return int((~self.facts.readable).sum())

    @property
    def few(self) -> dict[str, int]:
        """Classes with fewer than `FEW_IMAGES` images to train on, and their numbers."""
        counts = next(iter(self.counts.values()))
        return {name: count for name, count in counts.items() if 0 < count < FEW_IMAGES}

    @property
    def in_one_part(self) -> dict[str, list[str]]:
        """Part -> classes that it has, and another part has not."""
        present = {part: {name for name, count in counts.items() if count} for part, counts in self.counts.items()}
        everywhere = set.intersection(*present.values())
        return {part: sorted(names - everywhere) for part, names in present.items() if names - everywhere}

    @cached_property
    def across(self) -> np.ndarray:
        """Return for each group of copies whether it lies in several parts, bool `(groups,)`."""
        parts = [len({self.facts.where(i)[0] for i in group.tolist()}) for group in self.facts.copies]
        return np.array(parts, int) > 1

    @cached_property
    def contradicting(self) -> np.ndarray:
        """Return for each group of copies whether it lies in several classes, bool `(groups,)`."""
        classes = [len({self.facts.class_of(i) for i in group.tolist()}) for group in self.facts.copies]
        return np.array(classes, int) > 1

    def findings(self) -> list[str]:
        """Return a sentence for each kind of fault; none for clean data."""
        found = list(self.warnings)
        if self.unreadable:
            remedy = f"mend or remove {'it' if self.unreadable == 1 else 'them'}, or train with --max-broken"
            found.append(f"{_number(self.unreadable, 'image')} cannot be read; {remedy} {self.unreadable}")
        copies = self.facts.copies
        if copies:
            surplus = sum(len(group) - 1 for group in copies)
            repeat = "repeats the bytes of another" if surplus == 1 else "repeat the bytes of others"
            found.append(f"{_number(surplus, 'image')} {repeat}, in {_number(len(copies), 'group')}")
        if across := int(self.across.sum()):
            parts = " and ".join(self.facts.parts)
            found.append(f"{parts} share {_number(across, 'group')} of copies, so that an accuracy on them is too good")
        multi_label = any(images.multi_label for images in self.facts.parts.values())
        several = "more than one set of labels has" if multi_label else "more than one class has"
        if contradicting := int(self.contradicting.sum()):
            found.append(f"{several} copies of the same image, in {_number(contradicting, 'group')}")
        present = {name for counts in self.counts.values() for name, count in counts.items() if count}
        if len(present) == 1 and not multi_label:
            found.append(f"there is one class alone, {present.pop()}; nothing is to be told apart")
        if self.few:
            found.append(few_images(self.few))
        for part, names in self.in_one_part.items():
            found.append(f"{_number(len(names), 'class', 'classes')} in {part} alone: {_some(names)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields. They name at most `MOST_LISTED` images of each finding; numbers count all."""
        facts = self.facts
        ends = np.cumsum([len(group) for group in facts.copies])
        groups = [facts.copies[k] for k in np.flatnonzero(ends <= MOST_LISTED)] or facts.copies[:1]
        return {
            "source": self.source,
            "layout": self.layout,
            "images": len(facts.readable),
            "classes": {part: dict(counts) for part, counts in self.counts.items()},
            "pixels": {name: list(values) for name, values in _sides(facts).items()},
            "modes": facts.modes,
            "odd": facts.odd,
            "unreadable": {
                "images": self.unreadable,
                "listed": [{"image": facts.name(i), "problem": text} for i, text in facts.problems.items()],
            },
            "copies": {
                "groups": len(facts.copies),
                "images": sum(map(len, facts.copies)),
                "across_parts": int(self.across.sum()),
                "across_classes": int(self.contradicting.sum()),
                "listed": [[self._in_part(int(i)) for i in group[:MOST_LISTED]] for group in groups],
            },
            "few_images": self.few,
            "in_one_part": self.in_one_part,
            "findings": self.findings(),
        }

    def _in_part(self, index: int) -> dict[str, str]:
        return {
            "image": self.facts.name(index),
            "part": self.facts.where(index)[0],
            "class": self.facts.class_of(index),
        }

    def text(self) -> str:
        """Return the report as lines for a terminal."""
        facts = self.facts
        lines = [f"data:     {self.source}", f"layout:   {self.layout}"]
        for part, counts in self.counts.items():
            images = facts.parts[part]
            bare = int((~images.labels.any(1)).sum()) if images.multi_label else 0
            without = f", {bare:,} without a label" if bare else ""
            lines.append(f"{part + ':':<9} {_number(len(images), 'image')}, {_balance(counts)}{without}")
            shown = counts if len(counts) <= _SHOWN_CLASSES else {}
            width = max(map(len, shown), default=0)
            top = max(shown.values(), default=1)
            lines += [
                f"  {n:<{min(width, 40)}}  {c:>9,}  {'#' * round(40 * c / top)}".rstrip() for n, c in shown.items()
            ]
        for name, (low, middle, high) in _sides(facts).items():
            lines.append(f"{name + ':':<9} {low:,} to {high:,} pixels, median {middle:,g}")
        lines.append(f"modes:    {listed_counts(facts.modes) or 'none'}")
        lines.append(f"odd:      {listed_counts(facts.odd) or 'none'}")
        problems = list(facts.problems.values())
        lines += [f"unreadable: {text}" for text in problems[:_SHOWN]]
        if self.unreadable > _SHOWN:
            lines.append(f"unreadable: {self.unreadable - _SHOWN:,} more")
        # Copies across parts and classes do most harm.
        order = np.lexsort((~self.contradicting, ~self.across))
        for group in (facts.copies[k] for k in order[:_SHOWN]):
            names = [f"{facts.name(int(i))} ({facts.where(int(i))[0]})" for i in group[:_SHOWN]]
            more = f" and {len(group) - _SHOWN:,} more" if len(group) > _SHOWN else ""
            lines.append(f"copies:   {' = '.join(names)}{more}")
        if len(order) > _SHOWN:
            lines.append(f"copies:   {_number(len(order) - _SHOWN, 'more group')}")
        found = self.findings()
        lines += [f"finding:  {text}" for text in found] or ["nothing was found that harms a training"]
        return "\n".join(map(escaped, lines))


def check(source: str, *, workers: int = 0, labels: LabelFiles | None = None) -> Report:
    """Read all images of a source, and return what they are and what is wrong with them.

    Args:
        source: see `nfzoo.data.source.open_split`.
        workers: processes that read.
        labels: the files that say what the images of a folder are.

    Raises:
        DataError: for data that cannot be opened; an image that cannot be read is a finding.
    """
    with _log_kept() as warnings:
        parts = open_parts(source, labels=labels)
    counts = {part: class_counts(images) for part, images in parts.items()}
    return Report(source, scan(parts, workers=workers), warnings, counts)


def write_sheets(report: Report, folder: Path, *, workers: int = 0) -> int:
    """Write a PNG for each class with up to `PICTURES` of its images, evenly spaced, and return their number.

    A file is named by the number and the name of the class, such as `003-cat.png`.

    Raises:
        ConfigError: if the folder lies among the data.
    """
    root = Path(report.source)
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"the sheets would lie in {str(folder)!r}, among the data; give a folder elsewhere")
    members: dict[str, list[np.ndarray]] = {name: [] for counts in report.counts.values() for name in counts}
    first = 0
    for images in report.facts.parts.values():
        for label, name in enumerate(images.classes):
            own = images.labels[:, label] if images.multi_label else images.labels == label
            members[name].append(first + np.flatnonzero(own))
        first += len(images)
    chosen = {name: _spread(np.concatenate(rows), report.facts.readable) for name, rows in members.items()}
    shown = pictures(report.facts, [int(i) for rows in chosen.values() for i in rows], workers=workers)
    written = 0
    entry = next(shown, None)
    for number, (name, rows) in enumerate(chosen.items()):
        entries: list[SheetEntry] = []
        last = -1
        while entry is not None and entry[0] in rows and entry[0] > last:  # an image may have several labels
            index, picture = entry
            last = index
            title = f"{report.facts.where(index)[0]}: {Path(report.facts.name(index)).name}"
            entries.append(SheetEntry(picture, title, []))
            entry = next(shown, None)
        if entries:
            plain = re.sub(r"[^\w-]+", "_", name)[:60]
            total = sum(counts.get(name, 0) for counts in report.counts.values())
            prediction_sheet(entries, folder / f"{number:03}-{plain}.png", title=f"{name}: {_number(total, 'image')}")
            written += 1
    return written


def _spread(rows: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """Return up to `PICTURES` of the readable rows, evenly spaced."""
    rows = rows[readable[rows]]
    return rows if len(rows) <= PICTURES else rows[np.linspace(0, len(rows) - 1, PICTURES).astype(int)]


@contextmanager
def _log_kept() -> Iterator[list[str]]:
    """Yield the list of what nfzoo's log says in the block, which is not printed."""
    kept: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    log, keeper = logging.getLogger("nfzoo"), Keeper(logging.WARNING)
    before = log.propagate
    log.addHandler(keeper)
    log.propagate = False
    try:
        yield kept
    finally:
        log.removeHandler(keeper)
        log.propagate = before


# -- words


def _layout(images: Images, parts: Sequence[str]) -> str:
    kind = "a table of images"
    if isinstance(images, ImageFolder):  # whose root is that of the paths in a table
        kind = "a folder of images for each class" if images.root == Path() else "a folder of images, and their labels"
    elif isinstance(images, TarShards):
        kind = "tar files"
    in_parts = f", in the parts {' and '.join(parts)}"
    return kind + (in_parts if len(parts) > 1 else ", of which training holds out a share")


def _sides(facts: Facts) -> dict[str, tuple[int, float, int]]:
    """Return least, median and greatest width and height of the images that can be read; none if there are none."""
    if not facts.readable.any():
        return {}
    sides = {"width": facts.width[facts.readable], "height": facts.height[facts.readable]}
    return {name: (int(v.min()), float(np.median(v)), int(v.max())) for name, v in sides.items()}


def _balance(counts: Mapping[str, int]) -> str:
    low, high = min(counts.values()), max(counts.values())
    each = f"{low:,} each" if low == high else f"from {low:,} to {high:,} images each"
    return f"{_number(len(counts), 'class', 'classes')}, {each}"


def _number(count: int, word: str, plural: str | None = None) -> str:
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
