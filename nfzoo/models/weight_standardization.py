"""Scaled weight standardisation in three forms: eager, for compilers, and by compiled passes over a kernel's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.torch_internals import in_forward_ad, in_functionalization, in_functorch, in_jit_trace

VARIANCE_FLOOR = 1e-4  # of var(W) * fan_in, in DeepMind's WSConv2D
VARIANCE_OFFSET = 1e-5  # added to var(W), in timm's ScaledStdConv2d as its NF-models use it


class RowKernels(NamedTuple):
    """The two passes of `standardize_weight` over the rows of a kernel, plain or compiled."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]


def standardize_weight(
    weight: Tensor,
    gain: Tensor,
    *,
    floor: bool = True,
    scale: float | Tensor = 1.0,
    kernels: RowKernels | None = None,
) -> Tensor:
    """Standardise a kernel per output channel, and scale it by its gain.

    The result is `(W - mean(W)) * s` with `s = scale * gain * rsqrt(max(var(W) * fan_in, 1e-4))` and the biased
    variance. With `floor=False`, `s = scale * gain * rsqrt((var(W) + 1e-5) * fan_in)`. It is computed in float32 at
    least. Under autocast the result has autocast's dtype, which spares the convolution a pass that converts it.

    Args:
        weight: `(out, in / groups, height, width)`. The result has its memory format.
        gain: `(out,)`.
        floor: whether small variances are floored (DeepMind) or offset (timm).
        scale: a factor without a gradient: gamma, and beta.
        kernels: compiled forms of `PLAIN_ROWS` to compute with.

    Source: arXiv 2101.08692, equation 5; `WSConv2D` of the code released with arXiv 2102.06171.
    """
    # Statistics do not depend on the order within a row: channels last is read, and written, as it lies in memory.
    last = is_channels_last(weight)
    w = weight.permute(0, 2, 3, 1).flatten(1) if last else weight.flatten(1)
    if w.dtype not in (torch.float32, torch.float64):
        w = w.float()
    factor = gain.to(w.dtype)
    if isinstance(scale, Tensor) or scale != 1.0:
        factor = factor * scale
    if kernels or (w.device.type in ("cpu", "cuda") and not needs_plain_operations()):
        device, dtype = w.device.type, weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device)
        rows: Tensor = _Rows.apply(w, factor, floor, kernels or PLAIN_ROWS, dtype)[0]  # type: ignore[index]
    else:
        rows = _standardized(w, factor, floor, weight.dtype)[0]
    if last:
        out, inputs, height, width = weight.shape
        return rows.reshape(out, height, width, inputs).permute(0, 3, 1, 2)
    return rows.reshape(weight.shape)


def needs_plain_operations() -> bool:
    """Return whether something wants to see torch's operators: a compiler or tracer, or a transform of higher order."""
    return torch.compiler.is_compiling() or in_jit_trace() or in_forward_ad() or in_functionalization()


def is_channels_last(tensor: Tensor) -> bool:
    """Return whether the strides of a tensor are those of a dense one in memory format channels last."""
    if tensor.ndim != 4:
        return False
    _, channels, height, width = tensor.shape
    return tensor.stride() == (height * width * channels, 1, width * channels, channels)


def _centred(w: Tensor, floor: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows' means, the centred rows, their squared norms, and the reciprocal square roots."""
    mean = w.mean(dim=1, keepdim=True)
    centred = w - mean  # two passes over rows: E[W²] - E[W]² would cancel
    total = centred.square().sum(dim=1, keepdim=True)  # var(W) * fan_in
    return mean, centred, total, _reciprocal_root(total, w.shape[1], floor)


def _reciprocal_root(total: Tensor, fan_in: int, floor: bool) -> Tensor:
    return torch.rsqrt(total.clamp(min=VARIANCE_FLOOR) if floor else total + VARIANCE_OFFSET * fan_in)


def _standardized(w: Tensor, gain: Tensor, floor: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return standardised rows, and for their derivatives the means, squared norms and reciprocal square roots."""
    mean, centred, total, s = _centred(w, floor)
    return (centred * (s * gain[:, None])).to(dtype), mean, total, s


def _standardized_eagerly(
    w: Tensor, gain: Tensor, floor: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_standardized` does, outside of compilers and transforms with one temporary instead of three."""
    if needs_plain_operations() or in_functorch():
        return _standardized(w, gain, floor, dtype)
    mean = w.mean(dim=1, keepdim=True)
    centred = w - mean
    total = torch.linalg.vector_norm(centred, dim=1, keepdim=True).square()
    s = _reciprocal_root(total, w.shape[1], floor)
    return centred.mul_(s * gain[:, None]).to(dtype), mean, total, s


def _bending(value: Tensor, total: Tensor, floor: bool) -> Tensor:
    """Return `value`, but 0 for rows below the floor, whose factor is constant."""
    return torch.where(total >= VARIANCE_FLOOR, value, 0.0) if floor else value


def _row_gradients(
    w: Tensor, gain: Tensor, mean: Tensor, total: Tensor, s: Tensor, g: Tensor, floor: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and gains, where `g` is the gradient of the standardised rows.

    Temporaries are written in place, as new memory of a kernel's size takes longer to provide than to compute with.
    """
    centred = w - mean
    converted = g.dtype != w.dtype  # to a tensor of our own
    g = g.to(w.dtype)
    along = torch.linalg.vecdot(g, centred, dim=1)[:, None] * s
    k = gain[:, None] * s
    bend = _bending(-k * along * s, total, floor)
    shift = g.mean(dim=1, keepdim=True)
    g = g.sub_(shift) if converted else g - shift
    return centred.mul_(bend).addcmul_(g, k), along[:, 0]


PLAIN_ROWS = RowKernels(_standardized_eagerly, _row_gradients)


class _Rows(torch.autograd.Function):
    """`standardize_weight` of rows, with its derivatives written out.

    This takes fewer passes over memory than autograd, and keeps no second copy of the weights for the backward pass.
    Let c be the centred row, `s = rsqrt(max(|c|², floor))` and `a = <g, c> s`. The gradient of the row is
    `gain s (g - mean(g) - c a s)`, where the last term is 0 below the floor. The gradient of the gain is a.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        w: Tensor, gain: Tensor, floor: bool, kernels: RowKernels, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return kernels.forward(w, gain, floor, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        w, gain, ctx.floor, ctx.kernels, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, gain, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        w, gain, mean, total, s = ctx.saved_tensors
        g = grads[0]
        if g is None:
            return None, None, None, None, None
        if not (torch.is_grad_enabled() or in_forward_ad() or in_functorch()):
            return *ctx.kernels.backward(w, gain, mean, total, s, g, ctx.floor), None, None, None
        # This pass is itself differentiated, and must follow from `w`, or mapped, and must not write in place.
        mean, centred, total, s = _centred(w, ctx.floor)
        g = g.to(w.dtype)
        along = (g * centred).sum(dim=1, keepdim=True) * s
        k = gain[:, None] * s
        bend = _bending(-k * along * s, total, ctx.floor)
        return ((g - g.mean(dim=1, keepdim=True)) * k).addcmul(centred, bend), along[:, 0], None, None, None
