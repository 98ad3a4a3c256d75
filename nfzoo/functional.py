"""The arithmetic of Normalizer-Free networks, each rule once.

Sources: "Characterizing signal propagation to close the performance gap in unnormalized ResNets" (arXiv 2101.08692),
"High-Performance Large-Scale Image Recognition Without Normalization" (arXiv 2102.06171), and the code released with
them. Images are NCHW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# gamma = 1 / std(act(z)), z ~ N(0, 1), as in the released code: the activation then keeps unit variance.
GAMMA: dict[str, float] = {
    "gelu_tanh": 1.7015043497085571,
    "gelu": 1.7015043497085571,
    "relu": 1.7139588594436646,
    "silu": 1.7881293296813965,
}

_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}

VARIANCE_FLOOR = 1e-4  # of var(W) * fan_in, in DeepMind's WSConv2D
VARIANCE_OFFSET = 1e-5  # added to var(W), in timm's ScaledStdConv2d as its NF-models use it


def activate(x: Tensor, name: str) -> Tensor:
    """`act(x)` without its gamma; `name` is a key of `GAMMA`."""
    return _ACTIVATION[name](x)


def scaled_activation(x: Tensor, name: str) -> Tensor:
    """`gamma * act(x)`, of unit variance for `x ~ N(0, 1)`. Source: arXiv 2101.08692, section 4."""
    return _ACTIVATION[name](x) * GAMMA[name]


def standardize_weight(weight: Tensor, gain: Tensor, *, floor: bool = True, scale: float = 1.0) -> Tensor:
    """Scaled weight standardisation of a kernel, per output channel.

    `(W - mean(W)) * s`, `s = scale * gain * rsqrt(max(var(W) * fan_in, 1e-4))`, with the biased variance; with
    `floor=False` the root is of `(var(W) + 1e-5) * fan_in` instead. Computed in float32 at least.

    Args:
        weight: `(out, in / groups, height, width)`.
        gain: `(out,)`.
        floor: whether small variances are floored (DeepMind) or offset (timm).
        scale: a constant that multiplies the result (timm puts gamma here).

    Source: arXiv 2101.08692, equation 5; `WSConv2D` of the code released with arXiv 2102.06171.
    """
    w = weight.flatten(1)
    if w.dtype not in (torch.float32, torch.float64):
        w = w.float()
    if floor and w.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        rows: Tensor = _FlooredRows.apply(w, gain.to(w.dtype) * scale)[0]  # type: ignore[index]
        return rows.reshape(weight.shape).to(weight.dtype)
    # Two passes over rows: E[W^2] - E[W]^2 would cancel.
    centred = w - w.mean(dim=1, keepdim=True)
    total = centred.square().sum(dim=1, keepdim=True)  # var(W) * fan_in
    root = total.clamp(min=VARIANCE_FLOOR) if floor else total + VARIANCE_OFFSET * w.shape[1]
    s = torch.rsqrt(root) * gain.to(w.dtype)[:, None]
    if scale != 1.0:
        s = s * scale
    return (centred * s).reshape(weight.shape).to(weight.dtype)


class _FlooredRows(torch.autograd.Function):
    """`standardize_weight` of rows with floored variances, its derivatives written out.

    Fewer passes over memory, and no second copy of the weights is kept for the backward pass. With c the centred row,
    `s = rsqrt(max(|c|², floor))` and `a = <g, c> s`, the gradient of the row is `gain s (g - mean(g) - c a s)`, without
    its last term below the floor, and that of the gain is a.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, centred, total, s = _centred(w)
        return centred * (s * gain[:, None]), mean, total, s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        w, gain = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, gain, *output[1:])
        ctx.save_for_forward(w, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        w, gain, mean, total, s = ctx.saved_tensors
        g = grads[0]
        if g is None:
            return None, None
        again = torch.is_grad_enabled()  # somebody will differentiate this as well
        if again:
            mean, centred, total, s = _centred(w)
        else:
            centred = w - mean
        along = (g * centred).sum(dim=1, keepdim=True) * s
        k = gain[:, None] * s
        bend = torch.where(total >= VARIANCE_FLOOR, -k * along * s, 0.0)
        level = g - g.mean(dim=1, keepdim=True)
        if again:
            return (level * k).addcmul(centred, bend), along[:, 0]
        return level.mul_(k).addcmul_(centred, bend), along[:, 0]  # the same numbers in less memory

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        w, gain = ctx.saved_tensors
        dw, dgain = tangents
        _, centred, total, s = _centred(w)
        out = torch.zeros_like(w)
        if dw is not None:
            moved = dw - dw.mean(dim=1, keepdim=True)
            bend = (moved * centred).sum(dim=1, keepdim=True) * s * s
            out = (moved - centred * torch.where(total >= VARIANCE_FLOOR, bend, 0.0)) * (gain[:, None] * s)
        return out if dgain is None else out + centred * (s * dgain[:, None]), None, None, None


def _centred(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The means of rows, rows without them, the squared norms of those, the factors to norm 1 above the floor."""
    mean = w.mean(dim=1, keepdim=True)
    centred = w - mean
    total = centred.square().sum(dim=1, keepdim=True)
    return mean, centred, total, torch.rsqrt(total.clamp(min=VARIANCE_FLOOR))


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding before and after one axis of `size` pixels that TensorFlow calls SAME: output `ceil(size / stride)`.

    Of an odd total the extra pixel goes behind, so that it is not symmetric under stride 2.
    """
    # In this form the padding of a symbolic size, such as 32 * n in an export, is a plain number.
    total = max((kernel - 1) * dilation + 1 - stride + -size % stride, 0)
    return total // 2, total - total // 2


def dense_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """SAME padding of a strided kernel whose stride is left out (output stride below 32).

    The axis holds `dilation` interleaved copies of the strided network's axis; the front padding is the strided
    network's own, so that every `stride * dilation`-th output is the strided network's output.
    """
    front = same_padding(-(-size // dilation), kernel, stride)[0] * dilation
    return front, (kernel - 1) * dilation - front


def pad2d(x: Tensor, height: tuple[int, int], width: tuple[int, int], value: float = 0.0) -> Tensor:
    """Pad the last two axes by `(before, after)` each."""
    return F.pad(x, (*width, *height), value=value)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    same: bool = True,
    skipped_stride: int = 1,
) -> Tensor:
    """Convolution of `(N, in, H, W)` with SAME (TensorFlow) or symmetric padding, to `ceil(H / stride)` rows.

    `skipped_stride` is the stride that was taken out of this convolution to keep the output dense.
    """
    x, padding = conv_input(
        x, weight.shape[-1], stride=stride, dilation=dilation, same=same, skipped_stride=skipped_stride
    )
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv_input(
    x: Tensor, kernel: int, *, stride: int, dilation: int, same: bool, skipped_stride: int
) -> tuple[Tensor, int]:
    """`(N, in, H, W)` padded where `conv2d` needs more than an equal margin on all sides, and that margin."""
    half = (kernel - 1) * dilation // 2
    if kernel == 1 or not same or (stride == 1 and skipped_stride == 1):
        return x, half
    h, w = x.shape[-2:]
    if skipped_stride > 1:
        rows, columns = (dense_padding(n, kernel, skipped_stride, dilation) for n in (h, w))
    else:
        rows, columns = (same_padding(n, kernel, stride, dilation) for n in (h, w))
    return pad2d(x, rows, columns), 0


def shortcut_pool(x: Tensor, *, stride: int, dilation: int = 1) -> Tensor:
    """2x2 average pool that halves `(N, C, H, W)`, rounding up, padding not counted.

    With `stride=1` it is the same pool with the stride left out, over neighbours `dilation` pixels apart.
    """
    if stride == 2:
        return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
    padded = F.pad(x, (0, dilation, 0, dilation))
    ones = F.pad(x.new_ones(x.shape[-2:]), (0, dilation, 0, dilation))

    def window_sum(t: Tensor) -> Tensor:
        rows = t[..., :-dilation, :] + t[..., dilation:, :]
        return rows[..., :-dilation] + rows[..., dilation:]

    return window_sum(padded) / window_sum(ones)


def squeeze_excite(p: Mapping[str, Tensor], x: Tensor, prefix: str = "se") -> Tensor:
    """Channel gates `sigmoid(fc1(relu(fc0(mean(x)))))` of `(N, C, H, W)`, shape `(N, C, 1, 1)`.

    Source: arXiv 1709.01507. NF-networks multiply by 2 as well, which is the caller's.
    """
    pooled = global_mean(x)
    hidden = F.relu(F.linear(pooled, p[f"{prefix}.fc0.weight"], p[f"{prefix}.fc0.bias"]))
    return torch.sigmoid(F.linear(hidden, p[f"{prefix}.fc1.weight"], p[f"{prefix}.fc1.bias"]))[:, :, None, None]


def efficient_channel_attention(p: Mapping[str, Tensor], x: Tensor, prefix: str = "eca") -> Tensor:
    """Channel gates `sigmoid(conv1d(mean(x)))` of `(N, C, H, W)`, shape `(N, C, 1, 1)`. Source: arXiv 1910.03151."""
    weight = p[f"{prefix}.weight"]
    gates = F.conv1d(global_mean(x)[:, None], weight, padding=weight.shape[-1] // 2)
    return torch.sigmoid(gates)[:, 0, :, None, None]


def global_mean(x: Tensor) -> Tensor:
    """Mean over the pixels of `(N, C, H, W)`, accumulated in float32 at least; `(N, C)`, of the dtype of `x`."""
    if x.dtype in (torch.float32, torch.float64):
        return x.mean(dim=(2, 3))
    # Not `mean(..., dtype=torch.float32)`: XLA would sum in the dtype of `x` and convert the result.
    return x.float().mean(dim=(2, 3)).to(x.dtype)
