"""NF-RegNet: "Characterizing signal propagation ... in unnormalized ResNets", arXiv 2101.08692, section 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nfzoo.config import NFRegNetConfig
from nfzoo.models.layers import (
    Conv,
    Layers,
    ResidualBlock,
    attention_gate,
    attention_specs,
    classifier_normal,
    conv_specs,
    head_blocks,
    tower,
    zeros,
)
from nfzoo.types import Block, Plan, Specs


@dataclass(frozen=True)
class RegNetBlock(ResidualBlock):
    """The inverted bottleneck: 1x1, grouped 3x3, attention, 1x1, an activation before each but the attention."""

    def specs(self) -> Specs:
        g = self.geometry
        return {
            **self.shortcut_specs(),
            **conv_specs("conv0.", g.inputs, self.middle, 1),
            **conv_specs("conv1.", self.middle, self.middle, 3, self.groups),
            **attention_specs(self.attention, self.middle, self.se_hidden, self.layers.rule),
            **conv_specs("conv2.", self.middle, g.outputs, 1, gain=self.last_gain),
            **self.skip_gain_specs(),
        }

    def gated_branches(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, None]:
        act, conv = self.layers.act, self.conv
        out = act(x)
        shortcut = conv(p, "shortcut.", self.pooled(out), beta) if self.geometry.transition else x
        out = conv(p, "conv0.", out, beta)
        out = conv(p, "conv1.", act(out), **self.strided)
        gate = attention_gate(self.attention, p, out)
        if gate is not None:
            out = gate * out
        return shortcut, conv(p, "conv2.", act(out)), None


def plan(cfg: NFRegNetConfig) -> Plan:
    """Return the blocks of an NF-RegNet: a 3x3 convolution, the tower, a final 1x1 convolution, pool, head."""
    layers, rule = Layers.of(cfg), cfg.rule
    widths = tuple(rule.channels(w * cfg.width_factor) for w in cfg.widths)
    stem_width = widths[0]
    stem = conv_specs("", cfg.in_channels, stem_width, 3)
    blocks = [Block("stem.conv", Conv(layers, activated=False, stride=2), stem, feature=True)]
    for position in tower(cfg, inputs=stem_width, stem_stride=2, widths=widths):
        ratio = 1.0 if position.block_index == 0 else cfg.bottleneck
        groups = rule.channels(position.geometry.inputs * ratio) // cfg.group_width
        middle = groups * cfg.group_width
        block = RegNetBlock(
            layers,
            position.geometry,
            middle=middle,
            groups=groups,
            attention="se",
            se_hidden=rule.channels(middle * cfg.se_ratio, floor_fraction=0.0),
            alpha=cfg.alpha,
            skip_init=cfg.skip_init,
        )
        blocks.append(block.block(position))
    if rule.divisor:
        features = rule.channels(1280 * cfg.widths[-1] // 440 * cfg.width_factor)
    else:
        features = int(1280 * widths[-1] // 440)
    final = Conv(layers, activated=False)
    blocks.append(Block("final_conv", final, conv_specs("", widths[-1], features, 1)))
    return (*blocks, *head_blocks(cfg, features, zeros if rule.skip_gain else classifier_normal))
