"""The picture of a comparison: the time of each way to run a model, with what it costs in exactness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nfzoo.analysis.figures import new_figure, save
from nfzoo.analysis.style import BLUE, INK, LIGHT_BLUE, ORANGE, QUIET, RULE, check_png
from nfzoo.benchmark.measure import Result
from nfzoo.runtime.output import escaped

_COLOURS = {"float32": BLUE, "bf16": LIGHT_BLUE, "int8": ORANGE}


def times_figure(results: Sequence[Result], title: str, output: Path) -> None:
    """Draw a bar for each result that was measured, the fastest on top, with quartiles, to a PNG.

    Raises:
        DataError: unless the file name ends in .png.
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    rows = sorted((r for r in results if r.milliseconds is not None), key=lambda r: -(r.milliseconds or 0.0))
    figure = new_figure(8.8, 1.3 + 0.34 * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        assert row.milliseconds is not None
        assert row.low is not None
        assert row.high is not None
        errors = [[row.milliseconds - row.low], [row.high - row.milliseconds]]
        axes.barh(y, row.milliseconds, xerr=errors, color=_COLOURS[row.precision], ecolor=INK, height=0.7)
        axes.annotate(f"{row.milliseconds:.3g} ms{_exactness(row)}", (row.high, y), (6, 0), textcoords="offset points")
        axes.texts[-1].set(va="center", color=QUIET, fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{row.format} {row.precision}" for row in rows])
    axes.set_xlim(0, 1.6 * max((row.high or 0.0 for row in rows), default=1.0))
    axes.set_title(escaped(title).replace("$", r"\$"), loc="left", color=INK, fontsize=11.5, fontweight="bold")
    axes.set_xlabel("milliseconds for one image, median and quartiles", color=QUIET)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    save(figure, output)


def _exactness(row: Result) -> str:
    if row.accuracy is not None:
        return f", {row.accuracy:.1%} right"
    return "" if row.agreement is None else f", {row.agreement:.1%} as the reference"
