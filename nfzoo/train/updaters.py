"""Make a run's optimizer, and update with it: the papers' own, or any of torch's."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nfzoo.errors import ConfigError
from nfzoo.nn import NFNet
from nfzoo.optim.agc_sgd import AGCSGD, param_groups
from nfzoo.optim.clipping import clip_grads_, unit_shape
from nfzoo.optim.counting import KindCounter, total
from nfzoo.optim.fine_tuning import lr_scales, split_by_scale
from nfzoo.optim.sgd import DECAYED, HEAD_BIAS, ema_
from nfzoo.runtime.device import backend
from nfzoo.runtime.distributed import full_tensor
from nfzoo.train.config import OptimConfig
from nfzoo.types import Params


class Updater(Protocol):
    """The interface of an optimizer in a training step."""

    def begin(self, number: int, lr: float) -> None:
        """Set the learning rate of the step that comes after `number` others."""
        ...

    def step(self, gate: Tensor | None) -> None:
        """Clip each unit's gradient, update the parameters, and move their averages towards them.

        Args:
            gate: a 0-dimensional boolean tensor. If it is false, nothing changes.
        """
        ...

    @property
    def clipped(self) -> Tensor | None:
        """Return the fraction of units that AGC clipped in the last step; `None` if it is not counted."""
        ...

    @property
    def kinds(self) -> Sequence[str]:
        """Return the kinds of the parameters that AGC clips, those of `nfzoo.types.Kind` and `head_bias`, sorted."""
        ...

    @property
    def clipped_kinds(self) -> Tensor | None:
        """Return the fractions of the units of each kind that were clipped, `(kinds,)`; `None` as `clipped`."""
        ...

    @property
    def averages(self) -> Params | None:
        """Return the moving averages by the parameters' names, not copied; `None` where none are kept."""
        ...


class PapersUpdater:
    """Update with `AGCSGD`, which clips, gates, averages and counts by itself, so that the host waits for nothing.

    Args:
        optimizer: the optimizer.
        prepared: the optimizer as Accelerate prepared it, or the optimizer itself.
        live: the model's parameters by name, frozen ones included.
        device: device of the learning rate and of the step number.
    """

    def __init__(self, optimizer: AGCSGD, prepared: Any, live: Params, device: torch.device) -> None:
        self._optimizer, self._prepared, self._live = optimizer, prepared, live
        # A CUDA graph reads each number from a tensor of its own.
        self._lr = {_scale(group): backend(device).number() for group in optimizer.param_groups}
        self._number = backend(device).number()
        clipped = [p for group in optimizer.param_groups if group["clip"] is not None for p in group["params"]]
        self.kinds, optimizer.count_kinds = kind_counter(live, clipped)
        # Created before the first step: a lazy device would compile that step as a program of its own.
        optimizer.init_state()

    def begin(self, number: int, lr: float) -> None:
        for group in self._optimizer.param_groups:
            scale = _scale(group)
            group["lr"], group["steps"] = self._lr[scale](lr * scale), self._number(number)

    def step(self, gate: Tensor | None) -> None:
        self._optimizer.gate = gate
        self._optimizer.clipped_fraction = self._optimizer.clipped_kinds = (
            None  # stays None if a loss scaler skips the step
        )
        self._prepared.step()

    @property
    def clipped(self) -> Tensor | None:
        fraction = self._optimizer.clipped_fraction
        return None if fraction is None else full_tensor(fraction)

    @property
    def clipped_kinds(self) -> Tensor | None:
        return self._optimizer.clipped_kinds

    @property
    def averages(self) -> Params | None:
        kept = any(group["ema_decay"] is not None for group in self._optimizer.param_groups)
        return self._optimizer.averages(self._live) if kept else None


def kind_counter(live: Mapping[str, Tensor], clipped: Iterable[Tensor]) -> tuple[tuple[str, ...], KindCounter]:
    """Return the kinds of the parameters that are clipped, sorted, and the counter of their units.

    Args:
        live: a network's parameters by name.
        clipped: those that AGC clips.
    """
    names = {p: name for name, p in live.items()}
    kind_of = {p: _kind(names[p]) for p in clipped}
    kinds = sorted(set(kind_of.values()))
    units = {p: unit_shape(p.shape)[0] for p in kind_of}
    return tuple(kinds), KindCounter({p: kinds.index(kind) for p, kind in kind_of.items()}, units)


def _kind(name: str) -> str:
    """Return the kind of a parameter by its name: `weight`, `gain`, `bias`, `skip_gain` or `head_bias`."""
    return "head_bias" if name == HEAD_BIAS else name.rpartition(".")[2]


def _scale(group: Mapping[str, Any]) -> float:
    return group.get("lr_scale", 1.0)


class TorchUpdater:
    """Update with any torch optimizer, after AGC and before the average; the host waits for the gate.

    Args:
        optimizer: the optimizer.
        prepared: the optimizer as Accelerate prepared it, or the optimizer itself.
        live: the model's parameters by name, frozen ones included.
        config: the threshold of AGC, which leaves out what the recipe spares, and the decay of the average.
    """

    clipped: Tensor | None = None
    clipped_kinds: Tensor | None = None

    def __init__(self, optimizer: torch.optim.Optimizer, prepared: Any, live: Params, config: OptimConfig) -> None:
        self._optimizer, self._prepared, self._config = optimizer, prepared, config
        unclipped = {"head.weight"} if config.clip_head_bias else {"head.weight", HEAD_BIAS}
        self._trained = {name: p for name, p in live.items() if p.requires_grad}
        self._clipped = [p for name, p in self._trained.items() if name not in unclipped]
        self.kinds, self._count = kind_counter(live, self._clipped if config.clip is not None else [])
        self.averages: Params | None = None
        if config.ema_decay is not None:  # a frozen parameter is its own average
            self.averages = {name: p.detach().clone() if p.requires_grad else p.detach() for name, p in live.items()}

    def begin(self, number: int, lr: float) -> None:
        self._number = number
        for group in self._optimizer.param_groups:
            group["lr"] = lr * _scale(group)

    def step(self, gate: Tensor | None) -> None:
        self.clipped = self.clipped_kinds = None
        if gate is not None and not bool(gate):
            return
        if self._config.clip is not None:
            tallies = clip_grads_(self._clipped, clip=self._config.clip, eps=self._config.agc_eps)
            if tallies:
                self.clipped = total(tallies) / sum(tally.units for tally in tallies)
                self.clipped_kinds = self._count(tallies)
        self._prepared.step()
        skipped = getattr(self._prepared, "step_was_skipped", False)  # by a loss scaler
        if self.averages is not None and self._config.ema_decay is not None and not skipped:
            averages = {name: self.averages[name] for name in self._trained}
            ema_(averages, self._trained, self._number, decay=self._config.ema_decay)


def scales(optim: OptimConfig, model: NFNet) -> dict[Tensor, float]:
    """Return the factor of each parameter's learning rate: see `lr_scales`."""
    named = dict(model.named_parameters())
    factors = lr_scales(named, layer_decay=optim.layer_decay, head_lr_scale=optim.head_lr_scale)
    return {p: factors[name] for name, p in named.items()}


def papers_optimizer(optim: OptimConfig, model: NFNet, lr: float, *, compiled: bool) -> AGCSGD:
    """Make the papers' optimizer of the parameters that are not frozen; `compiled` as in `AGCSGD`."""
    groups = param_groups(model, weight_decay=optim.weight_decay, clip=optim.clip)
    if not optim.clip_head_bias:
        groups = _unclipped(groups, model.get_parameter(HEAD_BIAS))
    groups = split_by_scale(groups, scales(optim, model), lr)
    names = ("momentum", "nesterov", "ema_decay")
    options = {name: getattr(optim, name) for name in names}
    return AGCSGD(groups, lr, eps=optim.agc_eps, compiled=compiled, **options)


def _unclipped(groups: list[dict[str, Any]], spared: Tensor) -> list[dict[str, Any]]:
    """Return groups of which one more holds `spared` alone, which is not clipped."""
    parted: list[dict[str, Any]] = []
    for group in groups:
        others = [p for p in group["params"] if p is not spared]
        parted += [{**group, "params": others}] if others else []
        if len(others) < len(group["params"]):
            parted.append({**group, "params": [spared], "clip": None})
    return parted


def torch_optimizer(optim: OptimConfig, model: NFNet, lr: float) -> torch.optim.Optimizer:
    """Make the optimizer that a recipe names, of the parameters that are not frozen; gains and biases do not decay.

    Raises:
        ConfigError: for a name that is no optimizer's, or options that it does not take.
    """
    kinds = model.parameter_kinds()
    trainable = [(kinds[name], p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for kind, p in trainable if kind in DECAYED], "weight_decay": optim.weight_decay},
        {"params": [p for kind, p in trainable if kind not in DECAYED], "weight_decay": 0.0},
    ]
    package, _, name = ("torch.optim.AdamW" if optim.name == "adamw" else optim.name).rpartition(".")
    try:
        cls = getattr(importlib.import_module(package), name)
        if not issubclass(cls, torch.optim.Optimizer):
            raise TypeError("it is no torch.optim.Optimizer")
        options = {**optim.options, "lr": lr}
        probe = torch.nn.Parameter(torch.zeros(1, 1))
        probe.grad = torch.zeros_like(probe)
        cls([{"params": [probe]}], **options).step()  # which some refuse for other gradients than theirs
        return cls(split_by_scale(groups, scales(optim, model), lr), **options)
    except (ImportError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f'the optimizer {optim.name!r} with options {optim.options!r} cannot be made: {error}; name "sgd", '
            '"adamw", an optimizer such as "torch.optim.NAdam", or the import path of another'
        ) from error
