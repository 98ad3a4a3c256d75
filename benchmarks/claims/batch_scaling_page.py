"""Draw and tell what the runs of `batch_scaling` say: the lines of figure 2 of arXiv 2102.06171, a heat map, a page."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.claims import batch_scaling
from benchmarks.claims.batch_scaling import (
    TWIN,
    Result,
    Spec,
    Study,
    changes,
    config,
    is_of_grid,
    line_of,
    threshold_specs,
)
from nfzoo.analysis.figures import dress, new_figure
from nfzoo.analysis.style import BLUE, INK, LIGHT_BLUE, ORANGE, PAPER, QUIET
from nfzoo.checkpoint.atomic import replaced
from nfzoo.model import parameter_count

MARGIN = 0.05
STYLES = {
    "AGC, open": (BLUE, "-"),
    "AGC": (LIGHT_BLUE, "-"),
    "no clipping, open": (QUIET, "-"),
    "no clipping": (QUIET, ":"),
    "global norm, open": (ORANGE, "-"),
    "global norm": (ORANGE, ":"),
    TWIN: (INK, "--"),
}


class Point(NamedTuple):
    """All seeds of one setting. A run that diverged counts with an accuracy of 0."""

    spec: Spec
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean accuracy."""
        return statistics.fmean(self.accuracies)


def points(results: Sequence[Result]) -> dict[Spec, Point]:
    """Return the results gathered by setting, each under its spec with seed 0."""
    groups: dict[Spec, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.spec.seed):
        groups.setdefault(result.spec._replace(seed=0), []).append(result)
    return {spec: Point(spec, tuple(r.accuracy for r in group)) for spec, group in groups.items()}


def best(results: Sequence[Result]) -> dict[tuple[str, int], Point]:
    """Return the setting of highest mean accuracy of each method and batch size, among those with the most seeds."""
    found: dict[tuple[str, int], Point] = {}
    for point in points(results).values():
        key = line_of(point.spec), point.spec.batch
        rank = len(point.accuracies), point.mean
        if key not in found or rank > (len(found[key].accuracies), found[key].mean):
            found[key] = point
    return found


def at_one_base(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Return each line's runs of the first seed at one base rate, as the paper scales the learning rate.

    Of the base rates that were tried at every batch size, it is the one of the highest mean accuracy.
    """
    batches = {r.spec.batch for r in results}
    rows: dict[str, dict[float, dict[int, Result]]] = {}
    for result in results:
        if result.spec.seed == min(r.spec.seed for r in results):
            spec = result.spec
            rows.setdefault(line_of(spec), {}).setdefault(spec.base, {})[spec.batch] = result
    found = {}
    for name, by_base in rows.items():
        whole = [row for row in by_base.values() if row.keys() == batches]
        if whole:
            found[name] = max(whole, key=lambda row: sum(r.accuracy for r in row.values()))
    return found


def largest_stable(row: dict[int, float], top: dict[int, float]) -> int | None:
    """Return the largest batch size up to which, from the smallest on, a method is within `MARGIN` of the best one."""
    found = None
    for batch in sorted(row):
        if row[batch] < top[batch] - MARGIN:
            break
        found = batch
    return found


# ---------------------------------------------------------------- figures


def draw_lines(results: Sequence[Result], thresholds: Sequence[Result], output: Path) -> None:
    """Draw accuracy over batch size: each method at its best, at one base rate, and AGC by threshold if any."""
    figure = new_figure(13 if thresholds else 10, 4.2)
    left, middle, *third = figure.subplots(1, 3 if thresholds else 2)
    batches = sorted({r.spec.batch for r in results})
    chosen, one = best(results), at_one_base(results)
    for method, (colour, style) in STYLES.items():
        own = [chosen[method, b] for b in batches if (method, b) in chosen]
        if not own:
            continue
        x, y = [p.spec.batch for p in own], [100 * p.mean for p in own]
        spread = [[100 * (p.mean - min(p.accuracies)) for p in own], [100 * (max(p.accuracies) - p.mean) for p in own]]
        left.errorbar(x, y, spread, color=colour, linestyle=style, marker="o", markersize=4, capsize=3, label=method)
        if row := one.get(method):
            xs = sorted(row)
            line, accuracies = f"{method}, {row[xs[0]].spec.base:g}", [100 * row[b].accuracy for b in xs]
            middle.plot(xs, accuracies, style, color=colour, marker="o", markersize=4, label=line)
    dress(left, "Best learning rate of each batch size", "batch size")
    dress(middle, "Learning rate in proportion to the batch", "batch size")
    for axes in third:
        shades = (LIGHT_BLUE, BLUE, INK, ORANGE, QUIET)
        for limit, colour in zip(sorted({r.spec.limit for r in thresholds}), shades, strict=False):
            some = sorted((r for r in thresholds if r.spec.limit == limit), key=lambda r: r.spec.batch)
            xs, ys = [r.spec.batch for r in some], [100 * r.accuracy for r in some]
            axes.plot(xs, ys, "o-", color=colour, markersize=4, label=f"{limit:g}")
        dress(axes, "AGC, open: thresholds", "batch size")
    left.set_ylabel("held-out accuracy (%)", color=QUIET)
    for axes in (left, middle, *third):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    lowest = min(100 * min(point.accuracies) for point in chosen.values())
    left.set_ylim(max(0, 10 * math.floor(lowest / 10)), 10 * math.ceil(10 * max(p.mean for p in chosen.values())))
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")


def draw_heat(results: Sequence[Result], output: Path) -> None:
    """Draw accuracy over base rate and batch size, a panel for each method, at the best threshold, mean over seeds."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("accuracy", ["#f6f1e7", "#c9d8ef", "#6f9bdc", "#1d4fa3"])
    methods = [m for m in STYLES if any(line_of(r.spec) == m for r in results)]
    batches = sorted({r.spec.batch for r in results})
    bases = sorted({r.spec.base for r in results})
    cells: dict[tuple[str, int, float], Point] = {}
    for point in points(results).values():
        key = line_of(point.spec), point.spec.batch, point.spec.base
        if key not in cells or point.mean > cells[key].mean:
            cells[key] = point
    figure = new_figure(1.2 + 0.62 * len(batches) * len(methods), 1.6 + 0.36 * len(bases))
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    top = max(point.mean for point in cells.values())
    for axes, method in zip(panels, methods, strict=True):
        for column, batch in enumerate(batches):
            for row, base in enumerate(bases):
                point = cells.get((method, batch, base))
                if point is None:
                    continue
                dead = min(point.accuracies) == 0
                share = max(0.0, (point.mean - 0.5) / max(top - 0.5, 1e-6))
                face = "#e3e5e8" if dead else colours(share)
                box = {"facecolor": face, "edgecolor": PAPER, "linewidth": 1}
                axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], **box)
                text = "×" if dead else f"{100 * point.mean:.0f}"
                ink = QUIET if dead else PAPER if share > 0.6 else INK
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8.5)
        axes.set_xlim(0, len(batches))
        axes.set_ylim(0, len(bases))
        axes.set_xticks([i + 0.5 for i in range(len(batches))], [str(b) for b in batches], fontsize=8.5)
        axes.set_yticks([i + 0.5 for i in range(len(bases))], [f"{b:.2g}" for b in bases])
        axes.tick_params(length=0, colors=QUIET)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(method, fontsize=10.5, color=INK, fontweight="bold")
        axes.set_xlabel("batch size", color=QUIET)
    panels[0].set_ylabel("base rate", color=QUIET)
    figure.supxlabel(
        "Held-out accuracy in percent, mean over the seeds that were run; ×: diverged; blank: not tried",
        fontsize=9,
        color=QUIET,
    )
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")


# ---------------------------------------------------------------- the page


def accuracy_table(results: Sequence[Result]) -> str:
    """Return a table of the best accuracy of each method and batch size: mean over seeds, spread, base rate."""
    chosen = best(results)
    batches = sorted({batch for _, batch in chosen})
    lines = ["| method | " + " | ".join(map(str, batches)) + " | largest stable batch |"]
    lines.append("| --- |" + " ---: |" * (len(batches) + 1))
    top = {b: max(p.mean for (_, batch), p in chosen.items() if batch == b) for b in batches}
    for method in STYLES:
        row = {b: chosen[method, b] for b in batches if (method, b) in chosen}
        if row:
            whole = row.keys() == top.keys()  # else the smallest batches may not have been run
            stable = (largest_stable({b: p.mean for b, p in row.items()}, top) or "none") if whole else ""
            cells = [_cell(row[b]) if b in row else "" for b in batches]
            lines.append(f"| {method} | {' | '.join(cells)} | {stable} |")
    return "\n".join(lines)


def _cell(point: Point) -> str:
    half = 100 * (max(point.accuracies) - min(point.accuracies)) / 2
    spread = f" ± {half:.1f}" if len(point.accuracies) > 1 else ""
    return f"{100 * point.mean:.1f}{spread} at {point.spec.base:g}"


def one_base_table(results: Sequence[Result]) -> str:
    """Return a table of each method at one base rate for all batch sizes, by the first seed."""
    rows = at_one_base(results)
    batches = sorted({batch for row in rows.values() for batch in row})
    lines = [
        "| method | base rate | " + " | ".join(map(str, batches)) + " |",
        "| --- | ---: |" + " ---: |" * len(batches),
    ]
    for method in STYLES:
        if row := rows.get(method):
            cells = [_end(row[b].accuracy) if b in row else "" for b in batches]
            lines.append(f"| {method} | {next(iter(row.values())).spec.base:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _end(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}" if accuracy else "diverged"


def changes_table(study: Study, results: Sequence[Result]) -> str:
    """Return a table of what one change at a time does to AGC."""
    ends = {r.spec: r.accuracy for r in results}
    lines = ["| run | held-out accuracy (%) |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {name} | {_end(ends[s])} |" for name, s in changes(study).items() if s in ends)])


def machines(results: Sequence[Result]) -> str:
    """Return what the runs ran on, each with its number of runs where there are several."""
    counts = Counter(r.on for r in results)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{name} (runs: {count})" for name, count in counts.most_common())


def page(study: Study, results: Sequence[Result], command: str, images: tuple[int, int]) -> str:
    """Return the result as Markdown."""
    grid = [r for r in results if is_of_grid(study, r.spec)]
    batches = ", ".join(map(str, study.batches))
    steps = [int(study.epochs * images[0]) // batch for batch in study.batches]
    rates = (
        "the first seed tries a guess and those lower and higher by a factor of 4 (of 2 for AGC), then half and\n"
        "  twice the best of these; the other seeds take the best of all"
        if study.few
        else "every seed tries seven, by factors of 2"
    )
    one_change = ""
    if study.around is not None:
        one_change = f"""
## What limits AGC in short runs

One change to the first run, or two, at a batch of {study.around} and with the first seed.

{changes_table(study, results)}
"""
    return f"""# Stability over the batch size

{(batch_scaling.__doc__ or "").split(chr(10) + chr(10), 2)[2].strip()}

- network: NF-ResNet-26, widths {config().widths}, {parameter_count(config()):,} parameters; its twin has the same
  convolutions in a pre-activation ResNet with batch normalisation
- data: {images[0]:,} grey images of 14 x 14 pixels to learn from, averaged from 28 x 28, {images[1]:,} held out; no
  augmentation
- batches {batches}: {study.epochs} epochs each, so {", ".join(map(str, steps))} steps
- base rates: {rates}
- seeds: {len(study.seeds)}; {len(results)} runs in all
- on: {machines(results)}
- command: `{command}`

![accuracy over batch size](stability.png)

## Best accuracy

In percent: mean over the seeds, half the spread between them, and the base rate. Without a spread there was the first
seed alone; a blank was not run.

{accuracy_table(grid)}

## At one base rate

As in the paper, the learning rate is proportional to the batch: at the base rate of the highest mean, among those that
were tried at every batch size; in percent, first seed. A method without such a base rate is left out.

{one_base_table(grid)}

![accuracy over batch size and base rate](stability-heat.png)
{one_change}
Every run is a line of `stability.jsonl`.
"""


def write(study: Study, results: Sequence[Result], output: Path, *, command: str, images: tuple[int, int]) -> str:
    """Write `stability.md` and its figures; return what to print."""
    grid = [r for r in results if is_of_grid(study, r.spec)]
    tried = set(threshold_specs(study))
    draw_lines(grid, [r for r in results if r.spec in tried], output / "stability.png")
    draw_heat(grid, output / "stability-heat.png")
    with replaced(output / "stability.md") as scratch:
        scratch.write_text(page(study, results, command, images), encoding="utf-8")
    return f"\n{accuracy_table(grid)}\n\nwrote {output}/stability.md, .png, -heat.png, .jsonl"
