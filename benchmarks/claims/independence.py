"""Does an example's result depend on the examples beside it, and is training the function that is evaluated?

    python -m benchmarks.claims.independence --output benchmarks/results     # about a minute

An NF-ResNet and its batch-normalised twin, both trained on the digits for a few epochs, see digits held out. Measured:

- *mates*: the change of one example's logits, and of the gradient of its own loss, when its batch mates are exchanged,
  the median over examples;
- *halves*: the distance of a batch's gradient from the mean of the gradients of its halves, which is what gradient
  accumulation and data parallelism compute;
- *mode*: the distance of the logits in training mode from those in evaluation mode. The twin evaluates with the
  statistics of all training images. The NF-network is without noise here: with stochastic depth and dropout, training
  is another function by design.

Each is a relative L2 distance, `|a - b| / |b|`, computed in float32, where rounding alone gives up to some 1e-6.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claims import batch_norm_twin
from benchmarks.claims.stability import CONFIG, TWIN, digits, fit
from benchmarks.claims.stacked_runs import Data
from benchmarks.report import machine
from nfzoo.analysis.style import BLUE, INK, ORANGE, PAPER, QUIET, RULE
from nfzoo.checkpoint.atomic import replaced
from nfzoo.model import apply
from nfzoo.types import Params

BATCHES = (4, 16, 64, 128)
EXAMPLES = 9
EPOCHS = 6

Forward: TypeAlias = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class Network(NamedTuple):
    """Logits in training mode and in evaluation mode, and parameters."""

    params: Params
    train: Forward
    evaluate: Forward


class Row(NamedTuple):
    """Relative distances at one batch size."""

    network: str
    batch: int
    mates_logits: float
    mates_gradient: float
    halves_gradient: float
    mode: float


def networks(data: Data, *, epochs: int = EPOCHS) -> dict[str, Network]:
    """Both networks, trained at a batch of 64: at an NF-network's start its branches are silent."""
    found = {}
    for name, method, rate in (("NF-ResNet", "AGC 0.04", 0.25), ("batch norm", TWIN, 0.25)):
        fitted = fit(method, 64, [rate], seed=0, epochs=epochs, data=data)
        params = {key: value[0] for key, value in fitted.params.items()}
        if method == TWIN:
            with torch.no_grad():
                full = batch_norm_twin.apply(CONFIG, params, data.train[0])[1]
            found[name] = Network(
                params,
                lambda p, x: batch_norm_twin.apply(CONFIG, p, x)[0],
                lambda p, x, s=full: batch_norm_twin.apply(CONFIG, p, x, s)[0],
            )
        else:
            found[name] = Network(params, lambda p, x: apply(CONFIG, p, x), lambda p, x: apply(CONFIG, p, x))
    return found


def measure(name: str, net: Network, batch: int, data: Data, *, examples: int = EXAMPLES) -> Row:
    """All distances at one batch size."""
    images, labels = data.held_out

    def own_loss(params: Params, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(net.train(params, x)[:1], label)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net.train(params, x), y)

    gradient, own = torch.func.grad(loss), torch.func.grad(own_loss)
    by_logits, by_gradient = [], []
    for i in range(examples):
        mates = [images[examples + k * (batch - 1) : examples + (k + 1) * (batch - 1)] for k in range(2)]
        a, b = (torch.cat([images[i : i + 1], m]) for m in mates)
        with torch.no_grad():
            by_logits.append(distance([net.train(net.params, a)[0]], [net.train(net.params, b)[0]]))
        y = labels[i : i + 1]
        by_gradient.append(distance(own(net.params, a, y).values(), own(net.params, b, y).values()))
    x, y = images[:batch], labels[:batch]
    whole = gradient(net.params, x, y)
    halves = [gradient(net.params, x[part], y[part]) for part in (slice(batch // 2), slice(batch // 2, None))]
    with torch.no_grad():
        return Row(
            name,
            batch,
            mates_logits=statistics.median(by_logits),
            mates_gradient=statistics.median(by_gradient),
            halves_gradient=distance([(halves[0][k] + halves[1][k]) / 2 for k in whole], whole.values()),
            mode=distance([net.train(net.params, x)], [net.evaluate(net.params, x)]),
        )


def distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """`|a - b| / |b|` over all tensors together."""
    x, y = (torch.cat([t.flatten() for t in tensors]).double() for tensors in (a, b))
    return float((x - y).norm() / y.norm())


_COLUMNS = (
    ("mates_logits", "one example's logits,\nother batch mates"),
    ("mates_gradient", "one example's gradient,\nother batch mates"),
    ("halves_gradient", "mean of two halves' gradients,\nagainst the batch's"),
    ("mode", "training mode,\nagainst evaluation mode"),
)
FLOOR = 1e-9  # where a distance of exactly 0 is drawn


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| network | batch | logits, other mates | gradient, other mates | gradient from halves | train against eval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        figures = " | ".join("0" if v == 0 else f"{v:.1e}" for v in row[2:])
        lines.append(f"| {row.network} | {row.batch} | {figures} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], output: Path) -> None:
    """Four panels of distances over the batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), dpi=144, layout="constrained", facecolor=PAPER)
    for axes, (field, title) in zip(figure.subplots(1, 4, sharey=True), _COLUMNS, strict=True):
        for network, colour in (("batch norm", ORANGE), ("NF-ResNet", BLUE)):
            own = [row for row in rows if row.network == network]
            values = [max(getattr(row, field), FLOOR) for row in own]
            axes.plot(
                [row.batch for row in own], values, "o-", color=colour, label=network, linewidth=1.8, markersize=5
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(FLOOR / 2, 20)
        axes.set_xticks([row.batch for row in own], [str(row.batch) for row in own])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
        axes.set_xlabel("batch size", color=QUIET)
        axes.axhspan(FLOOR / 2, 3e-6, color=RULE, alpha=0.45, linewidth=0)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.tick_params(length=0, colors=QUIET)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        if field == "mates_logits":
            axes.set_ylabel("relative distance", color=QUIET)
            axes.text(BATCHES[0] * 1.05, 1e-8, "float32 rounding", fontsize=9, color=QUIET)
            axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="center right")
        if all(getattr(row, field) == 0 for row in own):  # `own` is the NF-ResNet's, the last drawn
            axes.text(BATCHES[0] * 1.05, 1.6e-9, "exactly 0", fontsize=9, color=BLUE)
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")


def page(rows: Sequence[Row], command: str) -> str:
    return f"""# Independence of batch mates, and one function for training and evaluation

{(__doc__ or "").split(chr(10) + chr(10), 2)[2].strip()}

- networks: depths {CONFIG.depths}, widths {CONFIG.widths}, trained for {EPOCHS} epochs at a batch of 64
- on: {machine()}
- command: `{command}`

![distances](independence.png)

{table(rows)}
"""


def main(argv: list[str] | None = None) -> int:
    """Write `independence.png` and `independence.md`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.independence", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/independence"), metavar="FOLDER")
    options = parser.parse_args(argv)
    data = digits()
    rows = [measure(name, net, batch, data) for name, net in networks(data).items() for batch in BATCHES]
    draw(rows, options.output / "independence.png")
    with replaced(options.output / "independence.md") as scratch:
        scratch.write_text(
            page(rows, f"python -m benchmarks.claims.independence --output {options.output}"), encoding="utf-8"
        )
    print(table(rows) + f"\n\nwrote {options.output}/independence.md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
