"""Train many small networks at once, vectorised over seeds and learning rates.

The recipe is that of `stability`: Nesterov momentum 0.9, warm-up over 5/90 of the steps, then half a cosine to 0. A
seed sets the initial weights and the order of the images. The images are the same for all.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.claims import batch_norm_twin
from benchmarks.claims.stability import CONFIG
from benchmarks.claims.stacked_runs import WEIGHT_DECAY, Data
from nfzoo.checkpoint.atomic import replaced
from nfzoo.config import NFResNetConfig
from nfzoo.model import apply, init, sample_noise, specs
from nfzoo.optim.clipping import agc
from nfzoo.optim.sgd import CLIPPED, DECAYED, SGDState, sgd, warmup_cosine
from nfzoo.step import cross_entropy
from nfzoo.types import Params

KINDS = {name: kind for name, (_, kind) in specs(CONFIG).items()}

Clip: TypeAlias = Callable[[Params, Params], Params]
Step: TypeAlias = Callable[[Params, Params, Tensor, Tensor, Params], tuple[Params, Params]]


class Kind(NamedTuple):
    """One kind of network and of training.

    Attributes:
        start: parameters, and running statistics if there are any, from a generator.
        step: parameters, statistics, images, labels and masks of a batch -> gradients, and statistics after it.
        logits: evaluation mode, from parameters, statistics and images.
        config: its masks are drawn anew for every step.
    """

    start: Callable[[torch.Generator], tuple[Params, Params]]
    step: Step
    logits: Callable[[Params, Params, Tensor], Tensor]
    config: NFResNetConfig = CONFIG


class Fitted(NamedTuple):
    """Networks that were trained together: one for each seed and rate, whose tensors are stacked in this order."""

    runs: list[tuple[int, float]]
    params: Params
    statistics: Params
    watched: Tensor

    def one(self, row: int) -> tuple[Params, Params]:
        """Return the parameters and the statistics of one network."""
        return {k: v[row] for k, v in self.params.items()}, {k: v[row] for k, v in self.statistics.items()}


def spared(name: str) -> bool:
    """Return whether AGC spares a parameter here: the classifier's weight and the skip gains, as in `stability`."""
    return KINDS[name] not in CLIPPED - {"skip_gain"}


def clip_by(threshold: float, *, spare: Callable[[str], bool] = spared) -> Clip:
    """Return AGC at a threshold, which spares some parameters."""
    return lambda grads, params: agc(grads, params, clip=threshold, where=lambda name: not spare(name))


def no_clip(grads: Params, params: Params) -> Params:
    """Return gradients as they are."""
    return grads


def loss_of(config: NFResNetConfig) -> Callable[..., Tensor]:
    """Return the mean cross-entropy of parameters, images, labels and masks."""
    return lambda params, x, y, noise: cross_entropy(apply(config, params, x, noise or None), y)


def nf(clip: Clip, *, config: NFResNetConfig = CONFIG) -> Kind:
    """Return an NF-ResNet whose mean gradient is clipped."""

    def first(generator: torch.Generator) -> tuple[Params, Params]:
        return init(config, generator=generator), {}

    def step(params: Params, statistics: Params, x: Tensor, y: Tensor, noise: Params) -> tuple[Params, Params]:
        return clip(torch.func.grad(loss_of(config))(params, x, y, noise), params), statistics

    return Kind(first, step, lambda params, _, x: apply(config, params, x), config)


def twin() -> Kind:
    """Return the batch-normalised twin, without clipping."""

    def loss(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
        logits, used = batch_norm_twin.apply(CONFIG, params, x)
        return cross_entropy(logits, y), used

    def step(params: Params, statistics: Params, x: Tensor, y: Tensor, noise: Params) -> tuple[Params, Params]:
        grads, used = torch.func.grad(loss, has_aux=True)(params, x, y)
        return grads, batch_norm_twin.update(statistics, used)

    return Kind(
        lambda generator: (
            batch_norm_twin.init(CONFIG, generator=generator),
            batch_norm_twin.init_statistics(CONFIG),
        ),
        step,
        lambda params, statistics, x: batch_norm_twin.apply(CONFIG, params, x, statistics)[0],
    )


def fit(
    kind: Kind,
    data: Data,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    batch: int,
    epochs: float,
    watch: Callable[[Params, Tensor, Tensor], Tensor] | None = None,
    every: int = 8,
) -> Fitted:
    """Train a network for each seed and rate, all at the same time.

    Args:
        watch: a measure of parameters, images and labels, taken before every `every`-th step; `watched` is its mean.
    """
    images, labels = data.train
    runs = list(itertools.product(seeds, rates))
    steps = int(epochs * len(images)) // batch
    starts = {seed: kind.start(torch.Generator().manual_seed(seed)) for seed in seeds}
    params, statistics = (
        {name: torch.stack([starts[seed][part][name] for seed, _ in runs]) for name in starts[seeds[0]][part]}
        for part in (0, 1)
    )
    orders = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed + 1)
        passes = -(-steps * batch // len(images))
        orders[seed] = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)])
    order = torch.stack([orders[seed] for seed, _ in runs])
    masks = torch.Generator().manual_seed(seeds[0] + 2)
    peaks = torch.tensor([rate for _, rate in runs])
    momentum = {name: torch.zeros_like(p) for name, p in params.items()}

    def step(
        params: Params, momentum: Params, statistics: Params, x: Tensor, y: Tensor, noise: Params, lr: Tensor
    ) -> tuple[Params, Params, Params]:
        grads, statistics = kind.step(params, statistics, x, y, noise)
        params, state = sgd(
            params,
            grads,
            SGDState(momentum),
            lr=lr,
            weight_decay=WEIGHT_DECAY,
            decay=lambda name: KINDS.get(name) in DECAYED,
        )
        return params, state.momentum, statistics

    watched = []
    for i in range(steps):
        part = order[:, i * batch : (i + 1) * batch]
        x, y = images[part], labels[part]
        if watch is not None and i % every == 0:
            watched.append(torch.func.vmap(watch)(params, x, y))
        drawn = sample_noise(kind.config, len(runs) * batch, generator=masks)
        noise = {name: mask.unflatten(0, (len(runs), batch)) for name, mask in drawn.items()}
        factor = warmup_cosine(i, peak=1.0, warmup=max(1, round(steps * 5 / 90)), total=steps)
        params, momentum, statistics = torch.func.vmap(step)(params, momentum, statistics, x, y, noise, peaks * factor)
    return Fitted(runs, params, statistics, torch.stack(watched).mean(0) if watched else torch.zeros(len(runs)))


def tested(kind: Kind, fitted: Fitted, data: tuple[Tensor, Tensor]) -> list[tuple[float, float]]:
    """Return accuracy and loss of each network in evaluation mode; accuracy 0 if a logit is not finite."""
    return [score(lambda x, row=row: kind.logits(*fitted.one(row), x), data) for row in range(len(fitted.runs))]


@torch.no_grad()
def score(logits: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor], *, batch: int = 500) -> tuple[float, float]:
    """Return accuracy and mean loss of logits, computed in batches; accuracy 0 if a logit is not finite."""
    x, y = data
    z = torch.cat([logits(part) for part in x.split(batch)])
    if not z.isfinite().all():
        return 0.0, float("inf")
    return float((z.argmax(1) == y).float().mean()), float(cross_entropy(z, y))


def best_rate(rows: Iterable[Mapping[str, Any]]) -> tuple[float, list[Mapping[str, Any]]]:
    """Return the rate whose seeds have the highest mean accuracy, and the rows of these seeds."""
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(row)
    return max(by_rate.items(), key=lambda item: sum(row["accuracy"] for row in item[1]) / len(item[1]))


class Store:
    """Rows of results in a JSON-lines file: what an earlier call has left is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, key: Mapping[str, Any], compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Return the rows of a key, which `compute` returns without the key if they are not there yet."""
        found = [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]
        if not found:
            found = [{**key, **row} for row in compute()]
            self.rows += found
            with replaced(self.path) as scratch:
                scratch.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            print(json.dumps(found[-1]), flush=True)
        return found
