"""Train one network many times at once, in short runs which differ in learning rate, clipping and seed.

The parameters of all runs are one matrix with a row for each run. `torch.func.vmap` maps the network over the rows;
clipping, momentum and weight standardisation are a few operations on the matrix. Columns are sorted by the length of
the output units that they belong to, so that the norms of all units of one length are one operation. The host reads
nothing back while a GPU trains: what a run's divergence needs to be known by is a mask on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claims import batch_norm_twin
from nfzoo.config import NFResNetConfig
from nfzoo.model import init, plan, specs
from nfzoo.models.layers import Standardizing
from nfzoo.models.weight_standardization import standardize_weight
from nfzoo.optim.clipping import EPS, GRADIENT_FLOOR, unit_shape
from nfzoo.optim.sgd import CLIPPED, DECAYED, SGDState, sgd, warmup_cosine
from nfzoo.runtime.cuda_graph import CudaGraph
from nfzoo.types import Params

WEIGHT_DECAY = 2e-5  # arXiv 2102.06171, as the schedule
WARM_UP = 5 / 90  # of the steps
LOOKS = 32  # how often a run on a CPU looks for runs that diverged, and drops them
CHUNK = 1000  # images of one evaluation

Rule = Literal["none", "global norm", "AGC"]


class Data(NamedTuple):
    """Images `(N, 1, side, side)`, standardised by the training images, and labels `(N,)`."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]

    def to(self, device: torch.device) -> Data:
        """Return the same data on a device."""
        return Data(*((x.to(device), y.to(device)) for x, y in self))


class Setting(NamedTuple):
    """What the runs of one stack may differ in.

    Attributes:
        rate: peak learning rate.
        limit: threshold of the clipping rule.
        seed: of the initial weights and the order of the images.
        warm_up: its part of the steps.
        skip_gain: initial value of an NF-ResNet's skip gains, 0 in the paper.
        spare_skip_gains: whether AGC leaves the skip gains alone.
        eps: AGC's floor of the parameter norm.
        clip_head: whether AGC clips the classifier's weight, too, which the paper spares.
    """

    rate: float
    limit: float = math.inf
    seed: int = 0
    warm_up: float = WARM_UP
    skip_gain: float = 0.0
    spare_skip_gains: bool = False
    eps: float = EPS
    clip_head: bool = False


class Fitted(NamedTuple):
    """Runs that were trained together: parameters and running statistics, each stacked, of those that did not diverge.

    `alive` has the places of these in the list of settings; `diverged_at` has the step of each of the others.
    """

    params: Params
    running: Params
    alive: list[int]
    diverged_at: dict[int, int]


class Ended(NamedTuple):
    """Accuracy and loss of a run on the held-out images; `diverged_at` is a step, or `None`."""

    accuracy: float
    loss: float
    diverged_at: int | None


# ---------------------------------------------------------------- parameters as columns


class _Part(NamedTuple):
    name: str
    shape: tuple[int, ...]
    columns: slice


class _Group(NamedTuple):
    """Output units of one length; the first `kernel_rows` are rows of kernels that are standardised."""

    columns: slice
    units: int
    length: int
    kernel_rows: int
    gains: Tensor  # the column of each such row's gain
    scales: Tensor  # the constant factor of each such row
    free: Tensor  # (units,): whether the unit is of the classifier's weight
    skip: Tensor  # (units,): whether it is a skip gain


class Layout:
    """Where the parameters of a network lie in a row of the matrix."""

    def __init__(self, cfg: NFResNetConfig, *, twin: bool, device: torch.device) -> None:
        kinds = {name: kind for name, (_, kind) in specs(cfg).items()}
        first = batch_norm_twin.init(cfg) if twin else init(cfg)
        units = {name: unit_shape(value.shape) for name, value in first.items()}
        kernels = {name for name in first if f"{name.removesuffix('weight')}gain" in first and kinds[name] == "weight"}
        order = sorted(first, key=lambda name: (units[name][1], name not in kernels))
        self.parts: list[_Part] = []
        start = 0
        for name in order:
            size = first[name].numel()
            self.parts.append(_Part(name, tuple(first[name].shape), slice(start, start + size)))
            start += size
        self.size = start
        self.kernels = kernels
        place = {part.name: part.columns.start for part in self.parts}
        scales = {
            f"{block.name}.{key}": float(block.fn.scale(key.removesuffix("weight"), block.beta))
            for block in plan(cfg)
            if isinstance(block.fn, Standardizing)
            for key in block.specs
        }
        self.groups: list[_Group] = []
        for length in sorted({length for _, length in units.values()}):
            own = [part for part in self.parts if units[part.name][1] == length]
            rows = [part for part in own if part.name in kernels]
            gains = [place[p.name.removesuffix("weight") + "gain"] + i for p in rows for i in range(p.shape[0])]
            factors = [scales[p.name] for p in rows for _ in range(p.shape[0])]
            flags = [(kinds.get(p.name), units[p.name][0]) for p in own]
            free = [kind not in CLIPPED for kind, count in flags for _ in range(count)]
            skip = [kind == "skip_gain" for kind, count in flags for _ in range(count)]
            self.groups.append(
                _Group(
                    slice(own[0].columns.start, own[-1].columns.stop),
                    len(free),
                    length,
                    len(gains),
                    torch.tensor(gains, dtype=torch.long, device=device),
                    torch.tensor(factors, device=device),
                    torch.tensor(free, device=device),
                    torch.tensor(skip, device=device),
                )
            )
        decayed = [float(kinds.get(p.name) in DECAYED) for p in self.parts for _ in range(math.prod(p.shape))]
        self.decayed = torch.tensor(decayed, device=device)

    def pack(self, trees: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the matrix of several runs' parameters."""
        return torch.stack([torch.cat([tree[part.name].flatten() for part in self.parts]) for tree in trees])

    def unpack(self, matrix: Tensor) -> Params:
        """Return stacked parameters `(runs, *shape)`, as views of the matrix."""
        return {part.name: matrix[:, part.columns].unflatten(1, part.shape) for part in self.parts}

    def standardized(self, matrix: Tensor) -> Params:
        """Return stacked parameters with every kernel standardised and scaled by its gain."""
        params = self.unpack(matrix)
        runs = len(matrix)
        for group in self.groups:
            if not group.kernel_rows:
                continue
            count = group.kernel_rows * group.length
            kernels = matrix[:, group.columns][:, :count].reshape(-1, group.length, 1, 1)
            gains = (matrix[:, group.gains] * group.scales).reshape(-1)
            rows = standardize_weight(kernels, gains).reshape(runs, count)
            for part in self.parts:
                first, last = (edge - group.columns.start for edge in (part.columns.start, part.columns.stop))
                if part.name in self.kernels and first >= 0 and last <= count:
                    params[part.name] = rows[:, first:last].unflatten(1, part.shape)
        return params


def clip_agc(
    grads: Tensor, matrix: Tensor, layout: Layout, limits: Tensor, eps: Tensor, spare: Tensor, heads: Tensor
) -> Tensor:
    """Return each unit's gradient times `min(1, limit * max(|w|, eps) / |g|)`: see `nfzoo.agc`.

    Args:
        grads, matrix: gradients and parameters of all runs.
        limits, eps: of each run, `(runs, 1)`.
        spare, heads: whether a run's skip gains stay unclipped, and its classifier's weight does not, `(runs, 1)`.
    """
    parts = []
    for group in layout.groups:
        g, w = (m[:, group.columns].unflatten(1, (group.units, group.length)) for m in (grads, matrix))
        norm = torch.linalg.vector_norm(g, dim=2)
        limit = limits * torch.linalg.vector_norm(w, dim=2).clamp(min=eps)
        clipped = (norm > limit) & (heads | ~group.free) & ~(spare & group.skip)
        factor = torch.where(clipped, limit / norm.clamp(min=GRADIENT_FLOOR), 1.0)
        parts.append((g * factor[:, :, None]).flatten(1))
    return torch.cat(parts, dim=1)


def clip_global(grads: Tensor, limits: Tensor) -> Tensor:
    """Return each run's gradients times `min(1, limit / norm)`, `norm` that of all of them together."""
    norm = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    return grads * (limits / norm.clamp(min=GRADIENT_FLOOR)).clamp(max=1)


# ---------------------------------------------------------------- networks


def _ready_blocks(cfg: NFResNetConfig) -> list[tuple[str, list[str], Callable[..., Tensor], float]]:
    """Return the network's blocks as functions of standardised kernels."""
    found = []
    for block in plan(cfg):
        fn: Any = block.fn
        if isinstance(fn, Standardizing):
            fn = fn.made_ready()
        found.append((block.name, list(block.specs), fn, block.beta))
    return found


def network(cfg: NFResNetConfig) -> Callable[[Params, Tensor], Tensor]:
    """Return the NF-ResNet as a function of parameters with standardised kernels, and images."""
    blocks = _ready_blocks(cfg)

    def forward(params: Params, x: Tensor) -> Tensor:
        for name, keys, fn, beta in blocks:
            x = fn({key: params[f"{name}.{key}"] for key in keys}, x, beta, None)
        return x

    return forward


class Stack:
    """The state of several runs of one network and rule; `step` changes it in place."""

    def __init__(
        self, cfg: NFResNetConfig, rule: Rule, settings: Sequence[Setting], *, twin: bool, device: torch.device
    ) -> None:
        self.cfg, self.rule, self.twin, self.device = cfg, rule, twin, device
        self.layout = Layout(cfg, twin=twin, device=device)
        self.settings = list(settings)
        starts: dict[tuple[int, float], Params] = {}
        for setting in settings:
            key = setting.seed, setting.skip_gain
            if key not in starts:
                generator = torch.Generator().manual_seed(setting.seed)
                own = cfg.replace(skip_init=setting.skip_gain)
                starts[key] = (batch_norm_twin.init if twin else init)(own, generator=generator)
        self.matrix = self.layout.pack([starts[s.seed, s.skip_gain] for s in settings]).to(device)
        self.momentum = torch.zeros_like(self.matrix)
        self.running: Params = {}
        if twin:
            self.running = {
                name: value.expand(len(settings), -1).clone().to(device)
                for name, value in batch_norm_twin.init_statistics(cfg).items()
            }
        self.places = torch.arange(len(settings), device=device)
        self.ended = torch.full((len(settings),), -1, device=device)  # the step of divergence
        self.limits = self._column([s.limit for s in settings])
        self.eps = self._column([s.eps for s in settings])
        self.spare = self._column([s.spare_skip_gains for s in settings])
        self.heads = self._column([s.clip_head for s in settings])
        self._forward = network(cfg)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]

    def logits(self, params: Params, x: Tensor, *, shared: bool) -> tuple[Tensor, Params]:
        """Return logits `(runs, N, classes)` in training mode, and the twin's statistics of the batch."""
        images = None if shared else 0
        if self.twin:
            return torch.func.vmap(lambda p, x: batch_norm_twin.apply(self.cfg, p, x), (0, images))(params, x)
        return torch.func.vmap(self._forward, (0, images))(params, x), {}

    def step(self, x: Tensor, y: Tensor, rates: Tensor, i: Tensor) -> None:
        """Take one step.

        Args:
            x, y: images and labels, with a leading dimension of runs if these see different ones.
            rates: learning rate of each run, `(runs,)`.
            i: number of the step, of no dimension.
        """
        matrix = self.matrix.detach().requires_grad_()
        params = self.layout.unpack(matrix) if self.twin else self.layout.standardized(matrix)
        shared = y.ndim == 1
        logits, statistics = self.logits(params, x, shared=shared)
        labels = (y.expand(len(matrix), -1) if shared else y).reshape(-1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").unflatten(0, logits.shape[:2]).mean(1)
        (grads,) = torch.autograd.grad(losses.sum(), matrix)
        with torch.no_grad():
            grads = self.clipped(grads)
            grads = grads + WEIGHT_DECAY * self.layout.decayed * self.matrix
            new, state = sgd({"": self.matrix}, {"": grads}, SGDState({"": self.momentum}), lr=rates[:, None])
            self.matrix.copy_(new[""])
            self.momentum.copy_(state.momentum[""])
            if self.twin:
                for name, value in batch_norm_twin.update(self.running, statistics).items():
                    self.running[name].copy_(value)
            self.ended.copy_(torch.where((self.ended < 0) & ~losses.isfinite(), i, self.ended))

    def clipped(self, grads: Tensor) -> Tensor:
        """Return the gradients of all runs, clipped by the stack's rule."""
        if self.rule == "AGC":
            return clip_agc(grads, self.matrix, self.layout, self.limits, self.eps, self.spare, self.heads)
        return clip_global(grads, self.limits) if self.rule == "global norm" else grads

    def keep(self, rows: Tensor) -> None:
        """Drop all runs but some."""
        for name in ("matrix", "momentum", "places", "ended", "limits", "eps", "spare", "heads"):
            setattr(self, name, getattr(self, name)[rows])
        self.running = {name: value[rows] for name, value in self.running.items()}


def train(
    cfg: NFResNetConfig,
    rule: Rule,
    batch: int,
    settings: Sequence[Setting],
    *,
    data: Data,
    epochs: float,
    twin: bool = False,
) -> Fitted:
    """Train a run for each setting, all at the same time, on the device of the data.

    Batches run across the borders of epochs, so that no image is left out. On a CPU, runs that diverged leave the stack
    at the next of `LOOKS` looks. On a GPU they stay, and the step is one CUDA graph.
    """
    images, labels = data.train
    device = images.device
    stack = Stack(cfg, rule, settings, twin=twin, device=device)
    steps = int(epochs * len(images)) // batch
    seeds = sorted({s.seed for s in settings})
    order = torch.stack([_order(len(images), steps * batch, seed) for seed in seeds]).unflatten(1, (steps, batch))
    order = order.to(device)
    shared = len(seeds) == 1
    which = torch.tensor([seeds.index(s.seed) for s in settings], device=device)
    table = torch.tensor([[_rate(s, i, steps) for s in settings] for i in range(steps)], device=device)

    def step(i: Tensor) -> None:
        rows = order.index_select(1, i.reshape(1))[:, 0]
        rows = rows[0] if shared else rows[which[stack.places]]
        stack.step(images[rows], labels[rows], table.index_select(0, i.reshape(1))[0, stack.places], i)

    on_gpu = device.type == "cuda"
    take: Callable[[Tensor], None] = CudaGraph(step) if on_gpu else step  # type: ignore[assignment]
    diverged: dict[int, int] = {}
    numbers = torch.arange(steps, device=device)
    for i in range(steps):
        take(numbers[i])
        if i == steps - 1 or (not on_gpu and (i + 1) % max(1, steps // LOOKS) == 0):
            ended = dict(zip(stack.places.tolist(), stack.ended.tolist(), strict=True))
            diverged |= {place: at for place, at in ended.items() if at >= 0}
            stack.keep(stack.ended < 0)
            if not len(stack.places):
                break
    return Fitted(stack.layout.unpack(stack.matrix), stack.running, stack.places.tolist(), diverged)


def evaluate(
    cfg: NFResNetConfig, fitted: Fitted, *, data: Data, runs: int, steps: int, twin: bool = False
) -> list[Ended]:
    """Return how each of `runs` runs ended. One with logits that are not finite diverged at the last of the steps."""
    x, y = data.held_out
    found = {place: Ended(0.0, math.inf, at) for place, at in fitted.diverged_at.items()}
    if fitted.alive:
        stack = Stack(cfg, "none", [Setting(0.0)] * len(fitted.alive), twin=twin, device=x.device)
        matrix = torch.cat([fitted.params[part.name].flatten(1) for part in stack.layout.parts], dim=1)
        with torch.no_grad():
            params = fitted.params if twin else stack.layout.standardized(matrix)
            parts = []
            for images in x.split(CHUNK):
                if twin:
                    evaluated = torch.func.vmap(lambda p, r, x: batch_norm_twin.apply(cfg, p, x, r)[0], (0, 0, None))
                    parts.append(evaluated(params, fitted.running, images))
                else:
                    parts.append(stack.logits(params, images, shared=True)[0])
            logits = torch.cat(parts, dim=1)
            accuracy = (logits.argmax(2) == y).float().mean(1).tolist()
            loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")
            losses = loss.unflatten(0, logits.shape[:2]).mean(1).tolist()
            sound = logits.flatten(1).isfinite().all(1).tolist()
        for place, *figures, fine in zip(fitted.alive, accuracy, losses, sound, strict=True):
            found[place] = Ended(figures[0], figures[1], None) if fine else Ended(0.0, math.inf, steps)
    return [found[place] for place in range(runs)]


def _order(images: int, count: int, seed: int) -> Tensor:
    """Return the numbers of `count` images, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed + 1)
    epochs = -(-count // images)
    return torch.cat([torch.randperm(images, generator=generator) for _ in range(epochs)])[:count]


def _rate(setting: Setting, i: int, steps: int) -> float:
    return float(warmup_cosine(i, peak=setting.rate, warmup=max(1, round(steps * setting.warm_up)), total=steps))
