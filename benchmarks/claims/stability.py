"""Which learning rates train at which batch sizes: no clipping, global-norm clipping, AGC, and batch normalisation.

    python -m benchmarks.claims.stability                    # the digits, a few cells, under a minute
    python -m benchmarks.claims.stability --full             # the digits, the whole grid
    python -m benchmarks.claims.stability --data fashion-mnist --full    # the study of `batch_scaling`, an hour

A small NF-ResNet and its batch-normalised twin learn the embedded digits. As in figure 2 of arXiv 2102.06171 every run
has the same number of epochs, so that a batch four times as large takes a quarter of the steps; Nesterov momentum 0.9,
warm-up over 5/90 of the steps, then half a cosine to 0. For one seed, all runs start from the same weights and see the
images in the same order. The runs of one method and batch size are trained together, vectorised over learning rates and
seeds.

*AGC x* clips with threshold x all parameters but the classifier's weight and the skip gains; *AGC x, all* clips the
skip gains as well, as the paper does. A skip gain starts at 0, where AGC allows a gradient of x / 1000 only. The
paper's runs have a hundred thousand steps in which it can grow, these have some 70 to 300, and with it clipped the
branches stay nearly shut at low learning rates. The study on Fashion-MNIST, `stability.md`, tells what else limits AGC.

A cell of the grid is *usable* if every seed ends within 5 points of the best held-out accuracy in the whole grid. A run
*diverged* if its loss or its final logits are not finite. The lowest learning rate of the grid cuts off what might be
usable below it, without clipping above all. Finished parts are kept in `stability-digits.jsonl`: after an
interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.claims import batch_scaling, batch_scaling_page, stacked_runs
from benchmarks.claims.stacked_runs import WEIGHT_DECAY, Data, Fitted, Rule, Setting, evaluate
from benchmarks.report import machine
from nfzoo.analysis.style import INK, PAPER, QUIET
from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import NFResNetConfig
from nfzoo.data.digits import DIGITS, Digits
from nfzoo.data.idx import FASHION_MNIST
from nfzoo.data.source import open_split
from nfzoo.errors import ConfigError, NfzooError
from nfzoo.model import parameter_count

CONFIG = NFResNetConfig(depths=(2, 2, 2, 2), widths=(16, 32, 64, 64), stem_width=8, num_classes=10, in_channels=1)
SIDE = 16  # pixels, twice the digits' own
MARGIN = 0.05


# ---------------------------------------------------------------- what is compared


class Method(NamedTuple):
    """A way to train: the rule of clipping, its threshold, whether AGC spares the skip gains; or the twin."""

    rule: Rule = "none"
    limit: float = math.inf
    spare_skip_gains: bool = False
    twin: bool = False


TWIN = "batch norm"
METHODS: dict[str, Method] = {
    "no clipping": Method(),
    "global norm 1": Method("global norm", 1.0),
    "global norm 0.1": Method("global norm", 0.1),
    "AGC 0.16": Method("AGC", 0.16, spare_skip_gains=True),
    "AGC 0.04": Method("AGC", 0.04, spare_skip_gains=True),
    "AGC 0.01": Method("AGC", 0.01, spare_skip_gains=True),
    "AGC 0.16, all": Method("AGC", 0.16),
    TWIN: Method(twin=True),
}


class Grid(NamedTuple):
    """The settings that are tried, and the epochs that each takes."""

    methods: tuple[str, ...]
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int


FULL = Grid(tuple(METHODS), (128, 256, 512), tuple(2.0**k for k in range(-5, 3)), (0,), 24)
QUICK = Grid(("no clipping", "AGC 0.04", TWIN), (64, 512), (0.03125, 0.125, 0.5, 2.0), (0,), 6)


class Run(NamedTuple):
    """How one run ended. `accuracy` and `loss` are of the held-out images; `diverged_at` is a step, or `None`."""

    method: str
    batch: int
    rate: float
    seed: int
    epochs: int
    accuracy: float
    loss: float
    diverged_at: int | None


# ---------------------------------------------------------------- training


def digits() -> Data:
    """The embedded digits, enlarged, in the split that `nfzoo train` makes."""
    parts = []
    for part in open_split(DIGITS):
        assert isinstance(part, Digits)
        x = torch.from_numpy(np.asarray(part.images, dtype=np.float32))[:, None]
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
        parts.append((x, torch.from_numpy(np.asarray(part.labels)).long()))
    std, mean = torch.std_mean(parts[0][0])
    (a, b), (c, d) = parts
    return Data(((a - mean) / std, b), ((c - mean) / std, d))


def fit(method: str, batch: int, rates: Sequence[float], *, seed: int, epochs: int, data: Data) -> Fitted:
    """Train once for each learning rate, all at the same time."""
    return _fit(method, batch, [(rate, seed) for rate in rates], epochs=epochs, data=data)


def _fit(method: str, batch: int, pairs: Sequence[tuple[float, int]], *, epochs: int, data: Data) -> Fitted:
    how = METHODS[method]
    settings = [Setting(rate, how.limit, seed, spare_skip_gains=how.spare_skip_gains) for rate, seed in pairs]
    return stacked_runs.train(CONFIG, how.rule, batch, settings, data=data, epochs=epochs, twin=how.twin)


def train(method: str, batch: int, pairs: Sequence[tuple[float, int]], *, epochs: int, data: Data) -> list[Run]:
    """How one run for each pair of learning rate and seed ends; all are trained at the same time."""
    found = _fit(method, batch, pairs, epochs=epochs, data=data)
    steps = epochs * len(data.train[0]) // batch
    ends = evaluate(CONFIG, found, data=data, runs=len(pairs), steps=steps, twin=METHODS[method].twin)
    return [Run(method, batch, rate, seed, epochs, *end) for (rate, seed), end in zip(pairs, ends, strict=True)]


# ---------------------------------------------------------------- the grid


def run_grid(grid: Grid, store: Path, *, data: Data) -> list[Run]:
    """All runs of the grid; those that `store` has are not run again."""
    done = load(store)
    for batch in reversed(grid.batches):  # the quickest first
        for method in grid.methods:
            pairs = [(rate, seed) for seed in grid.seeds for rate in grid.rates]
            missing = [pair for pair in pairs if (method, batch, *pair, grid.epochs) not in done]
            if not missing:
                continue
            start = time.perf_counter()
            for run in train(method, batch, missing, epochs=grid.epochs, data=data):
                done[run[:5]] = run
            save(done.values(), store)
            print(f"batch {batch}, {method}: {time.perf_counter() - start:.0f} s", flush=True)
    keys = {
        (m, b, r, s, grid.epochs) for m in grid.methods for b in grid.batches for r in grid.rates for s in grid.seeds
    }
    return [run for key, run in done.items() if key in keys]


def load(store: Path) -> dict[tuple, Run]:
    """What an earlier call left."""
    if not store.exists():
        return {}
    runs = [Run(**json.loads(line)) for line in store.read_text(encoding="utf-8").splitlines()]
    return {run[:5]: run._replace(loss=math.inf if run.loss is None else run.loss) for run in runs}


def save(runs: Iterable[Run], store: Path) -> None:
    """Write one JSON object a line."""
    rows = [{**run._asdict(), "loss": run.loss if math.isfinite(run.loss) else None} for run in runs]
    with replaced(store) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- what came out


class Cell(NamedTuple):
    """All seeds of one setting: mean held-out accuracy of those that did not diverge, and how they ended."""

    accuracy: float | None
    diverged: int
    usable: bool


def cells(runs: Sequence[Run]) -> dict[tuple[str, int, float], Cell]:
    """Runs gathered by (method, batch size, learning rate)."""
    best = max(run.accuracy for run in runs)
    groups: dict[tuple[str, int, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.batch, run.rate), []).append(run)
    found = {}
    for key, group in groups.items():
        kept = [run.accuracy for run in group if run.diverged_at is None]
        found[key] = Cell(
            accuracy=sum(kept) / len(kept) if kept else None,
            diverged=len(group) - len(kept),
            usable=all(run.accuracy >= best - MARGIN for run in group),
        )
    return found


def table(grid: Grid, found: Mapping[tuple[str, int, float], Cell]) -> str:
    """For each method and batch size: usable learning rates, the highest that never diverges, the best accuracy."""
    lines = [
        "| method | batch | usable learning rates | how many | highest below any divergence | best accuracy | at |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in grid.methods:
        for batch in grid.batches:
            row = {rate: found[method, batch, rate] for rate in grid.rates}
            usable = [rate for rate, cell in row.items() if cell.usable]
            span = "none" if not usable else " to ".join(dict.fromkeys((_rate(usable[0]), _rate(usable[-1]))))
            if usable and len(usable) != sum(usable[0] <= r <= usable[-1] for r in grid.rates):
                span += ", with gaps"
            top = highest_sound(row)
            accuracy, at = max(((cell.accuracy or 0.0), -rate) for rate, cell in row.items())
            lines.append(
                f"| {method} | {batch} | {span} | {len(usable)} of {len(row)} | "
                f"{'none' if top is None else _rate(top)} | {accuracy:.1%} | {_rate(-at)} |"
            )
    return "\n".join(lines)


def highest_sound(row: Mapping[float, Cell]) -> float | None:
    """The highest learning rate up to which no run diverges."""
    top = None
    for rate in sorted(row):
        if row[rate].diverged:
            break
        top = rate
    return top


def verdict(grid: Grid, found: Mapping[tuple[str, int, float], Cell]) -> str:
    """What the grid says about each method, counted."""
    size = len(grid.batches) * len(grid.rates)
    lines = [
        "| method | usable cells | cells without divergence |",
        "| --- | ---: | ---: |",
    ]
    for method in grid.methods:
        own = [cell for (name, _, _), cell in found.items() if name == method]
        lines.append(
            f"| {method} | {sum(cell.usable for cell in own)} of {size} | "
            f"{sum(not cell.diverged for cell in own)} of {size} |"
        )
    return "\n".join(lines)


def reading(grid: Grid, found: Mapping[tuple[str, int, float], Cell]) -> str:
    """The comparison that figure 2 of the paper makes, in words that follow from the counts."""

    def best(prefix: str) -> tuple[int, str]:
        counts = [
            (sum(cell.usable for (name, _, _), cell in found.items() if name == method), method)
            for method in grid.methods
            if method.startswith(prefix) and not method.endswith("all")
        ]
        return max(counts, default=(0, "none tried"))

    def compare(other: tuple[int, str]) -> str:
        size = "larger than" if clipped[0] > other[0] else "smaller than" if clipped[0] < other[0] else "as large as"
        return f"{size} that of {other[1]} ({other[0]})"

    clipped = best("AGC")
    others = [best(prefix) for prefix in ("no clipping", "global norm", TWIN)]
    compared = [compare(other) for other in others if other[1] != "none tried"]
    return f"The usable region of {clipped[1]} ({clipped[0]} cells) is {', '.join(compared)}."


def _rate(value: float) -> str:
    return f"1/{round(1 / value)}" if value < 1 else f"{value:g}"


def draw(grid: Grid, found: Mapping[tuple[str, int, float], Cell], output: Path) -> None:
    """The heat map: a panel for each method, learning rates over batch sizes."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("accuracy", ["#f6f1e7", "#c9d8ef", "#6f9bdc", "#1d4fa3"])
    figure = Figure(
        figsize=(1.2 + 1.75 * len(grid.methods), 1.5 + 0.36 * len(grid.rates)),
        dpi=144,
        layout="constrained",
        facecolor=PAPER,
    )
    panels = figure.subplots(1, len(grid.methods), sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, grid.methods, strict=True):
        for column, batch in enumerate(grid.batches):
            for row, rate in enumerate(grid.rates):
                cell = found[method, batch, rate]
                dead = cell.accuracy is None
                share = 0.0 if cell.accuracy is None else max(0.0, (cell.accuracy - 0.5) / 0.5)
                face = "#e3e5e8" if dead else colours(share)
                axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor=PAPER, linewidth=1))
                text = "×" if cell.accuracy is None else f"{100 * cell.accuracy:.0f}" + "*" * (cell.diverged > 0)
                ink = QUIET if dead else PAPER if share > 0.6 else INK
                weight = "bold" if cell.usable else "normal"
                axes.text(
                    column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8.5, weight=weight
                )
        for column, batch in enumerate(grid.batches):
            for row, rate in enumerate(grid.rates):
                if not found[method, batch, rate].usable:
                    continue
                for (dc, dr), (xs, ys) in {
                    (-1, 0): ((column, column), (row, row + 1)),
                    (1, 0): ((column + 1, column + 1), (row, row + 1)),
                    (0, -1): ((column, column + 1), (row, row)),
                    (0, 1): ((column, column + 1), (row + 1, row + 1)),
                }.items():
                    c, r = column + dc, row + dr
                    inside = 0 <= c < len(grid.batches) and 0 <= r < len(grid.rates)
                    if not inside or not found[method, grid.batches[c], grid.rates[r]].usable:
                        axes.plot(xs, ys, color="#d9730d", linewidth=2.2, solid_capstyle="round", clip_on=False)
        axes.set_xlim(0, len(grid.batches))
        axes.set_ylim(0, len(grid.rates))
        axes.set_xticks([i + 0.5 for i in range(len(grid.batches))], [str(b) for b in grid.batches])
        axes.set_yticks([i + 0.5 for i in range(len(grid.rates))], [_rate(r) for r in grid.rates])
        axes.tick_params(length=0, colors=QUIET)
        for spine in axes.spines.values():
            spine.set_visible(False)
        count = sum(found[method, b, r].usable for b in grid.batches for r in grid.rates)
        axes.set_title(f"{method}\n{count} usable", fontsize=10.5, color=INK, fontweight="bold")
        axes.set_xlabel("batch size", color=QUIET)
    panels[0].set_ylabel("peak learning rate", color=QUIET)
    figure.supxlabel(
        f"Held-out accuracy in percent; outlined: every seed within {100 * MARGIN:.0f} points of the best of all; "
        "×: diverged" + ("; *: some seeds diverged" if len(grid.seeds) > 1 else ""),
        fontsize=9,
        color=QUIET,
    )
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")


def page(grid: Grid, runs: Sequence[Run], command: str) -> str:
    """The result as Markdown."""
    found = cells(runs)
    best = max(run.accuracy for run in runs)
    images = [len(part[0]) for part in digits()]
    return f"""# Stability over batch size and learning rate: the digits

{(__doc__ or "").split(chr(10) + chr(10), 2)[2].strip()}

- network: NF-ResNet, depths {CONFIG.depths}, widths {CONFIG.widths}, {parameter_count(CONFIG):,} parameters
- twin: the same convolutions, in a pre-activation ResNet
- data: {images[0]:,} digits of {SIDE} x {SIDE} pixels to learn from, {images[1]} held out, no augmentation
- grid: batches {", ".join(map(str, grid.batches))}; peak learning rates {_rate(grid.rates[0])} to
  {_rate(grid.rates[-1])}; seeds: {len(grid.seeds)}; {grid.epochs} epochs; {len(runs)} runs;
  weight decay {WEIGHT_DECAY:g}
- best held-out accuracy of all: {best:.1%}; usable is what reaches {best - MARGIN:.1%} with every seed
- on: {machine()}
- command: `{command}`

![heat map](stability-digits.png)

{reading(grid, found)}

{verdict(grid, found)}

{table(grid, found)}

Every run is a line of `stability-digits.jsonl`.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a grid and write `stability.jsonl`, `.png` and `.md`, of the digits `stability-digits.*`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.stability", allow_abbrev=False)
    parser.add_argument(
        "--data",
        default=DIGITS,
        metavar="DATA",
        help="digits (default), fashion-mnist, a folder of IDX files, or an .npz of x_train, y_train, x_test, y_test",
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default) or cuda, where all data lie")
    parser.add_argument("--full", action="store_true", help="the whole grid (of digits: ten minutes of one core)")
    parser.add_argument("--output", type=Path, default=Path("runs/stability"), metavar="FOLDER")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="batch sizes instead of the grid's own")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds instead of the grid's own")
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs instead of the grid's own")
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # runs that die out would be slow, too
    try:
        try:
            device = torch.device(options.device)
        except RuntimeError as error:
            raise ConfigError(f"--device must be cpu or cuda, not {options.device!r}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda needs a GPU, and torch finds none; leave it out")
        text = _digits(options, device) if options.data == DIGITS else _images(options, device)
    except NfzooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.claims.stability"]
    if options.data != DIGITS:
        shown = options.data if options.data == FASHION_MNIST else "FOLDER"
        words.append(f"--data {shown}")
    if options.device != "cpu":
        words.append(f"--device {options.device}")
    if options.full:
        words.append("--full")
    if options.batches:
        words.append("--batches " + " ".join(map(str, sorted(options.batches))))
    words += [f"--{name} {value}" for name in ("seeds", "epochs") if (value := getattr(options, name))]
    return " ".join([*words, f"--output {options.output}"])


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a grid or study that options replace."""
    given = {
        "batches": options.batches and tuple(sorted(options.batches)),
        "seeds": options.seeds and tuple(range(options.seeds)),
        "epochs": options.epochs,
    }
    return {name: value for name, value in given.items() if value}


def _digits(options: argparse.Namespace, device: torch.device) -> str:
    grid = (FULL if options.full else QUICK)._replace(**_changes(options))
    stem = options.output / "stability-digits"
    runs = run_grid(grid, stem.with_suffix(".jsonl"), data=digits().to(device))
    draw(grid, cells(runs), stem.with_suffix(".png"))
    with replaced(stem.with_suffix(".md")) as scratch:
        scratch.write_text(page(grid, runs, _command(options)), encoding="utf-8")
    found = cells(runs)
    return f"\n{verdict(grid, found)}\n\n{reading(grid, found)}\n\nwrote {stem}.md, .png, .jsonl"


def _images(options: argparse.Namespace, device: torch.device) -> str:
    whole = batch_scaling.FULL if device.type == "cuda" else batch_scaling.CPU
    study = (whole if options.full else batch_scaling.QUICK)._replace(**_changes(options))
    data = batch_scaling.read_data(options.data).to(device)
    output: Path = options.output
    results = batch_scaling.run_study(study, output / "stability.jsonl", data=data)
    return batch_scaling_page.write(
        study, results, output, command=_command(options), images=(len(data.train[0]), len(data.held_out[0]))
    )


if __name__ == "__main__":
    sys.exit(main())
