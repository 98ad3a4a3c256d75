"""NF-ResNet: "Characterizing signal propagation ... in unnormalized ResNets", arXiv 2101.08692, section 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nfzoo.config import NFResNetConfig
from nfzoo.models import functional as nf
from nfzoo.models.layers import (
    Conv,
    Layers,
    ResidualBlock,
    attention_gate,
    attention_specs,
    conv_specs,
    head_blocks,
    tower,
)
from nfzoo.types import Block, Plan, Specs


@dataclass(frozen=True)
class BottleneckBlock(ResidualBlock):
    """The pre-activation bottleneck of a ResNet: 1x1, 3x3, 1x1, each after an activation; then attention."""

    def specs(self) -> Specs:
        g = self.geometry
        return {
            **self.shortcut_specs(),
            **conv_specs("conv0.", g.inputs, self.middle, 1),
            **conv_specs("conv1.", self.middle, self.middle, 3),
            **conv_specs("conv2.", self.middle, g.outputs, 1, gain=self.last_gain),
            **attention_specs(self.attention, g.outputs, self.se_hidden, self.layers.rule),
            **self.skip_gain_specs(),
        }

    def gated_branches(
        self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        act, conv = self.layers.act, self.conv
        out = act(x)
        if not self.geometry.transition:
            shortcut = x
        elif self.layers.rule.pooled_shortcut:
            shortcut = conv(p, "shortcut.", self.pooled(out), beta)
        else:  # DeepMind's 1x1 kernel strides over the activated input
            shortcut = conv(p, "shortcut.", out, beta, stride=self.geometry.stride)
        out = conv(p, "conv0.", out, beta)
        out = conv(p, "conv1.", act(out), **self.strided)
        out = conv(p, "conv2.", act(out))
        return shortcut, out, attention_gate(self.attention, p, out)


@dataclass(frozen=True)
class MaxPool:
    """`nf.max_pool` as a block."""

    same: bool

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        return nf.max_pool(x, same=self.same)


def plan(cfg: NFResNetConfig) -> Plan:
    """Return the blocks of an NF-ResNet: a 7x7 convolution and a max pool, the tower, pool, head."""
    layers, rule = Layers.of(cfg), cfg.rule
    stem = conv_specs("", cfg.in_channels, cfg.stem_width, 7)
    blocks = [
        Block("stem.conv", Conv(layers, activated=False, stride=2), stem, feature=True),
        Block("stem.pool", MaxPool(rule.same_padding), {}),
    ]
    widths = tuple(rule.channels(w) for w in cfg.widths)
    for position in tower(cfg, inputs=cfg.stem_width, stem_stride=4, widths=widths):
        outputs = position.geometry.outputs
        block = BottleneckBlock(
            layers,
            position.geometry,
            middle=rule.channels(outputs * cfg.bottleneck),
            groups=1,
            attention=cfg.attention,
            se_hidden=rule.channels(outputs * rule.se_ratio, floor_fraction=0.0),
            alpha=cfg.alpha,
            skip_init=cfg.skip_init,
        )
        blocks.append(block.block(position))
    return (*blocks, *head_blocks(cfg, widths[-1]))
