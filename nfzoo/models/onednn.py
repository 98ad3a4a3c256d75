"""Inference on a CPU by oneDNN: convolution and activation in one kernel, with weights laid out once.

torch's own convolution lays out its weights anew in every call, passes over its output once more for the activation,
and takes a slower kernel for one image on one core. This module calls the operator with which torch's compiler
replaces convolutions whose weights are constants.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from nfzoo import torch_internals
from nfzoo.models import functional as nf
from nfzoo.types import BlockFn

# oneDNN's name of each activation, and its variant of GELU.
_NAMES = {
    None: ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
_DTYPES = torch_internals.onednn_convolution_dtypes()

# Where a depthwise convolution by ones computes the tanh GELU faster than torch, whose kernel takes 2.4 times as long:
# in maps of so many numbers, in multiples of so many channels.
_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"
_LARGE, _LANES = 1 << 16, 16


class PackedWeight:
    """A kernel `(out, in / groups, height, width)`, or a matrix as a 1x1 kernel, laid out for oneDNN at its first use.

    The kernel is laid out anew for another size of batch or image, so that results depend on their input alone, and
    after an in-place change of the weight. Changes through `.data` or numpy go unnoticed, and so do changes of weights
    that were created in inference mode.
    """

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain
        # The key, the plain weight (which keeps its memory from being reused, as the key has its address), and the
        # result. They are one attribute, since other threads may compute with the same model.
        self._cache: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    @property
    def kernel(self) -> Tensor:
        """Return the plain weight with four axes."""
        return self.plain if self.plain.ndim == 4 else self.plain[:, :, None, None]

    @property
    def shape(self) -> torch.Size:
        return self.kernel.shape

    def packed(self, images: torch.Size, padding: int, stride: int, dilation: int, groups: int) -> Tensor:
        """Return the kernel in oneDNN's layout for a convolution of `images`."""
        plain, cache = self.kernel, self._cache
        version = None if plain.is_inference() else plain._version
        key = (plain.data_ptr(), version, plain.dtype, images, padding, stride, dilation, groups)
        if cache is None or cache[0] != key:
            source = plain.detach()
            geometry = {"padding": padding, "stride": stride, "dilation": dilation, "groups": groups}
            packed = torch_internals.onednn_convolution_weight(source, images, **geometry)
            self._cache = cache = (key, source, packed)
        return cache[2]


SQUEEZE_EXCITE = ("se.fc0.weight", "se.fc1.weight")
"""Matrices that `PackedBlock` lays out as 1x1 kernels in bfloat16; in float32 that gains nothing."""


class PackedBlock:
    """A block function of a folded plan whose kernels are laid out once."""

    def __init__(self, fn: BlockFn) -> None:
        self.fn = fn
        self._weights: dict[str, PackedWeight] = {}

    def __call__(self, params: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        if not supports(x):
            if x.device.type != "cpu":
                self._weights.clear()  # the model has moved to another device
            return self.fn(params, x, beta, keep)
        local: dict[str, Any] = dict(params)
        for name, value in params.items():
            if value.ndim == 4 or (name in SQUEEZE_EXCITE and value.dtype == torch.bfloat16):
                if name not in self._weights or self._weights[name].plain is not value:
                    self._weights[name] = PackedWeight(value)
                local[name] = self._weights[name]
        return self.fn(local, x, beta, keep)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedBlock:
        return PackedBlock(self.fn)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedBlock, (self.fn,)


def supports(x: Tensor, *weights: Tensor, alone: bool = False) -> bool:
    """Return whether oneDNN's operator supports these tensors in the current mode.

    It supports no derivatives, transforms, tracing or autocast. While a graph is compiled, a transform around it cannot
    be seen from within: `alone` asserts that there is none.
    """
    if x.device.type != "cpu" or x.dtype not in _DTYPES or not x.numel():
        return False
    return torch_internals.only_computes(x, *weights, alone=alone)


@fx.wrap
def activate(x: Tensor, name: str) -> Tensor:
    """Apply an activation without gamma as `nf.activate` does; by oneDNN where that is faster."""
    if (
        name != "gelu_tanh"
        or torch.compiler.is_compiling()  # compilers compute it in one pass with what is around it
        or not _WIDE
        or x.numel() < _LARGE
        or x.shape[1] % _LANES
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not supports(x)
    ):
        return nf.activate(x, name)
    channels = x.shape[1]
    weight, bias = _identity(channels, x.dtype)
    geometry = {"padding": 0, "stride": 1, "dilation": 1, "groups": channels}
    return torch_internals.onednn_convolution(x, weight, bias, **geometry, activation=_NAMES[name])


@functools.cache
def _identity(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of the depthwise convolution that changes nothing."""
    with torch.inference_mode(False):  # all modes share them
        return torch.ones((channels, 1, 1, 1), dtype=dtype), torch.zeros(channels, dtype=dtype)


def conv2d(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor,
    *,
    activation: str | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    same: bool = True,
    skipped_stride: int = 1,
    alone: bool = False,
) -> Tensor:
    """Convolve as `Layers.conv` does, then apply the activation without gamma; by oneDNN where it supports that."""
    x, padding = nf.conv_input(
        x, weight.shape[-1], stride=stride, dilation=dilation, same=same, skipped_stride=skipped_stride
    )
    plain = weight.kernel if isinstance(weight, PackedWeight) else weight
    if not supports(x, plain, bias, alone=alone):
        x = F.conv2d(x, plain, bias, stride, padding, dilation, groups)
        return x if activation is None else nf.fusible_activation(x, activation)
    if isinstance(weight, PackedWeight):
        weight = weight.packed(x.shape, padding, stride, dilation, groups)
    geometry = {"padding": padding, "stride": stride, "dilation": dilation, "groups": groups}
    fused = activation if activation in _NAMES else None
    x = torch_internals.onednn_convolution(x, weight, bias, **geometry, activation=_NAMES[fused])
    return x if activation is None or activation == fused else nf.activate(x, activation)
