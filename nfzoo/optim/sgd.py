"""The optimizer as pure transforms over parameter dictionaries: momentum SGD, moving averages, schedules.

`lr` and `step` may be tensors, so that a compiled step does not recompile when they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfzoo.torch_internals import foreach, fused_sgd_, in_dispatch_mode
from nfzoo.types import Kind, Params

MOMENTUM = 0.9
"""The papers' momentum. Source: arXiv 2102.06171, section 5."""

WEIGHT_DECAY = 2e-5
"""The papers' weight decay. Source: arXiv 2102.06171, section 5."""

EMA_DECAY = 0.99999
"""The papers' decay of the moving average. Source: arXiv 2102.06171, section 5."""

DECAYED: frozenset[Kind] = frozenset({"weight", "head"})
"""Kinds of parameters that weight decay applies to: not gains, biases or skip gains. Source: arXiv 2102.06171."""

CLIPPED: frozenset[Kind] = frozenset({"weight", "gain", "bias", "skip_gain"})
"""Kinds of parameters that AGC applies to: all but the classifier's weight. Source: arXiv 2102.06171, section 4.1."""

HEAD_BIAS = "head.bias"
"""Name of the classifier's bias, which `clip_head_bias=False` spares."""


FUSED_PART = 64
"""Numbers in a part of a tensor that `sgd_` updates by torch's fused kernel: a multiple of all lengths of vectors."""


class SGDState(NamedTuple):
    """Momentum buffers under the keys of the parameters."""

    momentum: Params


def sgd_init(params: Mapping[str, Tensor]) -> SGDState:
    """Return zero momentum."""
    return SGDState({name: torch.zeros_like(p) for name, p in params.items()})


def sgd(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: SGDState,
    *,
    lr: float | Tensor,
    momentum: float = MOMENTUM,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    decay: Callable[[str], bool] | None = None,
) -> tuple[Params, SGDState]:
    """Take one step of SGD with momentum, as torch and DeepMind define it.

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


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = MOMENTUM,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    gate: Tensor | None = None,
    overwrite: bool = False,
) -> None:
    """Take the step of `sgd` in place, in a few kernels for all tensors of one device and dtype.

    Args:
        overwrite: whether the gradients may be written to, which saves memory.
        gate: a 0-dimensional boolean tensor. Where it is false nothing changes, whatever the gradients hold, and the
            host does not wait to learn which.
    """
    if gate is None and momentum and not isinstance(lr, Tensor):  # torch's kernel takes no momenta without momentum
        params, grads, momenta = _fused_sgd_(
            params, grads, momenta, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )
    if not params:
        return
    p, m, d = list(params), list(momenta), list(grads)
    keep: float | Tensor = momentum
    decay: float | Tensor = weight_decay
    if gate is not None:
        d, overwrite = [torch.where(gate, g, 0.0) for g in d], True
        keep, lr, decay = (
            torch.where(gate, value, other).to(p[0].dtype)
            for value, other in ((momentum, 1.0), (lr, 0.0), (weight_decay, 0.0))
        )
    if weight_decay:
        if not overwrite:
            d, overwrite = [g.clone() for g in d], True
        _add_scaled_(d, p, decay)
    foreach._foreach_mul_(m, keep)
    foreach._foreach_add_(m, d)
    if not nesterov:
        d = m
    elif overwrite:
        foreach._foreach_add_(d, m, alpha=momentum)
    else:
        d = foreach._foreach_add(d, m, alpha=momentum)
    _add_scaled_(p, d, -lr)


def _fused_sgd_(
    params: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor], **options: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Update by torch's fused kernel, in one pass over memory instead of four, what it takes; return the others.

    It takes tensors on a CPU of which no part is smaller than `FUSED_PART`, and computes the same bits of them. In what
    is left over after the last vector, compilers add and multiply at once, which rounds once instead of twice.
    """
    seen = torch.compiler.is_compiling() or in_dispatch_mode()  # by what wants torch's plain operators
    taken: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    others: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for row in zip(params, grads, momenta, strict=True):
        for tensors, t in zip(others if seen or not _is_fusible(*row) else taken, row, strict=True):
            tensors.append(t)
    if taken[0]:
        fused_sgd_(*taken, **options)
    return others


def _is_fusible(*tensors: Tensor) -> bool:
    first = tensors[0]
    return first.numel() % FUSED_PART == 0 and all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.layout == torch.strided
        and t.stride() == first.stride()
        and (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last))
        for t in tensors
    )


def _add_scaled_(tensors: list[Tensor], others: list[Tensor], scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        foreach._foreach_add_(tensors, foreach._foreach_mul(others, scale))
    else:
        foreach._foreach_add_(tensors, others, alpha=scale)


def ema_decay(step: float | Tensor, decay: float = EMA_DECAY) -> float | Tensor:
    """Return `min(decay, (1 + step) / (10 + step))`: short averages first, as in TensorFlow 1. `step` counts from 0."""
    warm = (1.0 + step) / (10.0 + step)
    return warm.clamp(max=decay) if isinstance(warm, Tensor) else min(decay, warm)


def ema(
    average: Mapping[str, Tensor], params: Mapping[str, Tensor], step: int | Tensor, *, decay: float = EMA_DECAY
) -> Params:
    """Return the moving average `a * d + p * (1 - d)`, with `d` of `ema_decay`; start it as a clone of the parameters.

    Source: `tf1_ema` of the code released with arXiv 2102.06171.
    """
    d = ema_decay(step, decay)
    return {name: a * d + params[name] * (1 - d) for name, a in average.items()}


@torch.no_grad()
def ema_(
    average: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    step: float | Tensor,
    *,
    decay: float = EMA_DECAY,
    gate: Tensor | None = None,
) -> None:
    """Move `average` in place as `ema` does, in a few kernels; where `gate` is false, leave it."""
    weight = 1 - ema_decay(step, decay)
    if gate is not None:
        weight = torch.where(gate, weight, 0.0)
    averages, live = list(average.values()), [params[name] for name in average]
    if isinstance(weight, Tensor):
        change = foreach._foreach_sub(live, averages)
        foreach._foreach_mul_(change, weight.to(averages[0].dtype))
        foreach._foreach_add_(averages, change)
    else:
        foreach._foreach_lerp_(averages, live, weight)


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, minimum: float = 0.0) -> float:
    """Return a step's learning rate: linear from 0 to `peak` over `warmup` steps, then half a cosine down to `minimum`.

    Steps count from 0; the rate is `peak` at step `warmup` and `minimum` at step `total`.

    Source: arXiv 2102.06171, section 5.
    """
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
