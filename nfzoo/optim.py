"""The optimizer as pure transforms over parameter dictionaries: momentum SGD, moving averages, schedules.

`lr` and `step` may be tensors, so that a compiled step does not recompile when they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .types import Kind, Params

DECAYED: frozenset[Kind] = frozenset({"weight", "head"})
"""Kinds of parameters that weight decay applies to: not gains, biases or skip gains. Source: arXiv 2102.06171."""

CLIPPED: frozenset[Kind] = frozenset({"weight", "gain", "bias", "skip_gain"})
"""Kinds of parameters that AGC applies to: all but the classifier's weight. Source: arXiv 2102.06171, section 4.1."""


class SGDState(NamedTuple):
    """Momentum buffers under the keys of the parameters."""

    momentum: Params


def sgd_init(params: Mapping[str, Tensor]) -> SGDState:
    """Zero momentum."""
    return SGDState({name: torch.zeros_like(p) for name, p in params.items()})


def sgd(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: SGDState,
    *,
    lr: float | Tensor,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    decay: Callable[[str], bool] | None = None,
) -> tuple[Params, SGDState]:
    """One step of SGD with momentum, as torch and DeepMind define it.

    `d = g + weight_decay * p`, `m = momentum * m + d`, `p - lr * (d + momentum * m)`, or `p - lr * m` without Nesterov.

    Args:
        decay: the keys that weight decay applies to, all by default.

    Source: arXiv 2102.06171, section 5; Sutskever et al. 2013 for the momentum.
    """
    new_params, new_momentum = {}, {}
    for name, grad in grads.items():
        p = params[name]
        d = grad + weight_decay * p if weight_decay and (decay is None or decay(name)) else grad
        m = momentum * state.momentum[name] + d
        new_params[name] = p - lr * (d + momentum * m if nesterov else m)
        new_momentum[name] = m
    return new_params, SGDState(new_momentum)


def ema_decay(step: int | Tensor, decay: float = 0.99999) -> float | Tensor:
    """`min(decay, (1 + step) / (10 + step))`: short averages first, as TensorFlow 1 does it. `step` counts from 0."""
    warm = (1.0 + step) / (10.0 + step)
    return warm.clamp(max=decay) if isinstance(warm, Tensor) else min(decay, warm)


def ema(
    average: Mapping[str, Tensor], params: Mapping[str, Tensor], step: int | Tensor, *, decay: float = 0.99999
) -> Params:
    """Exponential moving average `a * d + p * (1 - d)`, with `d` of `ema_decay`; start it as a clone of the parameters.

    Source: `tf1_ema` of the code released with arXiv 2102.06171.
    """
    d = ema_decay(step, decay)
    return {name: a * d + params[name] * (1 - d) for name, a in average.items()}


@torch.no_grad()
def ema_(average: Mapping[str, Tensor], params: Mapping[str, Tensor], step: int, *, decay: float = 0.99999) -> None:
    """`ema` in place: `average` takes the new values."""
    d = ema_decay(step, decay)
    for name, a in average.items():
        a.lerp_(params[name], 1 - d)


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, minimum: float = 0.0) -> float:
    """Learning rate of a step: linear from 0 to `peak` over `warmup` steps, then half a cosine down to `minimum`.

    Steps count from 0; the rate is `peak` at step `warmup` and `minimum` at step `total`.

    Source: arXiv 2102.06171, section 5.
    """
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
