"""Inference on a GPU by cuBLASLt: a linear layer or a 1x1 convolution, its bias and its activation in one kernel.

cuDNN's convolution leaves bias and activation to a second kernel, which reads and writes the whole output once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nfzoo import torch_internals
from nfzoo.models import functional as nf
from nfzoo.models.weight_standardization import is_channels_last

# What the kernels can apply; their GELU is the tanh form.
_ACTIVATIONS = ("gelu_tanh", "relu")
_DTYPES = (torch.bfloat16, torch.float16)  # in float32 a matrix product is exact where a convolution takes TF32


def supports(x: Tensor, *weights: Tensor, alone: bool = False) -> bool:
    """Return whether this module computes with these tensors in the current mode; `alone` as for `onednn.supports`."""
    if x.device.type != "cuda" or x.dtype not in _DTYPES or not x.numel():
        return False
    return torch_internals.only_computes(x, *weights, alone=alone)


def is_linear(x: Tensor, weight: Tensor, *, stride: int) -> bool:
    """Return whether a convolution of one group is a linear layer of pixels that lie in memory one after another."""
    return weight.shape[-2:] == (1, 1) and stride == 1 and is_channels_last(x)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    """Convolve `(N, in, H, W)`, channels last, by `(out, in, 1, 1)`, then apply the activation without gamma."""
    count, _, height, width = x.shape
    rows = linear(x.permute(0, 2, 3, 1).flatten(0, 2), weight.flatten(1), bias, activation)
    return rows.unflatten(0, (count, height, width)).permute(0, 3, 1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    """Compute `act(x @ weight.T + bias)` of `(N, in)` and `(out, in)`, without gamma."""
    if activation in _ACTIVATIONS:
        return torch_internals.addmm_activation(bias, x, weight.t(), gelu=activation == "gelu_tanh")
    y = F.linear(x, weight, bias)
    return y if activation is None else nf.activate(y, activation)
