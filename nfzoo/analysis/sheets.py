"""Contact sheets of predictions and of augmented batches, drawn by Pillow alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nfzoo.analysis.style import BLUE, INK, LIGHT_BLUE, PAGE, PAPER, QUIET, RULE, check_png
from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import Preprocessing
from nfzoo.errors import DataError
from nfzoo.runtime.output import escaped

SHEET_LIMIT = 120
"""The most images that a sheet shows; of more, it shows the first."""

AUGMENTED_LIMIT = 30
"""The most images that `augmentation_sheet` shows: five full rows, with partners of a mixture side by side."""

_THUMB, _PAD, _GAP, _HEAD = 256, 14, 18, 58  # pixels
_ROW, _FIRST_ROW, _BAR = 36, 40, 8
_ROWS = 3


class SheetEntry(NamedTuple):
    """One card of a prediction sheet.

    Attributes:
        image: drawn uncropped, in its own aspect.
        title: the line under the image, such as the file's name.
        top: (label, probability in [0, 1]), the most probable first; three are drawn.
    """

    image: Image.Image
    title: str
    top: Sequence[tuple[str, float]]


def thumbnail(image: Image.Image) -> Image.Image:
    """Return the image as RGB in the size of a sheet; a small image is magnified without smoothing."""
    scale = _THUMB / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS)


def prediction_sheet(entries: Sequence[SheetEntry], output: Path, *, title: str = "Predictions") -> None:
    """Write a PNG of cards: each image with its name, and most probable labels, if any, with probabilities as bars.

    Raises:
        DataError: without entries, or if `output` is not a `.png`.
        OSError: if it cannot be written; an earlier file then stays.
    """
    if not entries:
        raise DataError("a prediction sheet needs at least one image")
    check_png(output)
    shown = entries[:SHEET_LIMIT]
    rows_of_bars = min(_ROWS, max(len(e.top) for e in shown))
    columns = min(len(shown), max(3, min(6, math.ceil(math.sqrt(1.6 * len(shown))))))
    card_w = _THUMB + 2 * _PAD
    bars = _FIRST_ROW + (rows_of_bars - 1) * _ROW + _PAD - 4 if rows_of_bars else 0
    card_h = _PAD + _THUMB + 32 + bars
    rows = math.ceil(len(shown) / columns)
    width = columns * (card_w + _GAP) + _GAP
    height = _HEAD + rows * (card_h + _GAP)
    sheet = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(sheet)
    more = f" (the first {len(shown)} of {len(entries)})" if len(shown) < len(entries) else ""
    _text(draw, (_GAP, _HEAD // 2 + 2), title + more, size=21, fill=INK, room=width - 2 * _GAP)
    for i, entry in enumerate(shown):
        x = _GAP + (i % columns) * (card_w + _GAP)
        y = _HEAD + (i // columns) * (card_h + _GAP)
        draw.rounded_rectangle((x, y, x + card_w - 1, y + card_h - 1), 10, fill=PAPER, outline=RULE)
        _card(sheet, draw, (x + _PAD, y + _PAD), entry)
    with replaced(output) as scratch:
        sheet.save(scratch, "PNG")


def _card(sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], entry: SheetEntry) -> None:
    x, y = corner
    draw.rectangle((x, y, x + _THUMB - 1, y + _THUMB - 1), fill=PAGE)
    thumb = thumbnail(entry.image)
    sheet.paste(thumb, (x + (_THUMB - thumb.width) // 2, y + (_THUMB - thumb.height) // 2))
    y += _THUMB + 16
    _text(draw, (x, y), entry.title, size=14, fill=QUIET, room=_THUMB)
    y += 16
    for rank, (label, probability) in enumerate(entry.top[:_ROWS]):
        first = rank == 0
        size = 18 if first else 15
        percent = f"{100 * probability:.1f} %"
        middle = y + (14 if first else 12)
        used = _font(size).getlength(percent)
        draw.text((x + _THUMB, middle), percent, INK if first else QUIET, _font(size), anchor="rm")
        _text(draw, (x, middle), label, size=size, fill=INK if first else QUIET, room=_THUMB - used - 10)
        bar = y + (27 if first else 23)
        draw.rounded_rectangle((x, bar, x + _THUMB - 1, bar + _BAR - 1), _BAR // 2, fill=PAGE)
        filled = round(_THUMB * probability)
        if filled:
            colour = BLUE if first else LIGHT_BLUE
            radius = min(_BAR, filled) // 2
            draw.rounded_rectangle((x, bar, x + filled - 1, bar + _BAR - 1), radius, fill=colour)
        y += _FIRST_ROW if first else _ROW


def augmentation_sheet(
    images: Tensor,
    output: Path,
    *,
    preprocessing: Preprocessing,
    targets: Tensor | None = None,
    classes: Sequence[str] | None = None,
    title: str = "Training images as the model gets them",
) -> None:
    """Write a PNG of a batch of model inputs, converted back to pictures, each with its target labels.

    Args:
        images: `(n, C, H, W)`, normalised by `preprocessing`.
        targets: labels `(n,)`, or mixed labels or sets of them `(n, classes)`, of which the three largest are drawn.
        classes: names of the labels; by default their numbers.

    Raises:
        DataError: if there are no images, a shape does not fit, or `output` is not a `.png`.
    """
    n, channels = len(images), len(preprocessing.mean)
    if images.ndim != 4 or images.shape[1] != channels or channels not in (1, 3):
        raise DataError(
            f"the sheet shows a batch (n, C, H, W) of the preprocessing's {channels} channels, which must be 1 or 3; "
            f"not {tuple(images.shape)}"
        )
    if targets is not None and (len(targets) != n or targets.ndim > 2):
        raise DataError(f"the targets {tuple(targets.shape)} are not of these {n} images")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    shown = images[:AUGMENTED_LIMIT].detach().float().cpu()
    levels = ((shown * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    entries = [
        SheetEntry(
            Image.fromarray(picture[..., 0] if channels == 1 else picture),
            f"image {row + 1}",
            [] if targets is None else _shares(targets[row].cpu(), classes),
        )
        for row, picture in enumerate(levels)
    ]
    more = f" (the first {len(entries)} of {n})" if len(entries) < n else ""
    prediction_sheet(entries, output, title=title + more)


def _shares(target: Tensor, classes: Sequence[str] | None) -> list[tuple[str, float]]:
    """Return the labels of one image with their shares, the largest first, without those that round to 0.0 %."""
    if target.ndim == 0:
        pairs = [(1.0, int(target))]
    else:
        values, labels = target.float().topk(min(_ROWS, len(target)))
        pairs = [pair for pair in zip(values.tolist(), labels.tolist(), strict=True) if pair[0] >= 0.0005]
    return [(f"class {label}" if classes is None else classes[label], share) for share, label in pairs]


def _text(draw: ImageDraw.ImageDraw, left: tuple[int, int], text: str, *, size: int, fill: str, room: float) -> None:
    """Draw one line with its left end and vertical middle at `left`; in one too long, `…` replaces the middle."""
    text = escaped(text)
    font = _font(size) if text.isascii() else _wide_font(size)
    if font.getlength(text) > room:
        text = text[:400]  # no sheet has room for more
        while len(text) > 2 and font.getlength(_elided(text)) > room:
            text = text[: len(text) // 2] + text[len(text) // 2 + 1 :]
        text = _elided(text)
    draw.text(left, text, fill, font, anchor="lm")


def _elided(text: str) -> str:
    return text[: (len(text) + 1) // 2].rstrip() + "…" + text[(len(text) + 1) // 2 :].lstrip()


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _wide_font(size: int) -> Any:
    """Return DejaVu Sans, of matplotlib or the system; Pillow's own font, which has no accented letters, without it."""
    found = find_spec("matplotlib")
    folders = found.submodule_search_locations or () if found else ()
    for path in (*(f"{folder}/mpl-data/fonts/ttf/DejaVuSans.ttf" for folder in folders), "DejaVuSans.ttf"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(path, size)
    return _font(size)
