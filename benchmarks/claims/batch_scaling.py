"""Figure 2 of arXiv 2102.06171 in small: accuracy over batch size, without normalisation and with it.

`python -m benchmarks.claims.stability --data fashion-mnist` runs it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.claims.stacked_runs import WARM_UP, Data, Rule, Setting, evaluate, train
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
    """A way to train, and the base rates that are tried.

    Attributes:
        start: what its runs have in common.
        bases: for the smallest batch size and upwards.
        scheduled: whether the threshold is that of `threshold`; else that of `start`.
    """

    start: Spec
    bases: tuple[float, ...]
    scheduled: bool = False


def threshold(batch: int) -> float:
    """Return AGC's threshold for a batch size: 0.01 for 4096, twice as much for half the batch, 0.16 at most.

    Source: arXiv 2102.06171, section 4.1, which finds that larger batches need smaller ones of 0.01 to 0.16.
    """
    return min(0.16, 0.01 * 4096 / batch)


OPEN = 0.25  # an initial skip gain
LINES: dict[str, Line] = {
    "no clipping": Line(Spec("no clipping", 0, 0), (0.0015625, 0.00625, 0.025, 0.1)),
    "global norm": Line(Spec("global norm", 0, 0, 1.0), (0.025, 0.1, 0.4)),
    "AGC": Line(Spec("AGC", 0, 0), (0.05, 0.1, 0.2), scheduled=True),
    "AGC, open": Line(Spec("AGC", 0, 0, skip_gain=OPEN), (0.05, 0.1, 0.2), scheduled=True),
    TWIN: Line(Spec(TWIN, 0, 0), (0.00625, 0.025, 0.1)),
}


def line_of(spec: Spec) -> str:
    """Return the key of `LINES` that a run belongs to."""
    return "AGC, open" if spec.method == "AGC" and spec.skip_gain == OPEN else spec.method


class Study(NamedTuple):
    """What is compared.

    Attributes:
        seeds: the first tries all base rates, the others the best one and its neighbours.
        thresholds: of AGC with open skip gains, tried at the base rate 0.1 and every batch size, as in figure 2b.
        around: a batch size at which one thing at a time is changed, see `changes`; `None` leaves that out.
    """

    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int
    lines: Mapping[str, Line]
    thresholds: tuple[float, ...]
    around: int | None


FULL = Study((64, 128, 256, 512, 1024, 2048, 4096), (0, 1, 2), 4, LINES, (0.01, 0.04, 0.16), 2048)
QUICK = Study((512, 4096), (0,), 1, {name: LINES[name] for name in ("no clipping", "AGC, open", TWIN)}, (), None)


def first_specs(study: Study) -> list[Spec]:
    """Return the runs of the first seed."""
    return [
        line.start._replace(
            batch=batch,
            base=base,
            limit=threshold(batch) if line.scheduled else line.start.limit,
            seed=study.seeds[0],
            epochs=study.epochs,
        )
        for batch in study.batches
        for line in study.lines.values()
        for base in line.bases
    ]


def further_specs(study: Study, results: Sequence[Result]) -> list[Spec]:
    """Return the runs of the other seeds: at the base rate that is best with the first, and at those beside it."""
    found = []
    for batch in study.batches:
        for name in study.lines:
            own = [r for r in results if r.spec.batch == batch and line_of(r.spec) == name]
            own.sort(key=lambda r: r.spec.base)
            top = max(range(len(own)), key=lambda i: own[i].accuracy)
            near = own[max(0, top - 1) : top + 2]
            found += [r.spec._replace(seed=seed) for seed in study.seeds[1:] for r in near]
    return found


def threshold_specs(study: Study) -> list[Spec]:
    """Return the runs of AGC by threshold."""
    start = Spec("AGC", 0, 0.1, seed=study.seeds[0], epochs=study.epochs, skip_gain=OPEN)
    return [start._replace(batch=batch, limit=limit) for batch in study.batches for limit in study.thresholds]


def is_of_grid(study: Study, spec: Spec) -> bool:
    """Return whether a run belongs to the lines of a study, and not to its thresholds and changes alone."""
    line = study.lines.get(line_of(spec))
    if line is None or spec.batch not in study.batches or spec.base not in line.bases or spec.seed not in study.seeds:
        return False
    limit = threshold(spec.batch) if line.scheduled else line.start.limit
    return spec == line.start._replace(
        batch=spec.batch, base=spec.base, limit=limit, seed=spec.seed, epochs=study.epochs
    )


def changes(study: Study) -> dict[str, Spec]:
    """Return AGC as in the paper at `study.around`, and runs that differ from it in one thing, or in two."""
    if study.around is None:
        return {}
    limit = 2 * threshold(study.around)
    paper = Spec("AGC", study.around, 0.1, limit, study.seeds[0], study.epochs)
    return {
        f"threshold {limit:g}, as the paper": paper,
        f"threshold {limit / 2:g}": paper._replace(limit=limit / 2),
        f"threshold {limit * 4:g}": paper._replace(limit=limit * 4),
        "learning rate x 4": paper._replace(base=0.4),
        f"learning rate x 4, threshold {limit / 4:g}": paper._replace(base=0.4, limit=limit / 4),
        "skip gains not clipped": paper._replace(spare_skip_gains=True),
        "floor of the norm 0.01": paper._replace(eps=0.01),
        "floor of the norm 0.1": paper._replace(eps=0.1),
        f"skip gains start at {OPEN:g}": paper._replace(skip_gain=OPEN),
        "classifier clipped, too": paper._replace(clip_head=True),
        f"skip gains start at {OPEN:g}, classifier clipped": paper._replace(skip_gain=OPEN, clip_head=True),
        "warm-up over a quarter of the steps": paper._replace(warm_up=0.25),
        "3 times as many epochs": paper._replace(epochs=3 * study.epochs),
        f"skip gains start at {OPEN:g}, 3 times as many epochs": paper._replace(
            skip_gain=OPEN, epochs=3 * study.epochs
        ),
        "twice as wide": paper._replace(width=2),
    }


def run_study(study: Study, store: Path, *, data: Data) -> list[Result]:
    """Return the results of all runs of a study."""
    first = first_specs(study)
    found = run_all(first, store, data=data)
    others = [*further_specs(study, found), *threshold_specs(study), *changes(study).values()]
    return run_all([*first, *others], store, data=data)


class Result(NamedTuple):
    """A run and how it ended: accuracy and loss on the held-out images; `diverged_at` is a step, or `None`."""

    spec: Spec
    accuracy: float
    loss: float
    diverged_at: int | None


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
    on_gpu = data.train[0].device.type == "cuda"
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
            done |= {spec: Result(spec, *end) for spec, end in zip(some, ended, strict=True)}
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
            spec, row["accuracy"], math.inf if row["loss"] is None else row["loss"], row["diverged_at"]
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
        }
        for r in results
    ]
    with replaced(store) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
