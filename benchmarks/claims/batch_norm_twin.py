"""The batch-normalised twin of an NF-ResNet: the pre-activation ResNet with the same convolutions.

Every kernel has the shape that it has in the NF-ResNet. In place of weight standardisation, scaled activations, beta,
alpha and skip gains there is one batch normalisation before each activation. It serves the benchmarks alone: the zoo
has no normalised networks.

Source: He et al., "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027), figure 4e, the baseline of
arXiv 2101.08692 and 2102.06171.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nfzoo.config import NFResNetConfig
from nfzoo.model import init as nf_init
from nfzoo.model import plan
from nfzoo.models import functional as nf
from nfzoo.models.layers import Geometry
from nfzoo.models.nf_resnet import BottleneckBlock
from nfzoo.types import Params

EPS = 1e-5  # torch's default
MOMENTUM = 0.1  # weight of the newest batch in the running statistics, torch's default


def init(cfg: NFResNetConfig, *, generator: torch.Generator | None = None) -> Params:
    """Parameters under the NF-ResNet's keys: its kernels and classifier, drawn alike, then a norm for each activation.

    Kernels are drawn from N(0, 2 / fan_in), as is usual before a ReLU.
    """
    nf_params = nf_init(cfg, generator=generator)
    params: Params = {}
    for name, value in nf_params.items():
        if name in ("head.weight", "head.bias"):
            params[name] = value
        elif value.ndim == 4:
            params[name] = value * 2**0.5
    for name, channels in norms(cfg).items():
        params[f"{name}.scale"] = torch.ones(channels)
        params[f"{name}.shift"] = torch.zeros(channels)
    return params


def norms(cfg: NFResNetConfig) -> dict[str, int]:
    """Channels of every batch normalisation: three a block, and one after the tower."""
    channels: dict[str, int] = {}
    outputs = cfg.stem_width
    for name, block in _blocks(cfg):
        outputs = block.geometry.outputs
        channels[f"{name}.norm0"] = block.geometry.inputs
        channels[f"{name}.norm1"] = block.middle
        channels[f"{name}.norm2"] = block.middle
    return {**channels, "norm": outputs}


def init_statistics(cfg: NFResNetConfig) -> Params:
    """Running means of 0 and variances of 1."""
    found: Params = {}
    for name, channels in norms(cfg).items():
        found[f"{name}.mean"], found[f"{name}.var"] = torch.zeros(channels), torch.ones(channels)
    return found


def update(running: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Params:
    """Running statistics after one more batch."""
    return {name: r + MOMENTUM * (batch[name] - r) for name, r in running.items()}


def apply(
    cfg: NFResNetConfig,
    params: Mapping[str, Tensor],
    x: Tensor,
    running: Mapping[str, Tensor] | None = None,
    *,
    fused: bool = False,
) -> tuple[Tensor, Params]:
    """Logits, and the statistics that normalised them.

    Args:
        running: evaluation mode with these statistics; without, training mode with those of the batch `x`.
        fused: training mode by torch's own kernel, which is faster, and returns no statistics.
    """
    used: Params = {}

    def norm(name: str, x: Tensor) -> Tensor:
        if fused:
            scale, shift = params[f"{name}.scale"], params[f"{name}.shift"]
            return F.batch_norm(x, None, None, scale, shift, training=True, eps=EPS)
        if running is None:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        else:
            mean, var = running[f"{name}.mean"], running[f"{name}.var"]
        used[f"{name}.mean"], used[f"{name}.var"] = mean.detach(), var.detach()
        factor = params[f"{name}.scale"] * torch.rsqrt(var + EPS)
        return x * factor[:, None, None] + (params[f"{name}.shift"] - mean * factor)[:, None, None]

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = params[f"{name}.weight"]
        x, padding = nf.conv_input(x, weight.shape[-1], stride=stride, dilation=1, same=True, skipped_stride=1)
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)

    x = conv("stem.conv", x, stride=2)
    height, width = (nf.same_padding(n, 3, 2) for n in x.shape[-2:])
    x = F.max_pool2d(nf.pad2d(x, height, width, value=float("-inf")), 3, 2)
    for name, block in _blocks(cfg):
        g: Geometry = block.geometry
        out = F.relu(norm(f"{name}.norm0", x))
        shortcut = conv(f"{name}.shortcut", out, g.stride) if g.transition else x
        out = conv(f"{name}.conv0", out)
        out = conv(f"{name}.conv1", F.relu(norm(f"{name}.norm1", out)), g.stride)
        out = conv(f"{name}.conv2", F.relu(norm(f"{name}.norm2", out)))
        x = shortcut + out
    x = F.relu(norm("norm", x)).mean(dim=(2, 3))
    return F.linear(x, params["head.weight"], params["head.bias"]), used


def _blocks(cfg: NFResNetConfig) -> list[tuple[str, BottleneckBlock]]:
    return [(b.name, b.fn) for b in plan(cfg) if isinstance(b.fn, BottleneckBlock)]
