"""NFNet: "High-Performance Large-Scale Image Recognition Without Normalization", arXiv 2102.06171, section 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nfzoo.config import NFNetConfig
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
class FBlock(ResidualBlock):
    """The NFNet block: 1x1, two grouped 3x3, 1x1, each after an activation; then attention."""

    def specs(self) -> Specs:
        g = self.geometry
        return {
            **self.shortcut_specs(),
            **conv_specs("conv0.", g.inputs, self.middle, 1),
            **conv_specs("conv1.", self.middle, self.middle, 3, self.groups),
            **conv_specs("conv1b.", self.middle, self.middle, 3, self.groups),
            **conv_specs("conv2.", self.middle, g.outputs, 1, gain=self.last_gain),
            **attention_specs(self.attention, g.outputs, self.se_hidden, self.layers.rule),
            **self.skip_gain_specs(),
        }

    def gated_branches(
        self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        act, conv = self.layers.act, self.conv
        out = act(x)
        shortcut = conv(p, "shortcut.", self.pooled(out), beta) if self.geometry.transition else x
        out = conv(p, "conv0.", out, beta)
        out = conv(p, "conv1.", act(out), **self.strided)
        out = conv(p, "conv1b.", act(out), dilation=self.geometry.out_dilation, groups=self.groups)
        out = conv(p, "conv2.", act(out))
        return shortcut, out, attention_gate(self.attention, p, out)


def plan(cfg: NFNetConfig) -> Plan:
    """Return the blocks of an NFNet: four 3x3 convolutions, the tower, a final 1x1 convolution, pool, head."""
    layers, rule = Layers.of(cfg), cfg.rule
    blocks: list[Block] = []
    inputs = cfg.in_channels
    for i, (outputs, stride) in enumerate(zip(cfg.stem, (2, 1, 1, 2), strict=True)):
        conv = Conv(layers, activated=i > 0, stride=stride)
        blocks.append(Block(f"stem.conv{i}", conv, conv_specs("", inputs, outputs, 3), feature=i == 2))
        inputs = outputs
    widths = tuple(rule.channels(w) for w in cfg.widths)
    for position in tower(cfg, inputs=inputs, stem_stride=4, widths=widths):
        outputs = position.geometry.outputs
        groups = rule.channels(outputs * cfg.bottleneck) // cfg.group_width
        block = FBlock(
            layers,
            position.geometry,
            middle=groups * cfg.group_width,
            groups=groups,
            attention=cfg.attention,
            se_hidden=rule.channels(outputs * cfg.se_ratio, floor_fraction=0.0),
            alpha=cfg.alpha,
            skip_init=cfg.skip_init,
        )
        blocks.append(block.block(position))
    features = rule.channels(cfg.widths[-1] * cfg.head_ratio)
    final = Conv(layers, activated=False)
    blocks.append(Block("final_conv", final, conv_specs("", widths[-1], features, 1)))
    return (*blocks, *head_blocks(cfg, features))
