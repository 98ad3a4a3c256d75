"""The picture of a range test: the loss over the learning rate, a line for each AGC threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nfzoo.analysis.figures import dress, new_figure, save
from nfzoo.analysis.style import BLUE, INK, LIGHT_BLUE, ORANGE, QUIET, check_png
from nfzoo.tuner.curves import Curve, Suggestion, in_words

_STYLES = [(colour, line) for line in ("-", "--", ":") for colour in (BLUE, ORANGE, INK, LIGHT_BLUE, QUIET)]


def rate_curves(curves: Sequence[Curve], found: Suggestion | None, output: Path) -> None:
    """Plot the smoothed losses of range tests over the learning rate, and mark what was found, to a PNG.

    Raises:
        DataError: unless the file name ends in .png.
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    figure = new_figure(8.4, 4.6)
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        colour, line = _STYLES[i % len(_STYLES)]
        axes.plot(
            curve.rates, curve.smoothed, line, color=colour, linewidth=1.8, label=f"threshold {in_words(curve.clip)}"
        )
    finite = [loss for curve in curves for loss in curve.smoothed if math.isfinite(loss)]
    if finite:  # losses far above the first would flatten the rest
        low, high = min(finite), max(curve.smoothed[0] for curve in curves)
        span = max(high - low, 0.05 * abs(high), 1e-6)
        axes.set_ylim(low - 0.15 * span, high + 0.6 * span)
    if found is not None:
        axes.axvline(
            found.lr,
            color=INK,
            linewidth=1.0,
            linestyle=(0, (4, 3)),
            label=f"found: {found.lr:.2g}\nat {in_words(found.clip)}",
        )
    dress(axes, "Training loss, smoothed", "learning rate")
    axes.set_xscale("log")
    figure.legend(frameon=False, fontsize=9, labelcolor=INK, loc="outside right upper")
    save(figure, output)
