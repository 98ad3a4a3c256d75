"""Repeat figure 2 of arXiv 2102.06171 in small: accuracy over batch size, without normalisation and with it.

    python -m benchmarks.claims.stability --data fashion-mnist --full --output benchmarks/results
    python -m benchmarks.claims.stability --data fashion-mnist --full --device cuda    # all batch sizes and seeds

A small NF-ResNet-26 and its batch-normalised twin learn Fashion-MNIST. Every run has the same number of epochs, so that
a batch twice as large takes half the steps. The peak learning rate is the base rate times batch / 256. Nesterov
momentum 0.9, weight decay 2e-5, warm-up over 5/90 of the steps, then half a cosine to 0. For one seed, all runs start
from the same weights and see the images in the same order.

*AGC* is the paper's: it clips all parameters but the classifier's weight, with the threshold 0.01 for a batch of 4096,
twice that for half the batch, and 0.16 at most; skip gains start at 0. *AGC, open* differs in these alone, which start
at 0.25. *Global norm* clips the norm of all gradients together to 0.1. It and *no clipping* have their *open* forms,
too.

A run *diverged* if its loss or its final logits are not finite, and counts with an accuracy of 0. One that ends at 10 %
*died*: it gives the same class to every image. A method's largest stable batch is the one up to which, from the
smallest on, its mean accuracy is within 5 points of the best method's. Finished parts are kept in `stability.jsonl`:
after an interruption the same command goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.claims.stacked_runs import WARM_UP, Data, Rule, Setting, evaluate, train
from benchmarks.report import device_name, processor
from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import NFResNetConfig
from nfzoo.data.idx import IDXImages, fashion_mnist, find_idx
from nfzoo.errors import DataError
from nfzoo.optim.clipping import EPS

TWIN = "batch norm"
RULES: dict[str, Rule] = {"no clipping": "none", "global norm": "global norm", "AGC": "AGC", TWIN: "none"}
POOL = 2  # pixels of a side that are averaged: 28 x 28 become 14 x 14
IMAGES_AT_ONCE = 8192  # of all runs of a stack, on a CPU


class Spec(NamedTuple):
    """One run.

    Attributes:
        base: peak learning rate at a batch of 256; that of the run is `base * batch / 256`.
        limit: threshold of AGC or of the global norm; 0 for methods without.
        warm_up, skip_gain, spare_skip_gains, eps, clip_head: see `Setting`.
        width: factor of the network's widths.
    """

    method: str
    batch: int
    base: float
    limit: float = 0.0
    seed: int = 0
    epochs: float = 4
    warm_up: float = WARM_UP
    skip_gain: float = 0.0
    spare_skip_gains: bool = False
    eps: float = EPS
    width: int = 1
    clip_head: bool = False

    @property
    def rate(self) -> float:
        """Return the peak learning rate."""
        return self.base * self.batch / 256


class Line(NamedTuple):
    """A way to train.

    Attributes:
        start: what its runs have in common.
        guess: a base rate near which the best one is expected, of a batch size.
        scheduled: whether the threshold is that of `threshold`; else that of `start`.
    """

    start: Spec
    guess: Callable[[int], float]
    scheduled: bool = False


def threshold(batch: int) -> float:
    """Return AGC's threshold for a batch size: 0.01 for 4096, twice as much for half the batch, 0.16 at most.

    Source: arXiv 2102.06171, section 4.1, which finds that larger batches need smaller ones of 0.01 to 0.16.
    """
    return min(0.16, 0.01 * 4096 / batch)


OPEN = 0.25  # an initial skip gain

LINES: dict[str, Line] = {
    "no clipping": Line(Spec("no clipping", 0, 0), lambda batch: 0.05 * 256 / batch),
    "global norm": Line(Spec("global norm", 0, 0, 0.1), lambda batch: 0.8 * 256 / batch),
    "AGC": Line(Spec("AGC", 0, 0), lambda batch: 0.1, scheduled=True),
    "AGC, open": Line(Spec("AGC", 0, 0, skip_gain=OPEN), lambda batch: 0.1, scheduled=True),
    "no clipping, open": Line(Spec("no clipping", 0, 0, skip_gain=OPEN), lambda batch: 0.05 * 256 / batch),
    "global norm, open": Line(Spec("global norm", 0, 0, 0.1, skip_gain=OPEN), lambda batch: 0.8 * 256 / batch),
    TWIN: Line(Spec(TWIN, 0, 0), lambda batch: 0.2 * 256 / batch),
}


def line_of(spec: Spec) -> str:
    """Return the key of `LINES` that a run belongs to."""
    return f"{spec.method}, open" if spec.skip_gain == OPEN else spec.method


class Study(NamedTuple):
    """State what is compared.

    Attributes:
        few: whether the first seed tries the guessed base rate and those lower and higher by a factor of 4 (of 2 for
            AGC), then half and twice the best of these, and the other seeds the best of all; else every seed tries
            seven rates by factors of 2.
        thresholds: of AGC with open skip gains, tried at the base rate 0.1 and every batch size, as in figure 2b.
        around: a batch size at which one thing at a time is changed, see `changes`; `None` leaves that out.
    """

    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int
    lines: Mapping[str, Line]
    few: bool
    thresholds: tuple[float, ...]
    around: int | None


FULL = Study((64, 128, 256, 512, 1024, 2048, 4096), (0, 1, 2), 4, LINES, False, (0.01, 0.04, 0.16), 2048)
CPU = FULL._replace(few=True)
QUICK = Study((512, 4096), (0,), 1, {name: LINES[name] for name in ("no clipping", "AGC, open", TWIN)}, True, (), None)


def bases(study: Study, line: Line, batch: int) -> list[float]:
    """Return the base rates to begin with: powers of 2 times 0.1, about the guess."""
    middle = round(math.log2(line.guess(batch) / 0.1))
    few = (-1, 0, 1) if line.scheduled else (-2, 0, 2)
    return [0.1 * 2.0 ** (middle + k) for k in (few if study.few else range(-3, 4))]


def first_specs(study: Study, batch: int) -> list[Spec]:
    """Return the runs of one batch size that do not depend on the results of others."""
    return [
        line.start._replace(
            batch=batch,
            base=base,
            limit=threshold(batch) if line.scheduled else line.start.limit,
            seed=seed,
            epochs=study.epochs,
        )
        for line in study.lines.values()
        for base in bases(study, line, batch)
        for seed in (study.seeds[:1] if study.few else study.seeds)
    ]


def best_specs(study: Study, results: Sequence[Result]) -> list[Spec]:
    """Return the best run of each line."""
    own = {name: [r for r in results if line_of(r.spec) == name] for name in study.lines}
    return [max(runs, key=lambda r: r.accuracy).spec for runs in own.values() if runs]


def threshold_specs(study: Study) -> list[Spec]:
    """Return the runs of AGC by threshold."""
    start = Spec("AGC", 0, 0.1, seed=study.seeds[0], epochs=study.epochs, skip_gain=OPEN)
    return [start._replace(batch=batch, limit=limit) for batch in study.batches for limit in study.thresholds]


def is_of_grid(study: Study, spec: Spec) -> bool:
    """Return whether a run belongs to the lines of a study, and not to its thresholds and changes alone."""
    line = study.lines.get(line_of(spec))
    if line is None or spec.batch not in study.batches or spec.seed not in study.seeds:
        return False
    limit = threshold(spec.batch) if line.scheduled else line.start.limit
    return spec == line.start._replace(
        batch=spec.batch, base=spec.base, limit=limit, seed=spec.seed, epochs=study.epochs
    )


def changes(study: Study) -> dict[str, Spec]:
    """Return a run of AGC at `study.around`, and runs that differ from it in one thing, or in two."""
    if study.around is None:
        return {}
    limit = 2 * threshold(study.around)
    agc = Spec("AGC", study.around, 0.1, limit, study.seeds[0], study.epochs)
    plain = Spec("no clipping", study.around, 0.00625, 0.0, study.seeds[0], study.epochs)
    norm = Spec("global norm", study.around, 0.1, 0.1, study.seeds[0], study.epochs)
    start = f"skip gains start at {OPEN:g}"
    return {
        f"AGC, threshold {limit:g}, base rate 0.1": agc,
        f"threshold {limit / 2:g}": agc._replace(limit=limit / 2),
        f"threshold {limit * 4:g}": agc._replace(limit=limit * 4),
        "base rate 0.4": agc._replace(base=0.4),
        f"base rate 0.4, threshold {limit / 4:g}": agc._replace(base=0.4, limit=limit / 4),
        "skip gains not clipped": agc._replace(spare_skip_gains=True),
        "floor of the norm 0.01, not 0.001": agc._replace(eps=0.01),
        "floor of the norm 0.1": agc._replace(eps=0.1),
        start: agc._replace(skip_gain=OPEN),
        f"{start}, threshold {limit / 2:g}": agc._replace(skip_gain=OPEN, limit=limit / 2),
        f"{start}, threshold {limit * 2:g}": agc._replace(skip_gain=OPEN, limit=limit * 2),
        "classifier's weight clipped, too": agc._replace(clip_head=True),
        f"{start}, classifier's weight clipped": agc._replace(skip_gain=OPEN, clip_head=True),
        "warm-up over a quarter of the steps": agc._replace(warm_up=0.25),
        "3 times as many epochs": agc._replace(epochs=3 * study.epochs),
        f"{start}, 3 times as many epochs": agc._replace(skip_gain=OPEN, epochs=3 * study.epochs),
        "twice as wide": agc._replace(width=2),
        f"no clipping, base rate {plain.base:g}": plain,
        f"no clipping, {start}": plain._replace(skip_gain=OPEN),
        f"global norm, base rate {norm.base:g}": norm,
        f"global norm, {start}": norm._replace(skip_gain=OPEN),
        f"global norm, {start}, base rate 0.4": norm._replace(skip_gain=OPEN, base=0.4),
        **{
            f"batch {2 * study.around}: {run.method}, {start}, base rate {run.base:g}": run
            for run in (
                plain._replace(batch=2 * study.around, base=0.003125, skip_gain=OPEN),
                plain._replace(batch=2 * study.around, skip_gain=OPEN),
                norm._replace(batch=2 * study.around, skip_gain=OPEN),
            )
        },
        "global norm limited to 1, not 0.1": norm._replace(limit=1.0),
        "global norm limited to 0.25, base rate 0.4": norm._replace(limit=0.25, base=0.4),
    }


def run_study(study: Study, store: Path, *, data: Data) -> list[Result]:
    """Return the results of all runs of a study, one batch size after the other.

    Runs of the same lines that the store has already, at other base rates, are among them.
    """
    found: list[Result] = []
    for batch in reversed(study.batches):  # the quickest first
        own = run_all(first_specs(study, batch), store, data=data)
        if study.few:
            near = [s._replace(base=s.base * factor) for s in best_specs(study, own) for factor in (0.5, 2.0)]
            own += run_all(near, store, data=data)
            again = [s._replace(seed=seed) for s in best_specs(study, own) for seed in study.seeds[1:]]
            own += run_all(again, store, data=data)
        found += own
    others = run_all([*changes(study).values(), *threshold_specs(study)], store, data=data)
    known = [result for spec, result in load(store).items() if is_of_grid(study, spec)]
    return list({result.spec: result for result in [*found, *others, *known]}.values())


class Result(NamedTuple):
    """A run and how it ended.

    Attributes:
        accuracy, loss: on the held-out images.
        diverged_at: a step, or `None`.
        on: processor or GPU that it ran on, and version of torch.
    """

    spec: Spec
    accuracy: float
    loss: float
    diverged_at: int | None
    on: str = ""


def config(width: int = 1) -> NFResNetConfig:
    """Return NF-ResNet-26, 8 blocks of 3 convolutions, with few channels."""
    widths = tuple(width * w for w in (16, 32, 64, 64))
    return NFResNetConfig(depths=(2, 2, 2, 2), widths=widths, stem_width=8 * width, num_classes=10, in_channels=1)


# ---------------------------------------------------------------- data


def read_data(source: str) -> Data:
    """Read grey images, average 2 x 2 pixels, and standardise them by mean and deviation of the training images.

    Args:
        source: `fashion-mnist`, a folder of IDX files, or an `.npz` with `x_train`, `y_train`, `x_test`, `y_test`.

    Raises:
        DataError: for anything else.
    """
    parts = _read_npz(Path(source)) if source.endswith(".npz") else _read_idx(source)
    tensors = []
    for pixels, labels in parts:
        x = torch.from_numpy(np.array(pixels, dtype=np.float32))[:, None]
        tensors.append((F.avg_pool2d(x, POOL), torch.from_numpy(np.array(labels, dtype=np.int64))))
    std, mean = torch.std_mean(tensors[0][0])
    (a, b), (c, d) = tensors
    return Data(((a - mean) / std, b), ((c - mean) / std, d))


def _read_idx(source: str) -> list[tuple[np.ndarray, np.ndarray]]:
    folder = fashion_mnist() if source == "fashion-mnist" else Path(source)
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {str(folder)!r}; name digits, fashion-mnist, a folder of IDX files, or an .npz"
        )
    found = find_idx(folder)
    if found is None or found.held_out is None:
        raise DataError(f"{str(folder)!r} does not hold train and test images in IDX files")
    read = [IDXImages.read(files, found.classes) for files in (found.train, found.held_out)]
    return [(images.pixels, images.labels) for images in read]


def _read_npz(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = [arrays[name] for name in names]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read as {', '.join(names)}: {error}") from error
    return [(found[0], found[1]), (found[2], found[3])]


# ---------------------------------------------------------------- runs


def run_all(specs: Sequence[Spec], store: Path, *, data: Data) -> list[Result]:
    """Return the results of all runs; those that the store has are not run again.

    Runs of one method, batch size, length and network are trained together.
    """
    done = load(store)
    stacks: dict[tuple, list[Spec]] = {}
    for spec in dict.fromkeys(specs):
        if spec not in done:
            stacks.setdefault((spec.method, spec.batch, spec.epochs, spec.width), []).append(spec)
    device = data.train[0].device
    on_gpu = device.type == "cuda"
    on = f"{device_name(device) if on_gpu else processor()}, torch {torch.__version__}"
    for (method, batch, epochs, width), whole in stacks.items():
        size = len(whole) if on_gpu else max(1, IMAGES_AT_ONCE // batch)
        for first in range(0, len(whole), size):
            some = whole[first : first + size]
            start = time.perf_counter()
            settings = [
                Setting(s.rate, s.limit, s.seed, s.warm_up, s.skip_gain, s.spare_skip_gains, s.eps, s.clip_head)
                for s in some
            ]
            cfg, twin = config(width), method == TWIN
            fitted = train(cfg, RULES[method], batch, settings, data=data, epochs=epochs, twin=twin)
            steps = int(epochs * len(data.train[0])) // batch
            ended = evaluate(cfg, fitted, data=data, runs=len(some), steps=steps, twin=twin)
            done |= {spec: Result(spec, *end, on) for spec, end in zip(some, ended, strict=True)}
            save(done.values(), store)
            seconds = time.perf_counter() - start
            print(f"{method}, batch {batch}, {epochs:g} epochs: {len(some)} runs in {seconds:.0f} s", flush=True)
    return [done[spec] for spec in dict.fromkeys(specs)]


def load(store: Path) -> dict[Spec, Result]:
    """Return what earlier calls left."""
    if not store.exists():
        return {}
    found = {}
    for line in store.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        spec = Spec(**{name: row[name] for name in Spec._fields if name in row})
        found[spec] = Result(
            spec,
            row["accuracy"],
            math.inf if row["loss"] is None else row["loss"],
            row["diverged_at"],
            row.get("on", ""),
        )
    return found


def save(results: Iterable[Result], store: Path) -> None:
    """Write one JSON object a line."""
    rows = [
        {
            **r.spec._asdict(),
            "accuracy": round(r.accuracy, 5),
            "loss": round(r.loss, 5) if math.isfinite(r.loss) else None,
            "diverged_at": r.diverged_at,
            "on": r.on,
        }
        for r in results
    ]
    with replaced(store) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
