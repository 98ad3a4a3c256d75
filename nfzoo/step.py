"""One training step as a pure function: loss, gradient, AGC, SGD, moving average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nfzoo.config import ModelConfig
from nfzoo.model import apply, specs
from nfzoo.optim.clipping import CLIP, EPS, agc
from nfzoo.optim.sam import FRACTION, ascent_rows, sam_ascent
from nfzoo.optim.sgd import (
    CLIPPED,
    DECAYED,
    EMA_DECAY,
    HEAD_BIAS,
    MOMENTUM,
    WEIGHT_DECAY,
    SGDState,
    ema,
    sgd,
    sgd_init,
)
from nfzoo.types import Noise, Params


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Hyper-parameters of a step, except for the learning rate.

    The defaults are those of arXiv 2102.06171, for batches of 1024 to 4096. `nfzoo.train.config.OptimConfig` has the
    same fields with defaults for smaller batches.

    Attributes:
        clip: AGC threshold; `None` trains without AGC.
        agc_eps: floor of the parameter norm in AGC.
        clip_head_bias: whether AGC clips the classifier's bias too, as in DeepMind's code. The norm of its gradient is
            then at most `clip * agc_eps` as long as its own norm is below `agc_eps`, as at the beginning.
        momentum, nesterov: of SGD.
        weight_decay: coefficient of the weights that are added to the gradients of kernels and linears.
        label_smoothing: of the cross-entropy.
        ema_decay: of the moving average; `None` keeps none.
        sam_rho: radius of sharpness-aware minimisation; `None` trains without SAM. F6 was trained with 0.05.
        sam_fraction: share of the batch, its first rows, whose gradient gives SAM's ascent.
    """

    clip: float | None = CLIP
    agc_eps: float = EPS
    clip_head_bias: bool = True
    momentum: float = MOMENTUM
    nesterov: bool = True
    weight_decay: float = WEIGHT_DECAY
    label_smoothing: float = 0.1
    ema_decay: float | None = EMA_DECAY
    sam_rho: float | None = None
    sam_fraction: float = FRACTION


class TrainState(NamedTuple):
    """Everything that a step changes. `step` is a 0-dimensional tensor, the number of steps taken."""

    params: Params
    sgd: SGDState
    ema: Params | None
    step: Tensor


class Metrics(NamedTuple):
    """Mean loss and logits `(N, classes)` of the parameters before the step."""

    loss: Tensor
    logits: Tensor


def init_state(params: Params, config: StepConfig | None = None) -> TrainState:
    """Return the state before the first step; the average starts as a clone of the parameters."""
    config = config or StepConfig()
    average = None if config.ema_decay is None else {n: p.detach().clone() for n, p in params.items()}
    device = next(iter(params.values())).device
    return TrainState(params, sgd_init(params), average, torch.zeros((), dtype=torch.int64, device=device))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weight: Tensor | None = None) -> Tensor:
    """Return the mean softmax cross-entropy, in float32 at least, of logits `(N, classes)`; labels may be soft.

        -1 / N  sum_i sum_c  weight_c q_ic log p_ic

    Here q are the labels, one-hot or soft, after smoothing. The sum is divided by N and not by a sum of weights, so the
    mean over the shares of a batch is that of the batch.

    Args:
        weight: of each class, `(classes,)`; 1 by default.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if weight is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    weight = weight.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weight=weight, label_smoothing=label_smoothing, reduction="sum")
    return total / len(logits)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, positive_weight: Tensor | None = None
) -> Tensor:
    """Return the mean sigmoid cross-entropy, in float32 at least, of logits and targets `(N, classes)`.

        -1 / (N classes)  sum_i sum_c  weight_c q_ic log p_ic + (1 - q_ic) log(1 - p_ic)

    Here p are the sigmoids, and `q = (1 - s) target + s / classes` with smoothing s. The mean over the shares of a
    batch is that of the batch.

    Args:
        logits: of each class by itself.
        targets: from 0 to 1, 1 where an image has the label.
        label_smoothing: s.
        positive_weight: of each class, `(classes,)`; 1 by default.

    Source of the smoothing: timm's `BinaryCrossEntropy` and `mixup_target`.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    q = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    weight = None if positive_weight is None else positive_weight.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, q, pos_weight=weight)


def train_step(
    cfg: ModelConfig,
    state: TrainState,
    batch: tuple[Tensor, Tensor],
    noise: Noise | None,
    lr: float | Tensor,
    *,
    config: StepConfig | None = None,
) -> tuple[TrainState, Metrics]:
    """Return the state after one step on `(images, labels)`, and the metrics of that step.

    Args:
        cfg: the model.
        state: see `init_state`.
        batch: images `(N, C, H, W)` and labels `(N,)` or soft labels `(N, classes)`.
        noise: from `sample_noise`; `None` trains without dropout and stochastic depth.
        lr: learning rate, a tensor in compiled code.

    With `config.sam_rho`, gradient, loss and logits are those of the parameters that `sam_ascent` returns.

    Source: arXiv 2102.06171, section 5: AGC on the raw gradient, then weight decay, then Nesterov momentum.
    """
    config = config or StepConfig()
    images, labels = batch
    kinds = parameter_kinds(cfg)

    def loss_fn(params: Mapping[str, Tensor], rows: int) -> tuple[Tensor, Tensor]:
        masks = None if noise is None else {name: mask[:rows] for name, mask in noise.items()}
        logits = apply(cfg, params, images[:rows], masks)
        return cross_entropy(logits, labels[:rows], config.label_smoothing), logits

    at = state.params
    if config.sam_rho is not None:
        rows = ascent_rows(len(images), config.sam_fraction)
        ascent, _ = torch.func.grad(loss_fn, has_aux=True)(state.params, rows)
        at = sam_ascent(state.params, ascent, rho=config.sam_rho)
    grads, (loss, logits) = torch.func.grad_and_value(loss_fn, has_aux=True)(at, len(images))
    if config.clip is not None:

        def where(name: str) -> bool:
            return kinds[name] in CLIPPED and (config.clip_head_bias or name != HEAD_BIAS)

        grads = agc(grads, state.params, clip=config.clip, eps=config.agc_eps, where=where)
    params, momentum = sgd(
        state.params,
        grads,
        state.sgd,
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        decay=lambda name: kinds[name] in DECAYED,
    )
    average = state.ema
    if average is not None and config.ema_decay is not None:
        average = ema(average, params, state.step, decay=config.ema_decay)
    return TrainState(params, momentum, average, state.step + 1), Metrics(loss.detach(), logits.detach())


def parameter_kinds(cfg: ModelConfig) -> dict[str, str]:
    """Return the kind of every parameter, by its key."""
    return {name: kind for name, (_, kind) in specs(cfg).items()}
