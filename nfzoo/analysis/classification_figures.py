"""Pictures of a classifier's confusion matrix, calibration and robustness, by matplotlib."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfzoo.analysis.classification import Calibration
from nfzoo.analysis.figures import dress, new_figure, save
from nfzoo.analysis.style import BLUE, INK, LIGHT_BLUE, ORANGE, PAPER, QUIET, RULE, check_png
from nfzoo.runtime.output import escaped

_NUMBERED, _NAMED = 25, 60  # classes up to which cells have numbers, and axes have names
_LETTERS = 24  # of a class's name


def confusion_figure(confusion: np.ndarray, labels: Sequence[str], output: Path) -> None:
    """Draw the rows of a confusion matrix as shares of their sums, to a PNG.

    Up to 25 classes have their counts in the cells, and up to 60 their names at the axes. The colours follow the square
    root of the shares, so that rare mistakes can be seen.

    Args:
        confusion: `(classes, classes)`: see `classification.confusion_matrix`.
        labels: names of the classes.
        output: the file.

    Raises:
        MissingPlotsError: without matplotlib.
    """
    n = len(confusion)
    side = min(11.0, max(4.2, 1.8 + 0.42 * n)) if n <= _NAMED else 7.0
    figure = new_figure(side + 1.2, side)
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    colours = LinearSegmentedColormap.from_list("shares", [PAPER, LIGHT_BLUE, BLUE])
    picture = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if n <= _NUMBERED:
        for i, j in np.argwhere(confusion).tolist():
            colour = PAPER if shares[i, j] > 0.45 else INK
            axes.text(j, i, f"{confusion[i, j]:,}", ha="center", va="center", fontsize=8.5, color=colour)
    if n <= _NAMED:
        names = [_short(label) for label in labels]
        size = 9 if n <= _NUMBERED else 7
        upright = max(map(len, names), default=0) > 3
        axes.set_xticks(range(n), names, rotation=90 if upright else 0, fontsize=size, parse_math=False)
        axes.set_yticks(range(n), names, fontsize=size, parse_math=False)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_xlabel("predicted class", color=QUIET)
    axes.set_ylabel("class of the image", color=QUIET)
    axes.tick_params(colors=QUIET, length=0)
    axes.spines[:].set_color(RULE)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"])
    bar.ax.tick_params(colors=QUIET, length=0, labelsize=8.5)
    bar.outline.set_edgecolor(RULE)  # pyright: ignore[reportCallIssue]
    bar.set_label("share of the class's images", color=QUIET, fontsize=9)
    _save(figure, output)


def reliability_figure(panels: Sequence[tuple[str, Calibration]], output: Path) -> None:
    """Draw for each panel the accuracy in bins of confidence, and the share of images in them, to a PNG.

    Args:
        panels: a title and the calibration, side by side.
        output: the file.

    Raises:
        MissingPlotsError: without matplotlib.

    Source: arXiv 1706.04599, figure 1.
    """
    figure = new_figure(0.6 + 4.8 * len(panels), 5.6)
    grid = figure.subplots(2, len(panels), height_ratios=(3, 1), sharex=True, squeeze=False)
    for (title, found), upper, lower in zip(panels, *grid, strict=True):
        width = 1 / len(found.counts)
        left, filled = np.arange(len(found.counts)) * width, found.counts > 0
        style = {"width": 0.92 * width, "align": "edge"}
        start = left[filled] + 0.04 * width
        upper.plot([0, 1], [0, 1], color=QUIET, linestyle=(0, (4, 2)), linewidth=1.3, label="calibrated", zorder=3)
        upper.bar(start, found.accuracy[filled], color=BLUE, label="accuracy", **style)
        upper.plot(
            found.confidence[filled],
            found.accuracy[filled],
            "o",
            color=ORANGE,
            markersize=4,
            label="at mean confidence",
            zorder=4,
        )
        dress(upper, title, "")
        upper.set_ylim(0, 1.02)
        upper.set_xlim(0, 1)
        upper.set_ylabel("accuracy", color=QUIET)
        frame = {"framealpha": 0.9, "facecolor": PAPER, "edgecolor": PAPER, "alignment": "left", "title_fontsize": 9}
        note = f"ECE {found.ece:.2%}, NLL {found.nll:.4f}"
        upper.legend(fontsize=9, labelcolor=INK, loc="upper left", title=note, **frame).set_zorder(5)
        lower.bar(start, found.counts[filled] / found.counts.sum(), color=LIGHT_BLUE, **style)
        dress(lower, "", "confidence of the predicted class")
        lower.set_ylabel("share of images", color=QUIET)
        for axes in (upper, lower):
            axes.set_xticks(np.linspace(0, 1, 6))
    _save(figure, output)


def corruption_figure(found: Mapping[str, Any], output: Path) -> None:
    """Draw top-1 accuracy over the severity of corruptions, to a PNG.

    Args:
        found: the fields that `nfzoo.evaluate.robustness` returns.
        output: the file.

    Raises:
        DataError: if `output` is not a `.png`.
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    figure = new_figure(8.4, 4.4)
    axes = figure.subplots()
    styles = itertools.product(("-", "--"), (BLUE, ORANGE, QUIET, LIGHT_BLUE, INK))
    for (name, mean), (line, colour) in zip(found["means"].items(), styles, strict=False):
        values = [found["clean"]["top1"], *(row["top1"] for row in found["rows"] if row["corruption"] == name)]
        label = f"{name.replace('_', ' ')}: {mean:.1%}"
        accuracies = [100 * value for value in values]
        axes.plot(
            range(len(values)), accuracies, line, color=colour, marker="o", markersize=4, linewidth=1.8, label=label
        )
    dress(axes, "Top-1 accuracy under corruptions (%)", "severity; 0 is clean")
    axes.set_ylim(0, 102)
    legend = {"title": "mean over severities", "title_fontsize": 9, "alignment": "left", "loc": "upper left"}
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, bbox_to_anchor=(1, 1), **legend)
    save(figure, output)


def _short(text: str) -> str:
    text = escaped(text)
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _save(figure: object, output: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for a letter that the font lacks
        save(figure, output)  # type: ignore[arg-type]
