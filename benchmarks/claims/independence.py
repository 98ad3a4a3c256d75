"""Does an example's result depend on the examples beside it, and is training the function that is evaluated?

    python -m benchmarks.claims.independence     # the digits, one seed, without *processes* and *training*: a minute
    python -m benchmarks.claims.independence --data fashion-mnist --full --output benchmarks/results    # 6 minutes

An NF-ResNet and its batch-normalised twin, both trained for a few epochs, see images held out. Measured:

- *mates*: the change of one example's logits, and of the gradient of its own loss, when its batch mates are exchanged,
  the median over examples;
- *halves*: the distance of a batch's gradient from the mean of the gradients of its halves, which is what gradient
  accumulation and data parallelism compute;
- *mode*: the distance of the logits in training mode from those in evaluation mode. The twin evaluates with the
  statistics of all training images. The NF-network is without noise here: with stochastic depth and dropout, training
  is another function by design.

Each is a relative L2 distance, `|a - b| / |b|`, computed in float32, where rounding alone gives up to some 1e-6.

With `--full` there are three seeds, whose means and standard deviations are shown, and two tests more:

- *processes*: 20 steps at a batch of 64 from the start, in two processes that average their gradients, beside one
  process with the whole batches and one that accumulates the halves. The distance is that of the parameters' changes.
- *training*: the held-out accuracy after one epoch in batches of 2, 8 and 32, in evaluation mode, at the best of three
  rates. The NF-network has AGC at 0.04.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.claims import batch_norm_twin
from benchmarks.claims.photographs import described, photographs, spread
from benchmarks.claims.stability import CONFIG, TWIN, fit
from benchmarks.claims.stacked_runs import Data
from benchmarks.claims.together import Kind, Store, best_rate, clip_by, nf, tested, twin
from benchmarks.claims.together import fit as fit_together
from benchmarks.report import machine
from nfzoo.analysis.style import BLUE, INK, ORANGE, PAPER, QUIET, RULE
from nfzoo.checkpoint.atomic import replaced
from nfzoo.data.digits import DIGITS
from nfzoo.model import apply
from nfzoo.optim.sgd import SGDState, sgd
from nfzoo.train.run_folder import public_data
from nfzoo.types import Params

BATCHES = (2, 4, 16, 64, 128)
EXAMPLES = 9
EPOCHS = 6
IMAGES, HELD_OUT = 1500, 2000  # of photographs
SMALL_BATCHES = (2, 8, 32)
RATES = (0.01, 0.04, 0.16)
STEPS, PROCESS_BATCH, PROCESS_RATE = 20, 64, 0.1
KINDS: dict[str, Kind] = {"NF-ResNet": nf(clip_by(0.04)), "batch norm": twin()}

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def networks(data: Data, *, epochs: int = EPOCHS, seed: int = 0) -> dict[str, Network]:
    """Both networks, trained at a batch of 64: at an NF-network's start its branches are silent."""
    found = {}
    for name, method, rate in (("NF-ResNet", "AGC 0.04", 0.25), ("batch norm", TWIN, 0.25)):
        fitted = fit(method, 64, [rate], seed=seed, epochs=epochs, data=data)
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


def measure(name: str, net: Network, batch: int, data: Data, *, examples: int = EXAMPLES, seed: int = 0) -> Row:
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


# ---------------------------------------------------------------- two processes


def changes(
    name: str,
    seed: int,
    images: Tensor,
    labels: Tensor,
    *,
    shares: Sequence[int] = (0,),
    of: int = 1,
    average: Callable[[list[Params]], Params] | None = None,
) -> Tensor:
    """Return how the parameters change in some steps, `(numbers,)`.

    Args:
        shares: the parts of each batch, of `of` equal ones, whose mean gradients are computed here.
        average: their average, if not the mean of those that are computed here.
    """
    kind = KINDS[name]
    params, _ = kind.start(torch.Generator().manual_seed(seed))
    first = params
    momentum = {key: torch.zeros_like(p) for key, p in params.items()}
    for i in range(STEPS):
        x, y = (t[i * PROCESS_BATCH : (i + 1) * PROCESS_BATCH].chunk(of) for t in (images, labels))
        each = [gradient(name, params, x[share], y[share]) for share in shares]
        grads = average(each) if average else {key: torch.stack([g[key] for g in each]).mean(0) for key in params}
        if name != "batch norm":
            grads = clip_by(0.04)(grads, params)
        params, new = sgd(params, grads, SGDState(momentum), lr=PROCESS_RATE)
        momentum = new.momentum
    return torch.cat([(params[key] - first[key]).flatten() for key in params])


def gradient(name: str, params: Params, x: Tensor, y: Tensor) -> Params:
    """Return the gradient of the mean loss of some images in training mode."""

    def loss(params: Params) -> Tensor:
        logits = batch_norm_twin.apply(CONFIG, params, x)[0] if name == "batch norm" else apply(CONFIG, params, x)
        return F.cross_entropy(logits, y)

    return torch.func.grad(loss)(params)


def _process(rank: int, folder: str, name: str, seed: int, images: Tensor, labels: Tensor) -> None:
    """Take the steps as one of two processes; the first writes what came out."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def average(each: list[Params]) -> Params:
        for g in each[0].values():
            torch.distributed.all_reduce(g)
        return {key: g / 2 for key, g in each[0].items()}

    found = changes(name, seed, images, labels, shares=(rank,), of=2, average=average)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


def processes(name: str, seed: int, data: Data) -> dict[str, float]:
    """Return the distances of two processes from one with whole batches, and from one that accumulates halves."""
    order = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(seed))[: STEPS * PROCESS_BATCH]
    images, labels = (t[order] for t in data.train)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (folder, name, seed, images, labels), nprocs=2)
        two = torch.load(f"{folder}/found.pt", weights_only=True)
    whole = changes(name, seed, images, labels)
    halves = changes(name, seed, images, labels, shares=(0, 1), of=2)
    return {"one": distance([two], [whole]), "accumulated": distance([two], [halves])}


# ---------------------------------------------------------------- training


def trained(name: str, batch: int, seeds: Sequence[int], data: Data) -> list[dict[str, Any]]:
    """Return the held-out accuracy after an epoch, for each seed and rate."""
    found = fit_together(KINDS[name], data, seeds=seeds, rates=RATES, batch=batch, epochs=1)
    scores = tested(KINDS[name], found, data.held_out)
    return [
        {"seed": seed, "rate": rate, "accuracy": a} for (seed, rate), (a, _) in zip(found.runs, scores, strict=True)
    ]


_COLUMNS = (
    ("mates_logits", "one example's logits,\nother batch mates"),
    ("mates_gradient", "one example's gradient,\nother batch mates"),
    ("halves_gradient", "mean of two halves' gradients,\nagainst the batch's"),
    ("mode", "training mode,\nagainst evaluation mode"),
)
FLOOR = 1e-9  # where a distance of exactly 0 is drawn


def table(rows: Sequence[Row]) -> str:
    """Return the distances, means and deviations of the seeds where there are several."""
    lines = [
        "| network | batch | logits, other mates | gradient, other mates | gradient from halves | train against eval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for network, batch in dict.fromkeys((row.network, row.batch) for row in rows):
        own = [row for row in rows if (row.network, row.batch) == (network, batch)]
        cells = [figure([getattr(row, field) for row in own]) for field, _ in _COLUMNS]
        lines.append(f"| {network} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(values: list[float]) -> str:
    """Return the mean of the seeds and their standard deviation."""
    mean, std = spread(values)
    if len(values) == 1:
        return "0" if mean == 0 else f"{mean:.1e}"
    return "0" if mean == std == 0 else f"{mean:.1e} ± {std:.0e}"


def more(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of *processes* and *training*, as Markdown."""
    lines = [
        "## Two processes",
        "",
        "| network | two processes, against one | against one that accumulates |",
        "| --- | ---: | ---: |",
    ]
    for name in KINDS:
        own = [row for row in rows if row["test"] == "processes" and row["network"] == name]
        lines.append(f"| {name} | {' | '.join(figure([row[k] for row in own]) for k in ('one', 'accumulated'))} |")
    lines += [
        "",
        "## Training in small batches",
        "",
        "| network | batch | best rate | held-out accuracy, % | not diverged |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in KINDS:
        for batch in SMALL_BATCHES:
            own = [r for r in rows if r["test"] == "training" and (r["network"], r["batch"]) == (name, batch)]
            rate, best = best_rate(own)
            mean, std = spread([100 * row["accuracy"] for row in best])
            alive = sum(row["accuracy"] > 0 for row in own)
            lines.append(f"| {name} | {batch} | {rate:g} | {mean:.1f} ± {std:.1f} | {alive} of {len(own)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], output: Path, extra: Sequence[Mapping[str, Any]] = ()) -> None:
    """Draw panels of distances over the batch size, and the accuracies of trainings if there are any."""
    from matplotlib.figure import Figure

    columns = 5 if extra else 4
    figure = Figure(figsize=(3.25 * columns, 3.6), dpi=144, layout="constrained", facecolor=PAPER)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    colours = {"batch norm": ORANGE, "NF-ResNet": BLUE}
    for i, (field, title) in enumerate(_COLUMNS):
        axes = panels[i]
        values: list[list[float]] = []
        for network, colour in colours.items():
            values = [
                [getattr(row, field) for row in rows if (row.network, row.batch) == (network, batch)]
                for batch in BATCHES
            ]
            points = [spread(v) for v in values]
            axes.errorbar(
                BATCHES,
                [max(mean, FLOOR) for mean, _ in points],
                [std for _, std in points],
                fmt="o-",
                capsize=3,
                color=colour,
                label=network,
                linewidth=1.8,
                markersize=5,
            )
        axes.set_yscale("log")
        axes.set_ylim(FLOOR / 2, 20)
        axes.axhspan(FLOOR / 2, 3e-6, color=RULE, alpha=0.45, linewidth=0)
        _dress(axes, title, BATCHES)
        if i == 0:
            axes.set_ylabel("relative distance", color=QUIET)
            axes.text(BATCHES[0] * 1.05, 1e-8, "float32 rounding", fontsize=9, color=QUIET)
            axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="center right")
        if not any(map(any, values)):  # those of the NF-ResNet, the last drawn
            axes.text(BATCHES[0] * 1.05, 1.6e-9, "exactly 0", fontsize=9, color=BLUE)
    if extra:
        axes = panels[4]
        for network, colour in colours.items():
            points = []
            for batch in SMALL_BATCHES:
                own = [r for r in extra if r["test"] == "training" and (r["network"], r["batch"]) == (network, batch)]
                points.append(spread([100 * row["accuracy"] for row in best_rate(own)[1]]))
            means, stds = zip(*points, strict=True)
            axes.errorbar(SMALL_BATCHES, means, stds, fmt="o-", capsize=3, color=colour, linewidth=1.8, markersize=5)
        _dress(axes, "held-out accuracy (%),\ntrained in such batches", SMALL_BATCHES)
    with replaced(output) as scratch:
        figure.savefig(scratch, format="png")


def _dress(axes: Axes, title: str, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel("batch size", color=QUIET)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(length=0, colors=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def page(
    rows: Sequence[Row], command: str, data: Data, source: str = DIGITS, extra: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return the result as Markdown."""
    seeds = sum((row.network, row.batch) == (rows[0].network, rows[0].batch) for row in rows)
    text = f"""# Independence of batch mates, and one function for training and evaluation

{(__doc__ or "").split(chr(10) + chr(10), 2)[2].strip()}

- networks: depths {CONFIG.depths}, widths {CONFIG.widths}, trained for {EPOCHS} epochs at a batch of 64;
  {seeds} seed(s)
- data: {described(data, source)}
- on: {machine()}
- command: `{command}`

![distances](independence.png)

{READING if extra else ""}

{table(rows)}
"""
    return f"{text}\n{more(extra)}\n\nEvery figure is in `independence.jsonl`.\n" if extra else text


# Written after the run of 2026-11-28; another run's figures need another reading.
READING = """**The NF-ResNet computes each image by itself, and the same in both modes. Its twin does not, at any
batch size.** Other batch mates change no bit of an image's logits and gradient in the NF-ResNet. In the twin they
change the logits by as much as their own norm in batches of 2, and by 9 % in batches of 128. Its two modes differ by
112 % in batches of 2, and by 10 % in batches of 128.

Two processes take the NF-ResNet's parameters where one process takes them, but for rounding. The twin's change
differs by 120 %, though both of its runs see the same images in the same order. Two processes always equal one
process that accumulates halves, to the last bit: what differs is the function of the batch, not the sum over
processes.

Trained in batches of 2, the NF-ResNet reaches 64.4 %, and the twin 21.6 %, which is evaluated by its running
statistics. At 8 and 32 the difference is within the spread of the seeds. An epoch has 750, 187 and 46 steps."""


def run(data: Data, seeds: Sequence[int], store: Store, *, full: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the distances of all seeds, and with `full` the rows of *processes* and *training*."""

    def distances(seed: int) -> list[dict[str, Any]]:
        trained_networks = networks(data, seed=seed).items()
        return [measure(name, net, b, data)._asdict() for name, net in trained_networks for b in BATCHES]

    found = [row for s in seeds for row in store.get({"test": "distances", "seed": s}, lambda s=s: distances(s))]
    rows = [Row(**{name: row[name] for name in Row._fields}) for row in found]
    rows.sort(key=lambda row: (row.network, row.batch))
    extra: list[dict[str, Any]] = []
    for name in KINDS if full else ():
        for seed in seeds:
            key = {"test": "processes", "network": name, "seed": seed}
            extra += store.get(key, lambda n=name, s=seed: [processes(n, s, data)])
        for batch in reversed(SMALL_BATCHES):
            key = {"test": "training", "network": name, "batch": batch}
            extra += store.get(key, lambda n=name, b=batch: trained(n, b, seeds, data))
    return rows, extra


def main(argv: list[str] | None = None) -> int:
    """Write `independence.jsonl`, `.png` and `.md`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.independence", allow_abbrev=False)
    parser.add_argument("--data", default=DIGITS, help="digits, fashion-mnist, or the folder of its four files")
    parser.add_argument("--full", action="store_true", help="three seeds, two processes, and trainings")
    parser.add_argument("--output", type=Path, default=Path("runs/independence"), metavar="FOLDER")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = photographs(options.data, train=IMAGES, held_out=HELD_OUT)
    store = Store(options.output / "independence.jsonl")
    rows, extra = run(data, (0, 1, 2) if options.full else (0,), store, full=options.full)
    draw(rows, options.output / "independence.png", extra)
    command = f"python -m benchmarks.claims.independence --data {public_data(options.data)}"
    command += f"{' --full' * options.full} --output {options.output}"
    with replaced(options.output / "independence.md") as scratch:
        scratch.write_text(page(rows, command, data, options.data, extra), encoding="utf-8")
    print(table(rows) + (f"\n\n{more(extra)}" if extra else ""))
    print(f"\nwrote {options.output}/independence.md, .png, .jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
