"""The parts of every family's plan: layers under a set of rules, parameter specs, residual blocks, the head.

It is longer than most modules, since a residual block is read together with its layers and its place in the tower.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nfzoo.config import Attention, ModelConfig, Rules
from nfzoo.models import functional as nf
from nfzoo.models.weight_standardization import RowKernels
from nfzoo.types import Block, Drop, Init, ParamSpec, Specs

# ---------------------------------------------------------------- initial values


@dataclass(frozen=True)
class Constant:
    """Initial values that are all one number."""

    value: float

    def __call__(self, shape, *, generator=None, device=None, dtype=None) -> Tensor:
        return torch.full(shape, self.value, device=device, dtype=dtype)


zeros, ones = Constant(0.0), Constant(1.0)


def fan_in_normal(shape, *, generator=None, device=None, dtype=None) -> Tensor:
    """Draw from N(0, 1 / fan_in)."""
    std = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, std, generator=generator)


def fan_in_truncated(shape, *, generator=None, device=None, dtype=None) -> Tensor:
    """Draw from N(0, 1 / fan_in) truncated at two standard deviations: Haiku's default for linear layers."""
    std = math.prod(shape[1:]) ** -0.5
    value = torch.empty(shape, device=device, dtype=dtype)
    return torch.nn.init.trunc_normal_(value, 0.0, std, -2 * std, 2 * std, generator=generator)


def fan_in_uniform(shape, *, generator=None, device=None, dtype=None) -> Tensor:
    """Draw from U(-a, a) with a = fan_in ** -0.5: torch's default for convolutions."""
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound, generator=generator)


def classifier_normal(shape, *, generator=None, device=None, dtype=None) -> Tensor:
    """Draw from N(0, 0.01 ** 2). Source: arXiv 2102.06171, appendix."""
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, 0.01, generator=generator)


# ---------------------------------------------------------------- layers under rules


@dataclass(frozen=True)
class Layers:
    """Activation and convolution under a set of rules. It compares by value, as blocks must.

    Attributes:
        ready: whether the kernels in the parameters are standardised already, by `standardized`.
    """

    activation: str
    rule: Rules
    ready: bool = False

    @classmethod
    def of(cls, cfg: ModelConfig) -> Layers:
        return cls(cfg.activation, cfg.rule)

    def act(self, x: Tensor) -> Tensor:
        """Apply the activation; its gamma is in the kernel that reads it: see `scale`."""
        return nf.activate(x, self.activation)

    @property
    def gamma(self) -> float:
        """The factor that gives an activation of N(0, 1) unit variance."""
        return nf.GAMMA[self.activation]

    @property
    def pool_gamma(self) -> float:
        """The factor of the activation before the pool, which no kernel reads: 1 where gamma is one of kernels."""
        return 1.0 if self.rule.gamma_on_weight else self.gamma

    def scale(self, *, activated: bool) -> float:
        """Return the constant factor of a kernel: gamma after an activation, and under timm's rules everywhere."""
        return self.gamma if activated or self.rule.gamma_on_weight else 1.0

    def weight(
        self, p: Mapping[str, Tensor], name: str, scale: float | Tensor, kernels: RowKernels | None = None
    ) -> Tensor:
        """Return the standardised kernel of convolution `name`, times `scale`."""
        return nf.standardize_weight(
            p[f"{name}weight"], p[f"{name}gain"], floor=self.rule.variance_floor, scale=scale, kernels=kernels
        )


@dataclass(frozen=True)
class Standardizing(abc.ABC):
    """A block function with weight-standardised convolutions.

    Attributes:
        layers: the rules under which it computes.
    """

    layers: Layers

    @abc.abstractmethod
    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        """Return the block's output: see `BlockFn`."""

    @abc.abstractmethod
    def scale(self, name: str, beta: float | Tensor) -> float | Tensor:
        """Return the constant factor of the standardised kernel `name`: that of the activation that it reads."""

    def conv(
        self,
        p: Mapping[str, Tensor],
        name: str,
        x: Tensor,
        beta: float | Tensor = 1.0,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        skipped_stride: int = 1,
    ) -> Tensor:
        """Convolve `x` with the standardised `{name}weight`, times `{name}gain` and `scale`, and add `{name}bias`.

        Args:
            beta: the block's, which counts for kernels that read its input.
        """
        rule, bias = self.layers.rule, p[f"{name}bias"]
        weight = p[f"{name}weight"]
        if not self.layers.ready:
            weight = self.layers.weight(p, name, self.scale(name, beta))
        x, padding = nf.conv_input(
            x,
            weight.shape[-1],
            stride=stride,
            dilation=dilation,
            same=rule.same_padding,
            skipped_stride=skipped_stride,
        )
        if nf.is_product(x, weight, stride, padding, groups):
            return nf.conv1x1(x, weight, bias)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def standardized(
        self, p: Mapping[str, Tensor], beta: float | Tensor, kernels: RowKernels | None = None
    ) -> dict[str, Tensor]:
        """Return the parameters of `made_ready()`: kernels standardised, their gains removed."""
        names = [key.removesuffix("weight") for key in p if key.endswith("weight")]
        convolutions = [name for name in names if f"{name}gain" in p]
        rest = {key: value for key, value in p.items() if key.removesuffix("gain") not in convolutions}
        weights = {
            f"{name}weight": self.layers.weight(p, name, self.scale(name, beta), kernels) for name in convolutions
        }
        return {**rest, **weights}

    def made_ready(self) -> Self:
        """Return this function of kernels that are `standardized` already."""
        return dataclasses.replace(self, layers=dataclasses.replace(self.layers, ready=True))


def conv_specs(name: str, inputs: int, outputs: int, kernel: int, groups: int = 1, gain: Init = ones) -> Specs:
    """Return the parameters of one weight-standardised convolution."""
    return {
        f"{name}weight": ParamSpec((outputs, inputs // groups, kernel, kernel), fan_in_normal, "weight"),
        f"{name}gain": ParamSpec((outputs,), gain, "gain"),
        f"{name}bias": ParamSpec((outputs,), zeros, "bias"),
    }


def attention_specs(kind: Attention, channels: int, hidden: int, rule: Rules) -> Specs:
    """Return the parameters of squeeze-excite (`se.fc0`, `se.fc1`) or efficient channel attention (`eca`)."""
    if kind == "none":
        return {}
    if kind == "eca":
        kernel = int(abs(math.log2(channels) + 1) / 2)  # arXiv 1910.03151, equation 12, gamma = 2, b = 1
        kernel = max(3, kernel + 1 - kernel % 2)
        return {"eca.weight": ParamSpec((1, 1, kernel), fan_in_uniform, "weight")}
    linear = fan_in_truncated if rule.skip_gain else fan_in_normal
    return {
        "se.fc0.weight": ParamSpec((hidden, channels), linear, "weight"),
        "se.fc0.bias": ParamSpec((hidden,), zeros, "bias"),
        "se.fc1.weight": ParamSpec((channels, hidden), linear, "weight"),
        "se.fc1.bias": ParamSpec((channels,), zeros, "bias"),
    }


def attention_gate(kind: Attention, p: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """Return `2 * gate`, `(N, C, 1, 1)`, or `None` without attention.

    A gate is 1/2 on average, so the 2 keeps the scale. Source: arXiv 2101.08692, section 4.
    """
    if kind == "none":
        return None
    return 2 * (nf.squeeze_excite(p, x) if kind == "se" else nf.efficient_channel_attention(p, x))


# ---------------------------------------------------------------- the residual tower


class Geometry(NamedTuple):
    """Channels and pixels of a residual block.

    `dilation` belongs to the input grid, `out_dilation` to the output grid. They differ by the factor `skipped_stride`,
    which is above 1 only where `output_stride` is below the network's own.
    """

    inputs: int
    outputs: int
    stride: int
    skipped_stride: int
    dilation: int
    out_dilation: int

    @property
    def downsamples(self) -> bool:
        """True if the block halves the resolution, or would if its stride were not left out."""
        return self.stride * self.skipped_stride > 1

    @property
    def transition(self) -> bool:
        """True if the block changes resolution or width, so that its shortcut is a convolution."""
        return self.downsamples or self.inputs != self.outputs


class Position(NamedTuple):
    """Position of a residual block in the tower."""

    name: str
    block_index: int
    geometry: Geometry
    beta: float
    drop: Drop | None
    feature: bool


def tower(cfg: ModelConfig, *, inputs: int, stem_stride: int, widths: tuple[int, ...]) -> Iterator[Position]:
    """Yield the position of each residual block, in order.

    `beta = 1 / sqrt(expected variance)`. The expected variance starts at 1. The first block of each stage resets it to
    1; then every block, the first included, adds `alpha ** 2`. Source: arXiv 2101.08692, section 4.
    """
    variance, total_stride, dilation, index = 1.0, stem_stride, 1, 0
    blocks = sum(cfg.depths)
    steps = max(blocks - 1, 1) if cfg.rule.last_block_rate else blocks
    for stage, (depth, outputs) in enumerate(zip(cfg.depths, widths, strict=True)):
        for b in range(depth):
            nominal = 2 if b == 0 and (stage > 0 or stem_stride == 2) else 1
            stride = nominal if total_stride * nominal <= cfg.output_stride else 1
            skipped = nominal // stride
            rate = cfg.stochastic_depth * index / steps
            scale = 1 / (1 - rate) if cfg.rule.rescale_drop else 1.0
            yield Position(
                name=f"stages.{stage}.{b}",
                block_index=index,
                geometry=Geometry(inputs, outputs, stride, skipped, dilation, dilation * skipped),
                beta=variance**-0.5,
                drop=Drop(rate, (1, 1, 1), scale) if cfg.stochastic_depth else None,
                feature=b == depth - 1,
            )
            if b == 0:
                variance = 1.0
            variance += cfg.alpha**2
            inputs, total_stride, dilation, index = outputs, total_stride * stride, dilation * skipped, index + 1


@dataclass(frozen=True)
class ResidualBlock(Standardizing):
    """`x -> shortcut + alpha * skip_gain * keep * residual`; a family defines the two branches."""

    geometry: Geometry
    middle: int
    groups: int
    attention: Attention
    se_hidden: int
    alpha: float
    skip_init: float

    @abc.abstractmethod
    def specs(self) -> Specs:
        """Return the block's parameters."""

    @abc.abstractmethod
    def gated_branches(
        self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return shortcut and residual of `(N, inputs, H, W)`, and the gate of the residual, if it ends with one."""

    def branches(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return shortcut and residual of `(N, inputs, H, W)`, without stochastic depth, skip gain and alpha."""
        shortcut, residual, gate = self.gated_branches(p, x, beta)
        return shortcut, residual if gate is None else gate * residual

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        shortcut, residual, gate = self.gated_branches(p, x, beta)
        # All factors of the residual are multiplied before they meet it, which takes one pass over the map.
        factor: float | Tensor = self.alpha
        if self.layers.rule.skip_gain:
            factor = p["skip_gain"] * factor
        for tensor in (keep, gate):
            if tensor is not None:
                factor = tensor * factor
        if isinstance(factor, (int, float)):
            return torch.add(shortcut, residual, alpha=factor)
        return torch.addcmul(shortcut, residual, factor.to(residual.dtype))

    def scale(self, name: str, beta: float | Tensor) -> float | Tensor:
        """Return gamma, times beta for the kernels that read the block's input."""
        factor = self.layers.scale(activated=True)
        return beta * factor if name in ("shortcut.", "conv0.") else factor

    def pooled(self, out: Tensor) -> Tensor:
        """Return the input of the shortcut's convolution: `out`, average-pooled if the block downsamples."""
        g, rule = self.geometry, self.layers.rule
        if not g.downsamples:
            return out
        return nf.shortcut_pool(out, stride=g.stride, dilation=g.dilation, neighbours=rule.neighbour_pool)

    @property
    def strided(self) -> dict[str, int]:
        """The geometry of `conv1`, the 3x3 convolution that has the block's stride."""
        g = self.geometry
        return {"stride": g.stride, "skipped_stride": g.skipped_stride, "dilation": g.dilation, "groups": self.groups}

    def shortcut_specs(self) -> Specs:
        """Return the parameters of the shortcut's convolution, which only a transition has."""
        g = self.geometry
        return conv_specs("shortcut.", g.inputs, g.outputs, 1) if g.transition else {}

    def skip_gain_specs(self) -> Specs:
        """Return the skip gain, if the rules have one."""
        return (
            {"skip_gain": ParamSpec((1,), Constant(self.skip_init), "skip_gain")} if self.layers.rule.skip_gain else {}
        )

    @property
    def last_gain(self) -> Init:
        """Initial gain of the branch's last convolution: `skip_init` where the rules have no skip gain."""
        return ones if self.layers.rule.skip_gain else Constant(self.skip_init)

    def block(self, position: Position) -> Block:
        """Return the block of the plan that computes this function at `position`."""
        return Block(
            position.name,
            self,
            self.specs(),
            beta=position.beta,
            drop=position.drop,
            branches=self.branches,
            feature=position.feature,
        )


# ---------------------------------------------------------------- stem and head


@dataclass(frozen=True)
class Conv(Standardizing):
    """A weight-standardised convolution, after an activation if `activated`."""

    activated: bool
    stride: int = 1

    def scale(self, name: str, beta: float | Tensor) -> float:
        """Return gamma after an activation; beta is 1."""
        return self.layers.scale(activated=self.activated)

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        x = self.layers.act(x) if self.activated else x
        return self.conv(p, "", x, stride=self.stride)


@dataclass(frozen=True)
class Pool:
    """`(N, C, H, W) -> (N, C)`: activation, then the mean over all pixels."""

    layers: Layers

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        return nf.global_mean(self.layers.act(x)) * self.layers.pool_gamma

    def activated(self, x: Tensor) -> Tensor:
        """Return the map whose mean is the output."""
        return self.layers.act(x) * self.layers.pool_gamma


def classifier(p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
    """Map `(N, C)` to logits `(N, classes)` by dropout and a linear layer, or return it after dropout without one."""
    if keep is not None:
        x = x * keep.to(x.dtype)
    return F.linear(x, p["weight"], p["bias"]) if p else x


def head_blocks(cfg: ModelConfig, channels: int, init: Init = classifier_normal) -> tuple[Block, Block]:
    """Return the last two blocks of every plan: `pool` computes the embedding, `head` the logits.

    With no classes the head has no parameters, and its output is the embedding.
    """
    drop = Drop(cfg.drop_rate, (channels,), 1 / (1 - cfg.drop_rate)) if cfg.drop_rate else None
    specs: Specs = {
        "weight": ParamSpec((cfg.num_classes, channels), init, "head"),
        "bias": ParamSpec((cfg.num_classes,), zeros, "bias"),
    }
    specs = specs if cfg.num_classes else {}
    return Block("pool", Pool(Layers.of(cfg)), {}), Block("head", classifier, specs, drop=drop)
