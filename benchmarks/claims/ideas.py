"""The plots of docs/ideas: what batch norm couples, and what the parts of an NF-network do in its place.

    python -m benchmarks.claims.ideas --output docs/ideas     # a quarter of a minute of one core

Everything is computed on the spot, at initialisation or after a few steps on the digits, but for the accuracies of the
last plot, which are those of `benchmarks/results/stability-digits.jsonl`.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.claims import batch_norm_twin
from benchmarks.claims.independence import Network, distance
from benchmarks.claims.stability import CONFIG, Run, digits, load
from benchmarks.claims.stacked_runs import Data
from nfzoo.analysis.figures import dress, new_figure
from nfzoo.analysis.signal_propagation import open_branches, signal_metrics
from nfzoo.analysis.style import BLUE, INK, ORANGE, QUIET
from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import NFResNetConfig
from nfzoo.model import apply, block_params, init, plan, specs
from nfzoo.models.functional import GAMMA, standardize_weight
from nfzoo.optim.clipping import unitwise_norm
from nfzoo.step import StepConfig, cross_entropy, init_state, train_step
from nfzoo.types import Params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STABILITY = Path(__file__).resolve().parents[1] / "results" / "stability-digits.jsonl"
SIZES = (4, 8, 16, 32, 64, 128)  # of batches
EXAMPLES = 15
PARTS = (1, 2, 4, 8)  # of the largest
GROWTH = GAMMA["relu"] ** 2 / 2  # of the second moment, by a scaled ReLU and a kernel whose rows have a mean


def _save(figure: Figure, output: Path) -> None:
    """Write a figure to a PNG of 64 colours, which takes half the bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with replaced(output) as scratch:
        Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
            scratch, format="PNG", optimize=True
        )


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- batch norm


class Coupling(NamedTuple):
    """Relative distances of one network: by batch size (see `SIZES`), and by number of parts (see `PARTS`)."""

    mates: list[float]
    parts: list[float]


def untrained() -> dict[str, Network]:
    """An NF-ResNet with its branches open, and its batch-normalised twin, both at initialisation."""
    twin = batch_norm_twin.init(CONFIG, generator=_seeded(0))
    full = open_branches(CONFIG, init(CONFIG, generator=_seeded(0)))
    return {
        "batch norm": Network(twin, *2 * [lambda p, x: batch_norm_twin.apply(CONFIG, p, x)[0]]),
        "NF-ResNet": Network(full, *2 * [lambda p, x: apply(CONFIG, p, x)]),
    }


def coupling(network: Network, data: Data) -> Coupling:
    """Return how far an image's logits depend on its batch mates, and a batch's gradient on its division."""
    images, labels = data.held_out
    mates = []
    for size in SIZES:
        changes = []
        for i in range(EXAMPLES):
            image, rest = images[i : i + 1], images[EXAMPLES:]
            batches = [torch.cat([image, rest[k * (size - 1) : (k + 1) * (size - 1)]]) for k in range(2)]
            with torch.no_grad():
                a, b = (network.train(network.params, batch)[0] for batch in batches)
            changes.append(distance([a], [b]))
        mates.append(statistics.median(changes))
    gradient = torch.func.grad(lambda p, x, y: cross_entropy(network.train(p, x), y))
    x, y = images[: max(SIZES)], labels[: max(SIZES)]
    whole = gradient(network.params, x, y)
    parts = []
    for count in PARTS:
        each = [gradient(network.params, *part) for part in zip(x.chunk(count), y.chunk(count), strict=True)]
        parts.append(distance([torch.stack([g[key] for g in each]).mean(0) for key in whole], whole.values()))
    return Coupling(mates, parts)


def draw_coupling(found: Mapping[str, Coupling], output: Path) -> None:
    figure = new_figure(10, 3.6)
    panels = figure.subplots(1, 2)
    for name, colour in (("batch norm", ORANGE), ("NF-ResNet", BLUE)):
        for axes, x, y in zip(panels, (SIZES, PARTS), found[name], strict=True):
            axes.plot(x, [100 * value for value in y], "o-", color=colour, label=name, linewidth=1.8, markersize=5)
    for axes, ticks, title, label in (
        (panels[0], SIZES, "Logits of one image, other batch mates", "batch size"),
        (panels[1], PARTS, f"Gradient of {max(SIZES)} images, computed in parts", "number of parts"),
    ):
        dress(axes, title, label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylabel("relative change (%)", color=QUIET)
    panels[0].legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="upper right")
    _save(figure, output)


# ---------------------------------------------------------------- weight standardisation


def moments(standardised: bool, *, layers: int = 20, channels: int = 128, seed: int = 0) -> list[tuple[float, float]]:
    """Squared channel mean and channel variance, averaged over channels, after each layer of a plain ReLU network."""
    generator = _seeded(seed)
    x = torch.randn(8, channels, 12, 12, generator=generator)
    found = []
    for _ in range(layers):
        w = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        if standardised:
            w = standardize_weight(w, torch.ones(channels))
        x = F.conv2d(F.pad(GAMMA["relu"] * x.relu(), (1, 1, 1, 1), mode="circular"), w)
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        found.append((float(mean.square().mean()), float(var.mean())))
    return found


def draw_moments(plain: Sequence[tuple[float, float]], standard: Sequence[tuple[float, float]], output: Path) -> None:
    figure = new_figure(10, 3.6)
    depth = range(1, len(plain) + 1)
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("Squared channel mean", "Channel variance"), strict=True
    ):
        for rows, name, colour in ((plain, "as drawn", ORANGE), (standard, "standardised", BLUE)):
            axes.plot(depth, [row[column] for row in rows], "o-", color=colour, label=name, linewidth=1.8, markersize=4)
        if column == 0:
            law = [GROWTH**layer for layer in depth]
            axes.plot(depth, law, color=QUIET, linestyle=(0, (4, 2)), linewidth=1.3, label=f"{GROWTH:.3f} to the depth")
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center right")
        axes.set_yscale("log")
        dress(axes, title, "layers passed")
        axes.set_ylabel("average over channels", color=QUIET)
    _save(figure, output)


# ---------------------------------------------------------------- alpha and beta


def tower(alpha: float, *, widths: tuple[int, ...] = (256, 512, 1024, 2048)) -> tuple[NFResNetConfig, Params, Tensor]:
    """An NF-ResNet-50 with its branches open, and noise of 96 pixels."""
    cfg = NFResNetConfig(depths=(3, 4, 6, 3), widths=widths, alpha=alpha)
    params = open_branches(cfg, init(cfg, generator=_seeded(0)))
    return cfg, params, torch.randn(4, 3, 96, 96, generator=_seeded(1))


def without_beta(cfg: NFResNetConfig, params: Params, x: Tensor) -> list[float]:
    """The channel variances after each residual block, had every block a beta of 1."""
    found = []
    with torch.no_grad():
        for block in plan(cfg):
            if found and block.branches is None:
                break
            x = block.fn(block_params(block, params), x, 1.0, None)
            if block.branches is not None:
                found.append(float(x.var(dim=(0, 2, 3), correction=0).mean()))
    return found


def draw_streams(output: Path) -> None:
    figure = new_figure(10, 3.6)
    for axes, alpha in zip(figure.subplots(1, 2), (0.2, 1.0), strict=True):
        network = tower(alpha)
        rows = signal_metrics(*network)[1:]
        depth = range(1, len(rows) + 1)
        axes.plot(depth, without_beta(*network), "o-", color=ORANGE, label="every beta 1", linewidth=1.8, markersize=4)
        axes.plot(
            depth, [float(m.avg_var) for m in rows], "o-", color=BLUE, label="measured", linewidth=1.8, markersize=4
        )
        expected = [float(m.expected_var or 0) for m in rows]
        axes.plot(
            depth, expected, color=QUIET, linestyle=(0, (4, 2)), linewidth=1.3, label="assumed by the next block's beta"
        )
        dress(axes, f"Variance of the stream, alpha = {alpha:g}", "residual blocks passed")
        if alpha == 1:
            axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
    _save(figure, output)


# ---------------------------------------------------------------- AGC


def gradient_ratios(data: Data, *, steps: int = 44, batch: int = 64, lr: float = 0.03) -> dict[str, list[float]]:
    """Gradient norm over weight norm of every output unit, by kernel, in the step after `steps` unclipped ones."""
    images, labels = data.train
    state = init_state(init(CONFIG, generator=_seeded(0)), StepConfig(clip=None, ema_decay=None))
    config = StepConfig(clip=None, ema_decay=None)
    for i in range(steps):
        part = torch.arange(i * batch, (i + 1) * batch) % len(images)
        state, _ = train_step(CONFIG, state, (images[part], labels[part]), None, lr, config=config)
    x, y = data.held_out[0][:batch], data.held_out[1][:batch]
    grads = torch.func.grad(lambda p: cross_entropy(apply(CONFIG, p, x), y))(state.params)
    return {
        name: (unitwise_norm(grads[name]) / unitwise_norm(state.params[name]).clamp(min=1e-3)).flatten().tolist()
        for name, (_, kind) in specs(CONFIG).items()
        if kind == "weight"
    }


def draw_clipping(ratios: Mapping[str, Sequence[float]], runs: Sequence[Run], output: Path, *, clip: float) -> None:
    figure = new_figure(10, 3.8)
    units, rates = figure.subplots(1, 2)
    for layer, values in enumerate(ratios.values(), start=1):
        for above, colour in ((False, BLUE), (True, ORANGE)):
            some = [value for value in values if (value > clip) == above]
            units.plot([layer] * len(some), some, "o", color=colour, markersize=3, alpha=0.6, markeredgewidth=0)
    units.axhline(clip, color=QUIET, linestyle=(0, (4, 2)), linewidth=1.3)
    dress(units, "Gradient norm / weight norm of each unit", f"convolution; dashed: threshold {clip:g}")
    units.set_yscale("log")
    units.set_ylim(bottom=1e-5)
    for method, colour, style in (
        ("no clipping", QUIET, ":"),
        ("global norm 1", ORANGE, "-"),
        (f"AGC {clip:g}", BLUE, "-"),
        ("batch norm", INK, "--"),
    ):
        own = [run for run in runs if run.method == method]
        points = [(run.rate, 100 * run.accuracy) for run in own]
        rates.plot(*zip(*points, strict=True), style, color=colour, label=method, linewidth=1.8)
        fine = [(run.rate, 100 * run.accuracy) for run in own if run.diverged_at is None]
        dead = [(run.rate, 0.0) for run in own if run.diverged_at is not None]
        for marker, some in (("o", fine), ("x", dead)):
            if some:
                rates.plot(*zip(*some, strict=True), marker, color=colour, markersize=5)
    dress(rates, f"Held-out accuracy (%), batches of {runs[0].batch}", "peak learning rate; x: diverged")
    rates.set_xscale("log", base=2)
    ticks = sorted({run.rate for run in runs})
    rates.set_xticks(ticks, [f"1/{round(1 / rate)}" if rate < 1 else f"{rate:g}" for rate in ticks])
    rates.minorticks_off()
    rates.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.45, 0.07))
    _save(figure, output)


def main(argv: list[str] | None = None) -> int:
    """Write the four plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.ideas", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/ideas"), metavar="FOLDER")
    folder = parser.parse_args(argv).output
    data = digits()
    draw_coupling(
        {name: coupling(network, data) for name, network in untrained().items()}, folder / "why-no-normalizer.png"
    )
    draw_moments(moments(False), moments(True), folder / "weight-standardization.png")
    draw_streams(folder / "alpha-and-beta.png")
    runs = [run for run in load(STABILITY).values() if run.batch == 256]
    draw_clipping(gradient_ratios(data), runs, folder / "agc.png", clip=0.04)
    print(f"wrote four plots to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
