"""Plots of training curves and of signal propagation, by matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfzoo.analysis.signal_propagation import SignalMetrics
from nfzoo.analysis.style import BLUE, INK, LIGHT_BLUE, ORANGE, PAPER, QUIET, RULE, check_png
from nfzoo.checkpoint.atomic import replaced
from nfzoo.errors import DataError, NfzooError
from nfzoo.files import nearest_path, parse_json, read_text
from nfzoo.runtime.output import escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class MissingPlotsError(NfzooError, ModuleNotFoundError):
    """A plot was asked for where matplotlib is not installed."""


_PREFIXES = ("train_", "", "ema_")


def training_curves(metrics_jsonl: Path, output: Path) -> None:
    """Plot loss and first metric by epoch, of the live weights and of their moving average, to a PNG.

    Args:
        metrics_jsonl: one JSON object for each epoch, written by `nfzoo.train`; absent or null values are not drawn.

    Raises:
        DataError: for a file that is missing, empty or damaged.
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    rows = read_metrics(metrics_jsonl)
    figure = new_figure(10.5, 4.4)
    loss, accuracy = figure.subplots(1, 2)
    metric = metric_of(rows)
    lines = (("train_", "training, as optimised", QUIET, ":"), ("", "held out, live weights", ORANGE, "-"))
    for axes, quantity, factor in ((loss, "loss", 1.0), (accuracy, metric, 100.0)):
        for prefix, label, colour, style in (*lines, ("ema_", "held out, averaged (EMA)", BLUE, "-")):
            points = [(r["epoch"], factor * r[prefix + quantity]) for r in rows if r.get(prefix + quantity) is not None]
            if not points:
                continue
            last = f"{points[-1][1]:.3f}" if quantity == "loss" else f"{points[-1][1]:.1f} %"
            marker = "o" if len(points) <= 40 else ""
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=colour, label=f"{label}: {last}", marker=marker, markersize=3.5, linewidth=1.8)
        dress(axes, "Loss" if quantity == "loss" else f"{METRICS[metric].capitalize()} (%)", "epoch")
        if axes.get_legend_handles_labels()[0]:  # none if every figure is missing
            axes.legend(
                frameon=False, fontsize=9, labelcolor=INK, title="at the end", title_fontsize=9, alignment="left"
            )
    loss.set_ylim(bottom=0)
    accuracy.set_ylim(top=min(accuracy.get_ylim()[1], 101))
    save(figure, output)


METRICS = {"accuracy": "accuracy", "map": "mean average precision"}
"""Key of a run's first metric -> its name; that of multi-label runs is the second."""


def metric_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the key of a run's first metric, see `METRICS`."""
    return "map" if any("map" in row for row in rows) else "accuracy"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the figures of each epoch; raise a `DataError` for a file that is missing, empty or damaged."""
    rows = []
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        near = nearest_path(path) or "; nfzoo train writes it after the first epoch"
        raise DataError(f"there is no file {path}{near}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict) or "epoch" not in row:
            raise DataError(f"line {number} of {path} must be an object with an 'epoch'")
        for key in ("epoch", *(prefix + what for prefix in _PREFIXES for what in ("loss", *METRICS))):
            if not isinstance(row.get(key), int | float | None):
                raise DataError(f"line {number} of {path}: {key!r} must be a number, not {row[key]!r}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no epochs yet")
    return rows


def held_out_curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float | None]]:
    """Return epoch, first metric and loss on held-out images, of the averaged weights where a run has them."""
    found, metric = [], metric_of(rows)
    for row in rows:
        prefix = "" if row.get(f"ema_{metric}") is None else "ema_"
        if row.get(f"{prefix}{metric}") is not None:
            found.append((row["epoch"], row[f"{prefix}{metric}"], row.get(f"{prefix}loss")))
    return found


def compared_curves(
    runs: Sequence[tuple[str, Sequence[tuple[int, float, float | None]]]], output: Path, *, metric: str = "accuracy"
) -> None:
    """Plot loss and first metric on held-out images by epoch, of several runs over each other, to a PNG.

    Args:
        runs: name and `held_out_curve`; a loss that is `None` is not drawn.
        output: the file.
        metric: its key, see `METRICS`.

    Raises:
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    figure = new_figure(11.5, 4.4)
    loss, accuracy = figure.subplots(1, 2)
    styles = itertools.cycle(itertools.product(("-", "--", ":"), (BLUE, ORANGE, INK, LIGHT_BLUE, QUIET)))
    for (name, points), (line, colour) in zip(runs, styles, strict=False):
        marker = "o" if len(points) <= 40 else ""
        for axes, curve in (
            (loss, [(epoch, value) for epoch, _, value in points if value is not None]),
            (accuracy, [(epoch, 100 * value) for epoch, value, _ in points]),
        ):
            x, y = zip(*curve, strict=True) if curve else ((), ())
            axes.plot(x, y, line, color=colour, label=escaped(name), marker=marker, markersize=3.5, linewidth=1.8)
    dress(loss, "Loss on held-out images", "epoch")
    dress(accuracy, f"{METRICS[metric].capitalize()} on held-out images (%)", "epoch")
    loss.set_ylim(bottom=0)
    accuracy.set_ylim(top=min(accuracy.get_ylim()[1], 101))
    for text in accuracy.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right").get_texts():
        text.set_parse_math(False)
    save(figure, output)


def signal_propagation(metrics: Sequence[SignalMetrics], output: Path, *, title: str = "") -> None:
    """Plot the papers' signal propagation, three statistics of the activations by depth, to a PNG.

    A dashed line shows the variance that beta assumes. It falls back to 1 at the start of each stage.

    Args:
        title: a line above the panels, such as the model's name and its input.

    Source: arXiv 2101.08692, section 3.

    Raises:
        DataError: if `metrics` is empty.
        MissingPlotsError: without matplotlib.
    """
    check_png(output)
    if not metrics:
        raise DataError("there are no signal metrics to plot")
    figure = new_figure(13, 4.6 if title else 4.2)
    if title:
        figure.suptitle(escaped(title), x=0.012, ha="left", fontsize=12.5, color=INK, parse_math=False)
    # Stages, and the statistics of the panels.
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
        # Curves: measured, and assumed by beta.
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.8, label="measured")
        dress(axes, name, "residual blocks passed")
        axes.set_ylabel("average over channels", color=QUIET)
        if expectation is not None and (expected := _by_depth(metrics, expectation))[0]:
            axes.plot(*expected, color=QUIET, linestyle=(0, (4, 2)), linewidth=1.3, label="assumed by beta")
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
            y = y + expected[1]
        # Scale: logarithmic for values over more than two decades.
        if y and min(y) > 0 and max(y) > 100 * min(y):
            axes.set_yscale("log")
            axes.set_ylim(min(y) / 1.5, max(y) * (max(y) / min(y)) ** 0.15)  # room for the stages' names
        elif y and max(y) > 0:
            axes.set_ylim(0, 1.18 * max(y))
        axes.set_xlim(-0.5, len(metrics) - 0.5)
        # Borders and names of the stages.
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
    save(figure, output)


def _by_depth(metrics: Sequence[SignalMetrics], field: str) -> tuple[list[int], list[float]]:
    points = [(i, float(v)) for i, m in enumerate(metrics) if (v := getattr(m, field)) is not None]
    return [i for i, _ in points], [value for _, value in points]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches; raise a `MissingPlotsError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPlotsError("the plots need matplotlib: pip install 'nfzoo[plots]'", name="matplotlib") from error
    return Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor=PAPER)


def dress(axes: Axes, title: str, x_label: str) -> None:
    """Give axes the title, the name of their horizontal axis, and the style of all figures."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold")
    axes.set_xlabel(x_label, color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=QUIET, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def save(figure: Figure, output: Path) -> None:
    """Write a figure to a PNG, whole or not at all."""
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")
