"""NF-ResNet: "Characterizing signal propagation ... in unnormalized ResNets", arXiv 2101.08692, section 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .. import functional as nf
from ..config import NFResNetConfig
from ..types import Block, Plan, Specs
from .parts import Conv, Layers, ResidualBlock, attend, attention_specs, conv_specs, head_blocks, tower


@dataclass(frozen=True)
class BottleneckBlock(ResidualBlock):
    """The pre-activation bottleneck of a ResNet: 1x1, 3x3, 1x1, each after an activation; then attention."""

    se_hidden: int

    def specs(self) -> Specs:
        shortcut = conv_specs("shortcut.", self.inputs, self.outputs, 1) if self.transition else {}
        return {
            **shortcut,
            **conv_specs("conv0.", self.inputs, self.middle, 1),
            **conv_specs("conv1.", self.middle, self.middle, 3),
            **conv_specs("conv2.", self.middle, self.outputs, 1, gain=self.last_gain),
            **attention_specs(self.attention, self.outputs, self.se_hidden, self.layers.rule),
            **self.skip_gain_specs(),
        }

    def branches(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
        act, conv = self.layers.act, self.layers.conv
        out = act(x) * beta
        shortcut = x
        if self.transition and self.layers.rule.pooled_shortcut:
            pooled = self.stride * self.skipped_stride > 1
            shortcut = nf.shortcut_pool(out, stride=self.stride, dilation=self.dilation) if pooled else out
            shortcut = conv(p, "shortcut.", shortcut)
        elif self.transition:
            shortcut = conv(p, "shortcut.", out, stride=self.stride)
        out = conv(p, "conv0.", out)
        strided = {"stride": self.stride, "skipped_stride": self.skipped_stride, "dilation": self.dilation}
        out = conv(p, "conv1.", act(out), **strided)
        out = conv(p, "conv2.", act(out))
        return shortcut, attend(self.attention, p, out)


@dataclass(frozen=True)
class MaxPool:
    """3x3 max pool of stride 2: `(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))`."""

    same: bool

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        if not self.same:
            return F.max_pool2d(x, 3, 2, 1)
        height, width = (nf.same_padding(n, 3, 2) for n in x.shape[-2:])
        return F.max_pool2d(nf.pad2d(x, height, width, value=float("-inf")), 3, 2)


def plan(cfg: NFResNetConfig) -> Plan:
    """The blocks of an NF-ResNet: a 7x7 convolution and a max pool, the tower, pool, head."""
    layers, rule = Layers.of(cfg), cfg.rule
    stem = conv_specs("", cfg.in_channels, cfg.stem_width, 7)
    blocks = [
        Block("stem.conv", Conv(layers, activated=False, stride=2), stem, feature=True),
        Block("stem.pool", MaxPool(rule.same_padding), {}),
    ]
    widths = tuple(rule.channels(w) for w in cfg.widths)
    for site in tower(cfg, inputs=cfg.stem_width, stem_stride=4, widths=widths):
        block = BottleneckBlock(
            layers=layers,
            inputs=site.inputs,
            outputs=site.outputs,
            middle=rule.channels(site.outputs * cfg.bottleneck),
            groups=1,
            stride=site.stride,
            skipped_stride=site.skipped_stride,
            dilation=site.dilation,
            out_dilation=site.out_dilation,
            transition=site.transition,
            attention=cfg.attention,
            alpha=cfg.alpha,
            se_hidden=rule.channels(site.outputs * rule.se_ratio, floor_fraction=0.0),
        )
        blocks.append(block.block(site))
    return (*blocks, *head_blocks(cfg, widths[-1]))
