"""Pictures: prediction sheets (Pillow alone), training curves and signal-propagation plots (matplotlib)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nfzoo.analysis.signal_propagation import SignalMetrics
from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import Preprocessing
from nfzoo.errors import DataError, NfzooError, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, RULE, PAPER, PAGE = "#1c2530", "#66717f", "#dfe3e8", "#ffffff", "#f4f5f7"
BLUE, LIGHT_BLUE, ORANGE = "#2563c9", "#a8c2ec", "#d9730d"  # told apart by the colour-blind, too

SHEET_LIMIT = 120
"""Images that a sheet shows; of more, the first."""

AUGMENTED_LIMIT = 30
"""Images of a batch that `augmentation_sheet` shows; of more, the first. Five full rows, with partners side by side."""

_THUMB, _PAD, _GAP, _HEAD = 256, 14, 18, 58  # pixels
_ROW, _FIRST_ROW, _BAR = 36, 40, 8
_ROWS = 3


class MissingPlotsError(NfzooError, ModuleNotFoundError):
    """A plot was asked for where matplotlib is not installed."""


class SheetEntry(NamedTuple):
    """One card of a prediction sheet.

    Attributes:
        image: shown whole, in its own aspect.
        title: the line under it, such as the file's name.
        top: (label, probability in [0, 1]), the most probable first; the first three are drawn.
    """

    image: Image.Image
    title: str
    top: Sequence[tuple[str, float]]


def thumbnail(image: Image.Image) -> Image.Image:
    """The RGB image at the size in which a sheet shows it; small ones are magnified pixel by pixel."""
    scale = _THUMB / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS)


def prediction_sheet(entries: Sequence[SheetEntry], output: Path, *, title: str = "Predictions") -> None:
    """Write a PNG of cards: each image with its name, most probable labels, and their probabilities as bars.

    Raises:
        DataError: without entries, or if `output` is not a `.png`.
        OSError: if it cannot be written; what was there before is then still there.
    """
    if not entries:
        raise DataError("a prediction sheet needs at least one image")
    check_png(output)
    shown = entries[:SHEET_LIMIT]
    rows_of_bars = max(1, min(_ROWS, max(len(e.top) for e in shown)))
    columns = min(len(shown), max(3, min(6, math.ceil(math.sqrt(1.6 * len(shown))))))
    card_w = _THUMB + 2 * _PAD
    card_h = _PAD + _THUMB + 32 + _FIRST_ROW + (rows_of_bars - 1) * _ROW + _PAD - 4
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
    """Write a PNG of a batch of model inputs, turned back into pictures, each with the labels it is trained on.

    Args:
        images: `(n, C, H, W)`, normalised by `preprocessing`.
        targets: labels `(n,)`, or shares of mixed labels `(n, classes)`, of which the two largest are shown.
        classes: names of the labels; by default their numbers.

    Raises:
        DataError: for no images, other shapes than these, or an `output` that is not a `.png`.
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
    """The labels of one image with their shares, the largest first; without those that would be shown as 0.0 %."""
    if target.ndim == 0:
        pairs = [(1.0, int(target))]
    else:
        values, labels = target.float().topk(min(2, len(target)))
        pairs = [pair for pair in zip(values.tolist(), labels.tolist(), strict=True) if pair[0] >= 0.0005]
    return [(f"class {label}" if classes is None else classes[label], share) for share, label in pairs]


def _text(draw: ImageDraw.ImageDraw, left: tuple[int, int], text: str, *, size: int, fill: str, room: float) -> None:
    """One line, its left end and vertical middle at `left`; too long a text loses its middle."""
    font, text = _font(size), printable(text)
    if font.getlength(text) > room:
        text = text[:400]  # nothing longer fits on any sheet
        while len(text) > 2 and font.getlength(_elided(text)) > room:
            text = text[: len(text) // 2] + text[len(text) // 2 + 1 :]
        text = _elided(text)
    draw.text(left, text, fill, font, anchor="lm")


def _elided(text: str) -> str:
    return text[: (len(text) + 1) // 2].rstrip() + "…" + text[(len(text) + 1) // 2 :].lstrip()


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def check_png(output: Path) -> None:
    """Raise a `DataError` unless a picture can be called so."""
    if output.suffix.lower() != ".png":
        raise DataError(f"the picture {str(output)!r} must end in .png")


_PREFIXES = ("train_", "", "ema_")


def training_curves(metrics_jsonl: Path, output: Path) -> None:
    """Loss and accuracy over the epochs, of the live weights and of their moving average, as a PNG.

    Args:
        metrics_jsonl: one JSON object an epoch, as `nfzoo.train` writes it; what is absent or null is not drawn.

    Raises:
        DataError: for a file that is missing, empty or damaged.
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    rows = _read_metrics(metrics_jsonl)
    figure = _figure(10.5, 4.4)
    loss, accuracy = figure.subplots(1, 2)
    lines = (("train_", "training, as optimised", QUIET, ":"), ("", "held out, live weights", ORANGE, "-"))
    for axes, quantity, factor in ((loss, "loss", 1.0), (accuracy, "accuracy", 100.0)):
        for prefix, label, colour, style in (*lines, ("ema_", "held out, averaged (EMA)", BLUE, "-")):
            points = [(r["epoch"], factor * r[prefix + quantity]) for r in rows if r.get(prefix + quantity) is not None]
            if not points:
                continue
            last = f"{points[-1][1]:.1f} %" if quantity == "accuracy" else f"{points[-1][1]:.3f}"
            marker = "o" if len(points) <= 40 else ""
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=colour, label=f"{label}: {last}", marker=marker, markersize=3.5, linewidth=1.8)
        _dress(axes, "Loss" if quantity == "loss" else "Accuracy (%)", "epoch")
        if axes.get_legend_handles_labels()[0]:  # none if every figure is missing
            axes.legend(
                frameon=False, fontsize=9, labelcolor=INK, title="at the end", title_fontsize=9, alignment="left"
            )
    loss.set_ylim(bottom=0)
    accuracy.set_ylim(top=min(accuracy.get_ylim()[1], 101))
    _save(figure, output)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; nfzoo train writes it after the first epoch") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict) or "epoch" not in row:
            raise DataError(f"line {number} of {path} must be an object with an 'epoch'")
        for key in ("epoch", *(prefix + what for prefix in _PREFIXES for what in ("loss", "accuracy"))):
            if not isinstance(row.get(key), int | float | None):
                raise DataError(f"line {number} of {path}: {key!r} must be a number, not {row[key]!r}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no epochs yet")
    return rows


def signal_propagation(metrics: Sequence[SignalMetrics], output: Path, *, title: str = "") -> None:
    """The papers' signal-propagation plot as a PNG: three statistics of the activations by depth.

    A dashed line is the variance for which the network's beta is made, which falls back at the start of each stage.

    Args:
        title: a line above the panels, such as the model's name and its input.

    Source: arXiv 2101.08692, section 3.

    Raises:
        DataError: without metrics.
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    if not metrics:
        raise DataError("there are no signal metrics to plot")
    figure = _figure(13, 4.6 if title else 4.2)
    if title:
        figure.suptitle(printable(title), x=0.012, ha="left", fontsize=12.5, color=INK)
    stages = [m.name.rpartition(".")[0] for m in metrics]
    starts = [i for i in range(1, len(metrics)) if stages[i] != stages[i - 1]]
    panels = (
        ("avg_sq_mean", "Squared channel mean", BLUE, None),
        ("avg_var", "Channel variance", BLUE, "expected_var"),
        ("res_avg_var", "Channel variance of the residual branch", ORANGE, None),
    )
    for axes, (field, name, colour, expectation) in zip(figure.subplots(1, 3), panels, strict=True):
        marker = "o" if len(metrics) <= 60 else ""
        x, y = _by_depth(metrics, field)
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.8, label="measured")
        _dress(axes, name, "residual blocks passed")
        axes.set_ylabel("average over channels", color=QUIET)
        if expectation is not None and (expected := _by_depth(metrics, expectation))[0]:
            axes.plot(*expected, color=QUIET, linestyle=(0, (4, 2)), linewidth=1.3, label="assumed by beta")
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
            y = y + expected[1]
        if y and min(y) > 0 and max(y) > 100 * min(y):
            axes.set_yscale("log")
            axes.set_ylim(min(y) / 1.5, max(y) * (max(y) / min(y)) ** 0.15)  # room for the stages' names
        elif y and max(y) > 0:
            axes.set_ylim(0, 1.18 * max(y))
        axes.set_xlim(-0.5, len(metrics) - 0.5)
        for i in starts:
            axes.axvline(i - 0.5, color=RULE, linewidth=1.2, zorder=0)
        for number, (i, end) in enumerate(itertools.pairwise([*starts, len(metrics)]), start=1):
            if end - i > 0.06 * len(metrics):
                axes.annotate(
                    f"stage {number}" if end - i > 0.15 * len(metrics) else f"{number}",
                    ((i + end - 1) / 2, 0.94),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    fontsize=8.5,
                    color=QUIET,
                )
    _save(figure, output)


def _by_depth(metrics: Sequence[SignalMetrics], field: str) -> tuple[list[int], list[float]]:
    points = [(i, float(v)) for i, m in enumerate(metrics) if (v := getattr(m, field)) is not None]
    return [i for i, _ in points], [value for _, value in points]


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPlotsError("the plots need matplotlib: pip install 'nfzoo[plots]'", name="matplotlib") from error
    return Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor=PAPER)


def _dress(axes: Axes, title: str, x_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold")
    axes.set_xlabel(x_label, color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=QUIET, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _save(figure: Figure, output: Path) -> None:
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")
