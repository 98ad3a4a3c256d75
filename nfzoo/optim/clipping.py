"""Adaptive Gradient Clipping: each output unit's gradient is limited to a fraction of its weights' norm.

Source: arXiv 2102.06171, section 4.1 and equation 3; `agc` of the code released with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nfzoo.optim.parameters import Excluded, Names, Parameters, find_excluded, select
from nfzoo.torch_internals import foreach
from nfzoo.types import Params

CLIP = 0.01
"""The papers' AGC threshold, for batches of 1024 to 4096. Source: arXiv 2102.06171, section 4.1."""

EPS = 1e-3
"""The papers' floor of the parameter norm in AGC, so that zero-initialised parameters can move."""

GRADIENT_FLOOR = 1e-6  # keeps the division finite, as in the released code


def unit_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return a parameter's number of output units, and how many numbers each of them has.

    Kernels `(out, in / groups, ...)` and linears `(out, in)` have a unit for each `out`. What has at most one dimension
    of another size than 1 is a vector, and so one unit: gains and biases, but also linears `(out, 1)`, of fan-in 1.

    Source: `unitwise_norm` of the code released with arXiv 2102.06171, and of optax.
    """
    if sum(size != 1 for size in shape) <= 1:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def unitwise_norm(x: Tensor) -> Tensor:
    """Return the L2 norm of each output unit, broadcastable to `x`: see `unit_shape`."""
    if x.ndim <= 1:
        return torch.linalg.vector_norm(x)
    first = 0 if unit_shape(x.shape)[0] == 1 else 1
    return torch.linalg.vector_norm(x, dim=tuple(range(first, x.ndim)), keepdim=True)


def clip_unitwise(grad: Tensor, param: Tensor, *, clip: float, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Clip one gradient; return it and the boolean mask of the units that were clipped: see `agc`."""
    limit = clip * unitwise_norm(param).clamp(min=eps)
    norm = unitwise_norm(grad)
    clipped = norm > limit
    return torch.where(clipped, grad * (limit / norm.clamp(min=GRADIENT_FLOOR)), grad), clipped


class Clipped(NamedTuple):
    """Result of `clip_all`: the gradients, how many units were clipped (0-dimensional), and of how many."""

    grads: list[Tensor]
    clipped: Tensor
    units: int


def clip_all(grads: Sequence[Tensor], params: Sequence[Tensor], *, clip: float, eps: float = EPS) -> Clipped:
    """Clip many gradients, at least one, of one device and dtype, in few kernels: see `agc`.

    A kernel or linear costs two norms and a product; all parameters of one unit together cost as much as one, and so do
    the limits of all units. The inputs stay as they are.
    """
    units = [unit_shape(p.shape)[0] for p in params]
    wide = [i for i, count in enumerate(units) if count != 1]
    flat = [i for i, count in enumerate(units) if count == 1]

    def norms(tensors: Sequence[Tensor]) -> Tensor:
        rows = [torch.linalg.vector_norm(tensors[i].flatten(1), dim=1) for i in wide]
        whole = foreach._foreach_norm([tensors[i] for i in flat]) if flat else ()
        return torch.cat([*rows, torch.stack(list(whole))] if flat else rows)

    limit = clip * norms(params).clamp_(min=eps)
    norm = norms(grads)
    clipped = norm > limit
    factor = torch.where(clipped, limit / norm.clamp(min=GRADIENT_FLOOR), 1.0)
    out: list[Tensor] = [*grads]
    parts = factor.split([*(units[i] for i in wide), len(flat)])
    for i, part in zip(wide, parts, strict=False):
        out[i] = grads[i] * part.reshape(-1, *[1] * (grads[i].ndim - 1))
    if flat:
        counts = [params[i].numel() for i in flat]
        joined = torch.cat([grads[i].reshape(-1) for i in flat])
        joined = joined * parts[-1][_unit_of_element(tuple(counts), joined.device)]
        for i, piece in zip(flat, joined.split(counts), strict=True):
            out[i] = piece.reshape(grads[i].shape)
    return Clipped(out, clipped.sum(), len(factor))


@functools.lru_cache(maxsize=64)
def _unit_of_element(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `[0] * counts[0] + [1] * counts[1] + ...`, kept on the device: a copy would hold up each step."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)


def agc(
    grads: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    *,
    clip: float = CLIP,
    eps: float = EPS,
    where: Callable[[str], bool] | None = None,
) -> Params:
    """Clip gradients: `g * limit / max(|g|, 1e-6)` where `|g| > limit = clip * max(|p|, eps)`, per output unit.

    Args:
        grads, params: tensors under the same keys.
        clip: the largest allowed ratio of gradient to parameter norm; 0.01 for batches of 1024 to 4096, more for less.
        eps: floor of the parameter norm, so that zero-initialised parameters can move.
        where: the keys to clip, all by default. The papers leave out the classifier's weight alone.

    Raises:
        ValueError: if `clip` or `eps` is not positive.

    Source: arXiv 2102.06171, equation 3.
    """
    check_clip(clip, eps)
    return {
        name: clip_unitwise(grad, params[name], clip=clip, eps=eps)[0] if where is None or where(name) else grad
        for name, grad in grads.items()
    }


def clipped_fraction(
    grads: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    *,
    clip: float = CLIP,
    eps: float = EPS,
    where: Callable[[str], bool] | None = None,
) -> Tensor:
    """Return the fraction of the output units that `agc` would clip, a 0-dimensional float32 tensor."""
    check_clip(clip, eps)
    masks = [
        clip_unitwise(grad, params[name], clip=clip, eps=eps)[1].flatten()
        for name, grad in grads.items()
        if where is None or where(name)
    ]
    return torch.cat(masks).float().mean() if masks else torch.zeros(())


def check_clip(clip: float, eps: float) -> None:
    """Raise a `ValueError` unless both are positive numbers."""
    for name, value in (("clip", clip), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value!r}; to train without clipping, leave AGC out")


@torch.no_grad()
def agc_(
    parameters: Parameters,
    *,
    clip: float = CLIP,
    eps: float = EPS,
    exclude: Excluded = (),
) -> None:
    """Clip the `.grad` of parameters in place: call it between `backward` and `optimizer.step`.

    With a `GradScaler`, call `scaler.unscale_(optimizer)` first: AGC compares gradients with weights, so their scale
    matters.

    Args:
        parameters: a module, a tensor, tensors, or `model.named_parameters()`. Of the zoo models in a module the
            classifier's weight is left out by itself, also if the module wraps them or holds them as parts. All other
            parameters of a module are clipped.
        clip, eps: see `agc`.
        exclude: parameters not to clip, such as the classifier's weight of another library's model: tensors, modules
            for all of their parameters, or names, if `parameters` has names.

    Raises:
        ConfigError: if a zoo model is folded for inference.
        TypeError: for arguments of other types.
        ValueError: if `clip` or `eps` is not positive, if what is excluded is not among the parameters, and for a
            `FullyShardedDataParallel`.
    """
    check_clip(clip, eps)
    for p in select(parameters, exclude):
        if p.grad is not None:
            p.grad.copy_(clip_unitwise(p.grad, p, clip=clip, eps=eps)[0])


def with_agc(
    optimizer: torch.optim.Optimizer,
    *,
    clip: float = CLIP,
    eps: float = EPS,
    exclude: Excluded = (),
) -> torch.optim.Optimizer:
    """Put AGC in front of any torch optimizer: `optimizer = with_agc(AdamW(model.parameters()), clip=0.01)`.

    Every `step` clips the gradients first; gradients that a `GradScaler` left scaled are unscaled before. A parameter
    group's own `"clip"` replaces `clip`, and `None` there leaves the group alone. The clipping is a hook, which torch
    does not copy or pickle: call this again on a copied optimizer (`load_state_dict` needs nothing).

    Args:
        exclude: parameters not to clip, as for `agc_`; the papers leave out the classifier's weight alone. Names are
            known if the optimizer was made of `model.named_parameters()`.

    Returns:
        The same optimizer.

    Raises:
        TypeError, ValueError: see `agc_`.
    """
    check_clip(clip, eps)
    names: Names = {}
    for group in optimizer.param_groups:
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
            names.setdefault(name, set()).add(p)
    excluded = find_excluded(exclude, [p for group in optimizer.param_groups for p in group["params"]], names)

    @torch.no_grad()
    def clip_before_step(opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        scale = getattr(opt, "grad_scale", None)  # set by GradScaler for optimizers that unscale by themselves
        for group in opt.param_groups:
            limit = group.get("clip", clip)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if scale is not None:
                    p.grad.div_(scale)
                if limit is not None and p not in excluded:
                    p.grad.copy_(clip_unitwise(p.grad, p, clip=limit, eps=eps)[0])
        if scale is not None:
            opt.grad_scale = None  # type: ignore[attr-defined]

    optimizer.register_step_pre_hook(clip_before_step)
    return optimizer
