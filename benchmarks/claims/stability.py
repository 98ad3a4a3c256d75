"""Which learning rates train at which batch sizes: no clipping, global-norm clipping, AGC, and batch normalisation.

    python -m benchmarks.claims.stability                                       # a few cells, about a minute
    python -m benchmarks.claims.stability --full --output benchmarks/results    # the whole grid

A small NF-ResNet and its batch-normalised twin learn the embedded digits. As in figure 2 of arXiv 2102.06171 every run
has the same number of epochs, so that a batch four times as large takes a quarter of the steps; Nesterov momentum 0.9,
warm-up over 5/90 of the steps, then half a cosine to 0. For one seed, all runs start from the same weights and see the
images in the same order. The runs of one method and batch size are trained together, vectorised over learning rates.

*AGC x* clips with threshold x all parameters but the classifier's weight and the skip gains; *AGC x, all* clips the
skip gains as well, as the paper does. A skip gain starts at 0, where AGC allows a gradient of x / 1000 only. The
paper's runs have a hundred thousand steps in which it can grow, these have some 70 to 300, and with it clipped the
branches stay nearly shut at low learning rates.

A cell of the grid is *usable* if every seed ends within 5 points of the best held-out accuracy in the whole grid. A run
*diverged* if its loss or its final logits are not finite. The lowest learning rate of the grid cuts off what might be
usable below it, without clipping above all. Finished parts are kept in `stability.jsonl`: after an
interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claims import batch_norm_twin
from benchmarks.report import machine
from nfzoo.analysis.style import INK, PAPER, QUIET
from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import NFResNetConfig
from nfzoo.data.digits import DIGITS, Digits
from nfzoo.data.source import open_split
from nfzoo.model import apply, init, parameter_count, specs
from nfzoo.optim.clipping import agc
from nfzoo.optim.sgd import CLIPPED, DECAYED, SGDState, sgd, warmup_cosine
from nfzoo.step import cross_entropy
from nfzoo.types import Params

CONFIG = NFResNetConfig(depths=(2, 2, 2, 2), widths=(16, 32, 64, 64), stem_width=8, num_classes=10, in_channels=1)
SIDE = 16  # pixels, twice the digits' own
MARGIN = 0.05
WEIGHT_DECAY = 2e-5  # arXiv 2102.06171
_KINDS = {name: kind for name, (_, kind) in specs(CONFIG).items()}


# ---------------------------------------------------------------- what is compared


def global_norm(grads: Mapping[str, Tensor], limit: float) -> Params:
    """All gradients times `min(1, limit / norm)`, `norm` that of all of them together."""
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    factor = (limit / norm.clamp(min=1e-6)).clamp(max=1)
    return {name: g * factor for name, g in grads.items()}


def _agc(clip: float, *, spare: tuple[str, ...] = ("skip_gain",)) -> Callable[[Params, Params], Params]:
    kinds = CLIPPED - set(spare)
    return lambda grads, params: agc(grads, params, clip=clip, where=lambda name: _KINDS[name] in kinds)


def _global(limit: float) -> Callable[[Params, Params], Params]:
    return lambda grads, params: global_norm(grads, limit)


TWIN = "batch norm"
METHODS: dict[str, Callable[[Params, Params], Params]] = {
    "no clipping": lambda grads, params: grads,
    "global norm 1": _global(1.0),
    "global norm 0.1": _global(0.1),
    "AGC 0.16": _agc(0.16),
    "AGC 0.04": _agc(0.04),
    "AGC 0.01": _agc(0.01),
    "AGC 0.16, all": _agc(0.16, spare=()),
    TWIN: lambda grads, params: grads,
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


class Data(NamedTuple):
    """Images `(N, 1, SIDE, SIDE)`, standardised by the training images, and labels `(N,)`."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


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


class Fitted(NamedTuple):
    """Runs that were trained together: stacked parameters and running statistics of those that did not diverge.

    `alive` says which learning rates these belong to; `diverged_at` has the step of each of the others.
    """

    params: Params
    running: Params
    alive: list[int]
    diverged_at: dict[int, int]


def fit(method: str, batch: int, rates: Sequence[float], *, seed: int, epochs: int, data: Data) -> Fitted:
    """Train once for each learning rate, all at the same time; runs that diverge leave the stack."""
    images, labels = data.train
    twin, clip = method == TWIN, METHODS[method]
    generator = torch.Generator().manual_seed(seed)
    first = batch_norm_twin.init(CONFIG, generator=generator) if twin else init(CONFIG, generator=generator)
    order = torch.Generator().manual_seed(seed + 1)
    indices = torch.cat([torch.randperm(len(images), generator=order) for _ in range(epochs)])
    steps = len(indices) // batch  # batches run across the borders of epochs: no image is left out

    def loss_fn(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
        logits, statistics = batch_norm_twin.apply(CONFIG, params, x) if twin else (apply(CONFIG, params, x), {})
        return cross_entropy(logits, y), statistics

    def step(
        params: Params, momentum: Params, running: Params, x: Tensor, y: Tensor, lr: Tensor
    ) -> tuple[Params, Params, Params, Tensor]:
        grads, (loss, statistics) = torch.func.grad_and_value(loss_fn, has_aux=True)(params, x, y)
        new, state = sgd(
            params,
            clip(grads, params),
            SGDState(momentum),
            lr=lr,
            weight_decay=WEIGHT_DECAY,
            decay=lambda name: _KINDS.get(name) in DECAYED,
        )
        return new, state.momentum, batch_norm_twin.update(running, statistics) if twin else running, loss

    params = _stack(first, len(rates))
    momentum = {name: torch.zeros_like(p) for name, p in params.items()}
    running = _stack(batch_norm_twin.init_statistics(CONFIG), len(rates)) if twin else {}
    alive = torch.arange(len(rates))
    peaks = torch.tensor(rates)
    diverged: dict[int, int] = {}
    take = torch.func.vmap(step, in_dims=(0, 0, 0, None, None, 0))
    for i in range(steps):
        part = indices[i * batch : (i + 1) * batch]
        factor = warmup_cosine(i, peak=1.0, warmup=max(1, round(steps * 5 / 90)), total=steps)
        params, momentum, running, loss = take(
            params, momentum, running, images[part], labels[part], peaks[alive] * factor
        )
        fine = loss.isfinite()
        if not fine.all():
            diverged.update(dict.fromkeys(alive[~fine].tolist(), i))
            alive = alive[fine]
            params, momentum, running = ({k: v[fine] for k, v in t.items()} for t in (params, momentum, running))
            if not len(alive):
                break
    return Fitted(params, running, alive.tolist(), diverged)


def logits(method: str, params: Mapping[str, Tensor], running: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Evaluation mode of one run."""
    return batch_norm_twin.apply(CONFIG, params, x, running)[0] if method == TWIN else apply(CONFIG, params, x)


def train(method: str, batch: int, rates: Sequence[float], *, seed: int, epochs: int, data: Data) -> list[Run]:
    """How one run for each learning rate ends."""
    found = fit(method, batch, rates, seed=seed, epochs=epochs, data=data)
    x, y = data.held_out
    ended = {
        row: Run(method, batch, rates[row], seed, epochs, 0.0, math.inf, at) for row, at in found.diverged_at.items()
    }
    for place, row in enumerate(found.alive):
        params, running = ({k: v[place] for k, v in tree.items()} for tree in (found.params, found.running))
        with torch.no_grad():
            z = logits(method, params, running, x)
        if z.isfinite().all():
            accuracy, loss = float((z.argmax(1) == y).float().mean()), float(cross_entropy(z, y))
            ended[row] = Run(method, batch, rates[row], seed, epochs, accuracy, loss, None)
        else:
            at = epochs * len(data.train[0]) // batch
            ended[row] = Run(method, batch, rates[row], seed, epochs, 0.0, math.inf, at)
    return [ended[row] for row in range(len(rates))]


def _stack(tree: Mapping[str, Tensor], copies: int) -> Params:
    return {name: value.expand(copies, *value.shape).clone() for name, value in tree.items()}


# ---------------------------------------------------------------- the grid


def run_grid(grid: Grid, store: Path, *, data: Data) -> list[Run]:
    """All runs of the grid; those that `store` has are not run again. Whole seeds come first."""
    done = load(store)
    for seed in grid.seeds:
        for batch in reversed(grid.batches):  # the quickest first
            for method in grid.methods:
                missing = [r for r in grid.rates if (method, batch, r, seed, grid.epochs) not in done]
                if not missing:
                    continue
                start = time.perf_counter()
                for run in train(method, batch, missing, seed=seed, epochs=grid.epochs, data=data):
                    done[run[:5]] = run
                save(done.values(), store)
                print(f"seed {seed}, batch {batch}, {method}: {time.perf_counter() - start:.0f} s", flush=True)
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
    return f"""# Stability over batch size and learning rate

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

![heat map](stability.png)

{reading(grid, found)}

{verdict(grid, found)}

{table(grid, found)}

Every run is a line of `stability.jsonl`.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a grid and write `stability.jsonl`, `stability.png` and `stability.md`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.stability", allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="the whole grid (half an hour of one core)")
    parser.add_argument("--output", type=Path, default=Path("runs/stability"), metavar="FOLDER")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="batch sizes instead of the grid's own")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: 1)")
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # runs that die out would be slow, too
    grid = FULL if options.full else QUICK
    command = "python -m benchmarks.claims.stability" + (" --full" if options.full else "")
    if options.batches:
        grid = grid._replace(batches=tuple(sorted(options.batches)))
        command += " --batches " + " ".join(map(str, grid.batches))
    if options.seeds:
        grid = grid._replace(seeds=tuple(range(options.seeds)))
        command += f" --seeds {options.seeds}"
    command += f" --output {options.output}"
    runs = run_grid(grid, options.output / "stability.jsonl", data=digits())
    draw(grid, cells(runs), options.output / "stability.png")
    with replaced(options.output / "stability.md") as scratch:
        scratch.write_text(page(grid, runs, command), encoding="utf-8")
    found = cells(runs)
    print(f"\n{verdict(grid, found)}\n\n{reading(grid, found)}\n\nwrote {options.output}/stability.md, .png, .jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
