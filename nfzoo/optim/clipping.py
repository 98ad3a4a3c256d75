"""Adaptive Gradient Clipping: each output unit's gradient is limited to a fraction of its weights' norm.

The module is long because the rule stands in five forms: pure, for `DTensor`s, for many tensors at once, in place, and
in front of an optimizer.

Source: arXiv 2102.06171, section 4.1 and equation 3; `agc` of the code released with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nfzoo.optim.counting import Tally, tally_masks, tally_shards, total
from nfzoo.optim.parameters import Excluded, Names, Parameters, find_excluded, select
from nfzoo.runtime.distributed import is_dtensor, local_tensor, sum_over
from nfzoo.torch_internals import foreach as many
from nfzoo.types import Params

CLIP = 0.01
"""The papers' AGC threshold, for batches of 1024 to 4096. Source: arXiv 2102.06171, section 4.1."""

EPS = 1e-3
"""The papers' floor of the parameter norm in AGC, so that zero-initialised parameters can move."""

FOREACH_DEVICES = ("cpu", "cuda", "xpu")  # devices on which torch's `clip_grad_norm_` computes with many tensors too

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
    """Return the L2 norm of each output unit, broadcastable to `x`, in float32 at least: see `unit_shape`."""
    if x.ndim <= 1:
        return torch.linalg.vector_norm(x, dtype=_norm_dtype(x))
    first = 0 if unit_shape(x.shape)[0] == 1 else 1
    return torch.linalg.vector_norm(x, dim=tuple(range(first, x.ndim)), keepdim=True, dtype=_norm_dtype(x))


def _norm_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of a norm, if it is not that of `x`: in float16 the square of 256 is infinite."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None


def clip_unitwise(grad: Tensor, param: Tensor, *, clip: float, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Clip one gradient; return it and the boolean mask of the units that were clipped: see `agc`."""
    factor, clipped = _factor(unitwise_norm(grad), unitwise_norm(param), clip=clip, eps=eps)
    return (grad * factor).to(grad.dtype), clipped


def clip_dtensors(
    grads: Sequence[Any], params: Sequence[Any], *, clip: float, eps: float = EPS
) -> tuple[list[Tensor], Tally]:
    """Clip gradients that are `DTensor`s, and leave these as they are; all processes call this.

    Each process computes with what it holds: operations on `DTensor`s would cost the host a multiple. Only units that
    lie across processes need a sum over these, which is one for all gradients of the same placement.

    Returns:
        What this process holds of the clipped gradients, and the tally of the units of all processes.
    """
    from torch.distributed.tensor import Replicate

    norms: list[tuple[Tensor, Tensor]] = []  # of gradient and parameter, of units that this process has a part of
    spread: list[tuple[bool, ...]] = []  # for each dimension of the mesh: whether each process has other units
    across: dict[Any, list[int]] = {}  # gradients with units that lie across processes
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        several = unit_shape(grad.shape)[0] != 1
        placements = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
        held = [tensor.redistribute(placements=placements).to_local() for tensor in (grad, param)]
        norms.append((_unit_norms(held[0], several), _unit_norms(held[1], several)))
        along = [_split_dimension(placement, grad.ndim) for placement in placements]
        spread.append(tuple(several and dimension == 0 for dimension in along))
        split = tuple(d is not None and not other for d, other in zip(along, spread[-1], strict=True))
        if any(split):
            across.setdefault((grad.device_mesh, split, norms[-1][0].dtype), []).append(i)
    for (mesh, split, _), some in across.items():
        parts = [norm for i in some for norm in norms[i]]
        whole = sum_over(torch.cat(parts).square(), mesh, split).sqrt().split([len(norm) for norm in parts])
        for i, *pair in zip(some, whole[::2], whole[1::2], strict=True):
            norms[i] = (pair[0], pair[1])
    clipped, masks = [], []
    for grad, pair in zip(grads, norms, strict=True):
        factor, mask = _factor(*pair, clip=clip, eps=eps)
        local = grad.to_local()
        factor = factor.reshape(-1, *[1] * (local.ndim - 1))
        clipped.append((local * factor).to(local.dtype).reshape(local.shape))
        masks.append(mask)
    return clipped, tally_shards(masks, params, spread, sum(unit_shape(p.shape)[0] for p in params))


def _split_dimension(placement: Any, dimensions: int) -> int | None:
    """Return the dimension of a tensor that a placement splits among processes, `None` if each has all of it."""
    if placement.is_replicate():
        return None
    if not hasattr(placement, "dim"):  # FSDP2 over tensor parallelism has one too, in a placement that is no `Shard`
        raise TypeError(f"AGC does not support gradients with the placement {placement!r}; exclude their parameters")
    return placement.dim % dimensions


def _unit_norms(x: Tensor, several: bool) -> Tensor:
    """Return the norms of what is here of a parameter's units, `(units,)`."""
    dtype = _norm_dtype(x)
    if several:
        return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype)
    return torch.linalg.vector_norm(x, dtype=dtype).reshape(1)


def _factor(grad_norm: Tensor, param_norm: Tensor, *, clip: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return the factor of each unit's gradient, 1 where it is not clipped, and the mask of the clipped units."""
    limit = clip * param_norm.clamp(min=eps)
    clipped = grad_norm > limit
    return torch.where(clipped, limit / grad_norm.clamp(min=GRADIENT_FLOOR), 1.0), clipped


def clip_all(
    grads: Sequence[Tensor], params: Sequence[Tensor], *, clip: float, eps: float = EPS, in_place: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Clip many gradients, at least one, of one device and dtype, in few kernels: see `agc`.

    A kernel or linear costs two norms and a product; all parameters of one unit together cost as much as one, and so do
    the limits of all units.

    Args:
        in_place: write to `grads`; otherwise the inputs stay as they are.

    Returns:
        The gradients, and the boolean mask of the units that were clipped, `(units of all,)`.
    """
    units = [unit_shape(p.shape)[0] for p in params]
    wide = [i for i, count in enumerate(units) if count != 1]
    flat = [i for i, count in enumerate(units) if count == 1]

    def norms(tensors: Sequence[Tensor]) -> Tensor:
        dtype = _norm_dtype(tensors[0])
        rows = [torch.linalg.vector_norm(tensors[i].flatten(1), dim=1, dtype=dtype) for i in wide]
        whole = many._foreach_norm([tensors[i] for i in flat], dtype=dtype) if flat else ()
        return torch.cat([*rows, torch.stack(list(whole))] if flat else rows)

    factor, clipped = _factor(norms(grads), norms(params), clip=clip, eps=eps)
    out: list[Tensor] = [*grads]
    parts = factor.split([*(units[i] for i in wide), len(flat)])
    for i, part in zip(wide, parts, strict=False):
        part = part.reshape(-1, *[1] * (grads[i].ndim - 1))
        out[i] = grads[i].mul_(part) if in_place else (grads[i] * part).to(grads[i].dtype)
    if flat:
        counts = [params[i].numel() for i in flat]
        joined = torch.cat([grads[i].reshape(-1) for i in flat])
        joined = (joined * parts[-1][_unit_of_element(tuple(counts), joined.device)]).to(joined.dtype)
        for i, piece in zip(flat, joined.split(counts), strict=True):
            out[i] = piece.reshape(grads[i].shape)
        if in_place:
            many._foreach_copy_([grads[i] for i in flat], [out[i] for i in flat])
    return list(grads) if in_place else out, clipped


def mask_owners(params: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Return the parameters in the order in which the mask of `clip_all` has their units, each with their number."""
    owners = [(p, unit_shape(p.shape)[0]) for p in params]
    return [*(owner for owner in owners if owner[1] != 1), *(owner for owner in owners if owner[1] == 1)]


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
        if not isinstance(value, int | float | Tensor) or isinstance(value, bool) or not value > 0:
            remedy = "; to train without clipping, leave AGC out" if name == "clip" else ""
            raise ValueError(f"{name} must be positive, not {value!r}{remedy}")


@torch.no_grad()
def clip_grad_agc_(
    parameters: Parameters,
    clip: float = CLIP,
    *,
    eps: float = EPS,
    exclude: Excluded = (),
    foreach: bool | None = None,
) -> Tensor:
    """Clip the `.grad` of parameters in place, unit by unit, and return the fraction of units that were clipped.

    Call it between `backward` and the step of any optimizer, in the place of `torch.nn.utils.clip_grad_norm_`. With a
    `GradScaler`, call `scaler.unscale_(optimizer)` first: AGC compares gradients with weights, so their scale matters.
    Parameters may be `DTensor`s, such as those of `fully_shard`; then all processes have to call it.

    Args:
        parameters: a module, a tensor, tensors, or `model.named_parameters()`. Of the zoo models in a module the
            classifier's weight is left out by itself, also if the module wraps them or holds them as parts. All other
            parameters of a module are clipped.
        clip, eps: see `agc`.
        exclude: parameters not to clip, such as the classifier's weight of another library's model: tensors, modules
            for all of their parameters, or names, if `parameters` has names.
        foreach: whether to clip all gradients of one device and dtype in few kernels, for which the vectors among them
            are copied. By default so on CPUs and GPUs, like `torch.nn.utils.clip_grad_norm_`. `DTensor`s and other
            subclasses of `Tensor` are always clipped one by one.

    Returns:
        A 0-dimensional float32 tensor on the first gradient's device, for which the host does not wait; 0 if there is
        no gradient. Units of `DTensor`s are counted over all processes.

    Raises:
        ConfigError: if a zoo model is folded for inference.
        TypeError: for arguments of other types, for sparse gradients, and for `DTensor`s with other placements than
            `Replicate`, `Partial`, `Shard`, and that of `fully_shard` over tensor parallelism.
        ValueError: if `clip` or `eps` is not positive, if what is excluded is not among the parameters, and for a
            `FullyShardedDataParallel`.

    Source: arXiv 2102.06171, equation 3.
    """
    check_clip(clip, eps)
    tallies = clip_grads_(select(parameters, exclude), clip=clip, eps=eps, foreach=foreach)
    if not tallies:
        return torch.zeros((), dtype=torch.float32)
    return total(tallies).to(torch.float32) / max(sum(tally.units for tally in tallies), 1)


@torch.no_grad()
def agc_(
    parameters: Parameters,
    *,
    clip: float = CLIP,
    eps: float = EPS,
    exclude: Excluded = (),
) -> None:
    """Clip the `.grad` of parameters in place, as `clip_grad_agc_` does, without counting the clipped units.

    Args:
        parameters, clip, eps, exclude: see `clip_grad_agc_`.

    Raises:
        ConfigError, TypeError, ValueError: see `clip_grad_agc_`.
    """
    check_clip(clip, eps)
    clip_grads_(select(parameters, exclude), clip=clip, eps=eps)


@torch.no_grad()
def clip_grads_(params: Iterable[Tensor], *, clip: float, eps: float, foreach: bool | None = None) -> list[Tally]:
    """Clip gradients in place where there are any; return tallies of the units that were clipped."""
    masks: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}  # as those of one tally are joined
    sharded: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    lists: dict[tuple[torch.device, torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    pairs = [(p, p.grad) for p in params if p.grad is not None]
    for p, grad in pairs:
        if grad.layout != torch.strided:
            raise TypeError(
                f"AGC needs dense gradients, but that of a parameter of shape {tuple(p.shape)} is sparse; exclude it"
            )
    for p, grad in pairs:
        if is_dtensor(p):
            sharded.setdefault(p.device, []).append((p, grad))
            continue
        plain = type(p) in (Tensor, nn.Parameter) and type(grad) is Tensor
        if plain and (p.device.type in FOREACH_DEVICES if foreach is None else foreach):
            lists.setdefault((p.device, p.dtype, grad.dtype), []).append((p, grad))
        else:
            clipped, mask = clip_unitwise(grad, p, clip=clip, eps=eps)
            grad.copy_(clipped)
            masks.setdefault(p.device, []).append((mask, p))
    tallies = [tally_masks(*map(list, zip(*some, strict=True))) for some in masks.values()]
    for some in sharded.values():
        of, grads = zip(*some, strict=True)
        parts, tally = clip_dtensors(grads, of, clip=clip, eps=eps)
        for grad, part in zip(grads, parts, strict=True):
            local_tensor(grad).copy_(part)
        tallies.append(tally)
    for some in lists.values():
        of, grads = zip(*some, strict=True)
        mask = clip_all(grads, of, clip=clip, eps=eps, in_place=True)[1]
        tallies.append(Tally(mask, mask_owners(of), len(mask)))
    return tallies


def with_agc(
    optimizer: torch.optim.Optimizer,
    *,
    clip: float = CLIP,
    eps: float = EPS,
    exclude: Excluded = (),
) -> torch.optim.Optimizer:
    """Put AGC in front of any torch optimizer: `optimizer = with_agc(AdamW(model.parameters()), clip=0.01)`.

    Every `step` clips the gradients first, also those that a closure computes. Gradients that a `GradScaler` left
    scaled are unscaled before. A parameter group's own `"clip"` replaces `clip`, and `None` there leaves the group
    alone. The clipping is a hook, which torch does not copy or pickle: call this again on a copied optimizer
    (`load_state_dict` needs nothing).

    Args:
        exclude: parameters not to clip, as for `clip_grad_agc_`; the papers leave out the classifier's weight alone.
            Names are known if the optimizer was made of `model.named_parameters()`.

    Returns:
        The same optimizer.

    Raises:
        TypeError, ValueError: see `clip_grad_agc_`.
    """
    check_clip(clip, eps)
    names: Names = {}
    for group in optimizer.param_groups:
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
            names.setdefault(name, set()).add(p)
    excluded = find_excluded(exclude, [p for group in optimizer.param_groups for p in group["params"]], names)

    @torch.no_grad()
    def clip_all_groups() -> None:
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for optimizers that unscale by themselves
        for group in optimizer.param_groups:
            if scale is not None:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale)
            limit = group.get("clip", clip)
            if limit is not None:
                check_clip(limit, eps)
                clip_grads_([p for p in group["params"] if p not in excluded], clip=limit, eps=eps)
        if scale is not None:
            optimizer.grad_scale = None  # type: ignore[attr-defined]

    def clip_before_step(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)  # behind the optimizer itself
        if given is None:
            clip_all_groups()
            return None

        def closure() -> Any:  # the gradients are there after it
            loss = given()
            clip_all_groups()
            return loss

        return args[:1], {**kwargs, "closure": closure}

    optimizer.register_step_pre_hook(clip_before_step)
    return optimizer
