"""The arithmetic of Normalizer-Free networks, each rule once.

Sources: "Characterizing signal propagation to close the performance gap in unnormalized ResNets" (arXiv 2101.08692),
"High-Performance Large-Scale Image Recognition Without Normalization" (arXiv 2102.06171), and the code released with
them. Images are NCHW.

Functions that depend on sizes, dtypes or devices are wrapped: `torch.fx` records a call of them as one node, which
decides when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nfzoo.config import ACTIVATIONS
from nfzoo.errors import ConfigError
from nfzoo.models.weight_standardization import is_channels_last, needs_plain_operations
from nfzoo.models.weight_standardization import standardize_weight as standardize_weight
from nfzoo.torch_internals import in_functorch

fx.wrap("standardize_weight")

# gamma = 1 / std(act(z)), z ~ N(0, 1), as in the released code: the activation then keeps unit variance.
GAMMA: dict[str, float] = {
    "gelu_tanh": 1.7015043497085571,
    "gelu": 1.7015043497085571,
    "relu": 1.7139588594436646,
    "silu": 1.7881293296813965,
}

FEW_PIXELS = 64
"""Pixels of an image up to which a 1x1 convolution is computed as a matrix product: see `is_product`."""

_GELU = 2 * math.sqrt(2 / math.pi)

_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def register_activation(name: str, function: Callable[[Tensor], Tensor], *, gamma: float | None = None) -> float:
    """Make an activation known to configurations under a name, and return its gamma.

    Every process that makes or loads a model with it has to call this before. A saved model names its activation only.

    Args:
        name: a word that no activation has, such as `"mish"`.
        function: elementwise, of a tensor of any shape and dtype. It must be the same function whenever a model is
            loaded.
        gamma: factor that gives the activation unit variance; by default `1 / std(function(z))`, `z ~ N(0, 1)`, by
            quadrature.

    Raises:
        ConfigError: for a name that is taken or no word, and a function that is not elementwise or has no variance.

    Source: arXiv 2101.08692, section 4.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"the name of an activation must be a word such as 'mish', not {name!r}")
    if name in _ACTIVATION and _ACTIVATION[name] is not function:
        raise ConfigError(f"there is an activation {name!r} already; choose another name")
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    try:
        y = function(z.clone())
        sound = isinstance(y, Tensor) and y.shape == z.shape and bool(y.isfinite().all())
    except Exception as error:  # of somebody else's function
        raise ConfigError(f"the activation {name!r} does not take a float64 tensor: {error}") from error
    if not sound:
        raise ConfigError(f"the activation {name!r} must return one finite number for each of its input")
    density = torch.exp(-0.5 * z**2)
    density /= density.sum()
    variance = float((density * y**2).sum() - (density * y).sum() ** 2)
    if gamma is None and not variance > 1e-12:
        raise ConfigError(f"the activation {name!r} has no variance, so there is no gamma")
    if gamma is not None and not (isinstance(gamma, int | float) and 0 < gamma < math.inf):
        raise ConfigError(f"gamma must be a positive number, not {gamma!r}")
    GAMMA[name], _ACTIVATION[name] = gamma or variance**-0.5, function
    if name not in ACTIVATIONS:
        ACTIVATIONS.append(name)
    return GAMMA[name]


def activate(x: Tensor, name: str) -> Tensor:
    """Return `act(x)`, without gamma; `name` is a key of `GAMMA`."""
    if (
        name == "gelu_tanh"
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and x.device.type == "cpu"
    ):
        return _gelu_by_sigmoid(x)
    return fusible_activation(x, name)


def fusible_activation(x: Tensor, name: str) -> Tensor:
    """Return what `activate` does, as an operator that compilers know to be part of the convolution before it."""
    return _ACTIVATION[name](x)


def _gelu_by_sigmoid(x: Tensor) -> Tensor:
    """Return the tanh GELU, `x (1 + tanh(u)) / 2` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`, as `x sigmoid(2 u)`.

    Both are the same number. The kernels that torch's compiler makes for a CPU take half as long for a sigmoid, and for
    its derivative, as for a hyperbolic tangent.
    """
    y = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return (y * torch.sigmoid(_GELU * y * (1 + 0.044715 * y * y))).to(x.dtype)


class RegisteredActivation(nn.Module):
    """An activation of `nfzoo.register_activation`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, self.name)

    def extra_repr(self) -> str:
        return self.name


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Return TensorFlow's SAME padding before and after an axis of `size` pixels: the output has `ceil(size / stride)`.

    If the total is odd, the extra pixel goes behind. Under stride 2 the padding is therefore not symmetric.
    """
    # In this form the padding of a symbolic size, such as 32 * n in an export, is a plain number.
    total = max((kernel - 1) * dilation + 1 - stride + -size % stride, 0)
    return total // 2, total - total // 2


def dense_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return the SAME padding of a strided kernel whose stride is left out (output stride below 32).

    The axis holds `dilation` interleaved copies of the strided network's axis. The front padding is that of the strided
    network, so every `stride * dilation`-th output is the strided network's output.
    """
    front = same_padding(-(-size // dilation), kernel, stride)[0] * dilation
    return front, (kernel - 1) * dilation - front


def pad2d(x: Tensor, height: tuple[int, int], width: tuple[int, int], value: float = 0.0) -> Tensor:
    """Pad the last two axes by `(before, after)` each."""
    return F.pad(x, (*width, *height), value=value)


@fx.wrap
def conv_input(
    x: Tensor, kernel: int, *, stride: int, dilation: int, same: bool, skipped_stride: int
) -> tuple[Tensor, int]:
    """Return a convolution's input, padded where its padding is asymmetric, and the symmetric padding that is left.

    The convolution maps `(N, in, H, W)` to `ceil(H / stride)` rows.

    Args:
        same: whether the padding is SAME (TensorFlow), not symmetric.
        skipped_stride: the stride that was taken out of this convolution to keep the output dense.
    """
    half = (kernel - 1) * dilation // 2
    if kernel == 1 or not same or (stride == 1 and skipped_stride == 1):
        return x, half
    h, w = x.shape[-2:]
    if skipped_stride > 1:
        rows, columns = (dense_padding(n, kernel, skipped_stride, dilation) for n in (h, w))
    else:
        rows, columns = (same_padding(n, kernel, stride, dilation) for n in (h, w))
    return pad2d(x, rows, columns), 0


@fx.wrap
def max_pool(x: Tensor, *, same: bool) -> Tensor:
    """Return the 3x3 max pool of stride 2: `(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))`; `same` pads as SAME."""
    # The operator behind `F.max_pool2d`, whose own form for XLA `torch.func` cannot differentiate.
    pool = torch.ops.aten.max_pool2d_with_indices
    if not same:
        return pool(x, [3, 3], [2, 2], [1, 1])[0]
    height, width = (same_padding(n, 3, 2) for n in x.shape[-2:])
    return pool(pad2d(x, height, width, value=float("-inf")), [3, 3], [2, 2])[0]


def shortcut_pool(x: Tensor, *, stride: int, dilation: int = 1, neighbours: bool = False) -> Tensor:
    """Halve `(N, C, H, W)` by a 2x2 average pool; odd sides are rounded up, and padding does not count.

    `stride=1` leaves the stride out, and averages pixels that lie `dilation` apart. With `neighbours` it averages
    adjacent pixels instead, and padding counts. Source: timm 1.0, `DownsampleAvg` in models/nfnet.py.
    """
    if stride == 2:
        return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
    if neighbours:
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)
    padded = F.pad(x, (0, dilation, 0, dilation))
    ones = F.pad(x.new_ones(x.shape[-2:]), (0, dilation, 0, dilation))

    def window_sum(t: Tensor) -> Tensor:
        rows = t[..., :-dilation, :] + t[..., dilation:, :]
        return rows[..., :-dilation] + rows[..., dilation:]

    return window_sum(padded) / window_sum(ones)


def squeeze_excite(p: Mapping[str, Tensor], x: Tensor, prefix: str = "se") -> Tensor:
    """Return the channel gates `sigmoid(fc1(relu(fc0(mean(x)))))`, `(N, C, 1, 1)`, of `(N, C, H, W)`.

    The caller multiplies by the 2 that NF-networks add. Source: arXiv 1709.01507.
    """
    pooled = global_mean(x)
    hidden = F.relu(F.linear(pooled, p[f"{prefix}.fc0.weight"], p[f"{prefix}.fc0.bias"]))
    return torch.sigmoid(F.linear(hidden, p[f"{prefix}.fc1.weight"], p[f"{prefix}.fc1.bias"]))[:, :, None, None]


def efficient_channel_attention(p: Mapping[str, Tensor], x: Tensor, prefix: str = "eca") -> Tensor:
    """Return channel gates `sigmoid(conv1d(mean(x)))`, `(N, C, 1, 1)`, of `(N, C, H, W)`. Source: arXiv 1910.03151."""
    weight = p[f"{prefix}.weight"]
    gates = F.conv1d(global_mean(x)[:, None], weight, padding=weight.shape[-1] // 2)
    return torch.sigmoid(gates)[:, 0, :, None, None]


@fx.wrap
def global_mean(x: Tensor) -> Tensor:
    """Return the mean over the pixels of `(N, C, H, W)`, accumulated in float32 at least, in the dtype of `x`."""
    exact = x.dtype in (torch.float32, torch.float64)
    if x.device.type not in ("cpu", "cuda") or needs_plain_operations():
        # Not `mean(..., dtype=torch.float32)`: XLA would sum in the dtype of `x` and convert the result.
        return x.mean(dim=(2, 3)) if exact else x.float().mean(dim=(2, 3)).to(x.dtype)
    # The gradient of a sum is one number per channel, expanded. That of a mean is a map in the contiguous layout, which
    # takes a pass to write, and makes slow what adds it to a map in channels last.
    pixels = x.shape[2] * x.shape[3]
    if exact or (x.dtype == torch.bfloat16 and x.device.type == "cpu"):
        # A CPU accumulates a sum of bfloat16 in float32, without a copy of the map in it; sum and quotient are rounded.
        # A sum in float16 could overflow.
        return x.sum(dim=(2, 3)) / pixels
    if is_channels_last(x):  # in this order of axes the cast of the gradient keeps the layout
        return (x.permute(0, 2, 3, 1).flatten(1, 2).float().sum(dim=1) / pixels).to(x.dtype)
    return (x.float().sum(dim=(2, 3)) / pixels).to(x.dtype)


def is_product(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    """Return whether a convolution of `x` is better computed by `conv1x1`: a 1x1 kernel over few pixels on a CPU.

    oneDNN's derivative of a convolution works pixel by pixel, and takes up to five times as long as that of a product
    on 2 x 2 pixels. From 8 x 8 on the two differ little. Graphs of exports and of `torch.fx` keep the convolution.
    """
    return (
        isinstance(x, Tensor)  # and not a proxy of torch.fx
        and (stride, padding, groups) == (1, 0, 1)
        and weight.shape[-1] == 1
        and x.device.type == "cpu"
        and _are_few(x.shape[2], x.shape[3])
        and not _keeps_convolutions()
        and is_channels_last(x)
    )


def _keeps_convolutions() -> bool:
    if torch.compiler.is_compiling():  # a compiler cannot trace the questions below
        return torch.compiler.is_exporting()
    return needs_plain_operations() or in_functorch()


def _are_few(height: int, width: int) -> bool:
    # Sizes that a graph leaves open are no reason to make it one for small images.
    return isinstance(height, int) and isinstance(width, int) and height * width <= FEW_PIXELS


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the convolution by a 1x1 kernel, computed as a matrix product."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
