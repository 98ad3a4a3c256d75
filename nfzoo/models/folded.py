"""The inference form of a plan: plain convolutions, with everything that is constant multiplied into their weights.

An activation's gamma and a block's beta are linear in the convolutions that read them, the shortcut's included (its
average pool is linear too); alpha and the skip gain end a branch whose last step is a convolution, or else a gate.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from nfzoo.config import Attention
from nfzoo.errors import ConfigError
from nfzoo.models import functional as nf
from nfzoo.models import onednn
from nfzoo.models.layers import Conv, Geometry, Layers, Pool, ResidualBlock, classifier
from nfzoo.models.nf_regnet import RegNetBlock
from nfzoo.models.nf_resnet import BottleneckBlock, MaxPool
from nfzoo.types import Block, BlockFn, Params, ParamSpec, Plan, Specs

NO_NOISE = "a model folded for inference takes no noise: dropout and stochastic depth belong to the trained form"


@dataclasses.dataclass(frozen=True)
class FoldedConv:
    """A convolution between the activations `before` and `after`, where there are such."""

    before: str | None
    after: str | None
    same: bool
    stride: int
    alone: bool = False

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        _refuse(keep)
        x = x if self.before is None else nf.activate(x, self.before)
        return onednn.conv2d(
            x, p["weight"], p["bias"], activation=self.after, same=self.same, stride=self.stride, alone=self.alone
        )

    def by_itself(self) -> FoldedConv:
        """The same, to be compiled alone: see `FoldedBlock.alone`."""
        return dataclasses.replace(self, alone=True)


@dataclasses.dataclass(frozen=True)
class FoldedBlock:
    """The residual block of any family: `x -> shortcut + residual`, all scales being in the weights.

    Attributes:
        pair: whether a second 3x3 convolution follows the first.
        inner: whether attention follows the first 3x3 convolution, not the last 1x1.
        pooled: whether a downsampling shortcut averages 2x2 pixels; else its kernel strides.
        alone: whether, when compiled, the block is all there is to compile, with no transform around it.
    """

    activation: str
    same: bool
    geometry: Geometry
    groups: int
    attention: Attention
    pair: bool
    inner: bool
    pooled: bool
    alone: bool = False

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        _refuse(keep)
        g = self.geometry
        out = self.act(x)
        shortcut = self.shortcut(p, x, out)
        out = self.conv(p, "conv0", out, self.activation)
        out = self.conv(
            p,
            "conv1",
            out,
            None if self.inner else self.activation,
            stride=g.stride,
            skipped_stride=g.skipped_stride,
            dilation=g.dilation,
            groups=self.groups,
        )
        if self.inner:
            out = self.act(self.attend(p, out))
        if self.pair:
            out = self.conv(p, "conv1b", out, self.activation, dilation=g.out_dilation, groups=self.groups)
        out = self.conv(p, "conv2", out)
        if self.inner or self.attention == "none":
            return out + shortcut
        return torch.addcmul(shortcut, self.gate(p, out), out)  # one pass, not two

    def by_itself(self) -> FoldedBlock:
        """The same, to be compiled alone."""
        return dataclasses.replace(self, alone=True)

    def act(self, x: Tensor) -> Tensor:
        """The activation, whose gamma is in the weights that read it."""
        return nf.activate(x, self.activation)

    def conv(
        self, p: Mapping[str, Tensor], name: str, x: Tensor, activation: str | None = None, **geometry: int
    ) -> Tensor:
        """Convolution `name` with its weight as it is, and the activation behind it."""
        return onednn.conv2d(
            x,
            p[f"{name}.weight"],
            p[f"{name}.bias"],
            same=self.same,
            activation=activation,
            alone=self.alone,
            **geometry,
        )

    def attend(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Attention inside the branch."""
        return x if self.attention == "none" else self.gate(p, x) * x

    def gate(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`scale * gate`, `(N, C, 1, 1)`, where `scale` is the attention's 2 times whatever ends the branch."""
        gate = nf.squeeze_excite(p, x) if self.attention == "se" else nf.efficient_channel_attention(p, x)
        return p["scale"] * gate

    def shortcut(self, p: Mapping[str, Tensor], x: Tensor, out: Tensor) -> Tensor:
        """`x`; on a transition a 1x1 kernel on the activated input `out`, pooled or strided."""
        g = self.geometry
        if not g.transition:
            return x
        if not self.pooled:
            return self.conv(p, "shortcut", out, stride=g.stride)
        if g.downsamples:
            out = nf.shortcut_pool(out, stride=g.stride, dilation=g.dilation)
        return self.conv(p, "shortcut", out)


@dataclasses.dataclass(frozen=True)
class FoldedPool:
    """`(N, C, H, W) -> (N, C)`: activation, the mean over all pixels, then gamma, so that embeddings stay equal."""

    before: str | None
    gamma: float

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        _refuse(keep)
        x = x if self.before is None else nf.activate(x, self.before)
        return nf.global_mean(x) * self.gamma


def folded_classifier(p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
    """`(N, C) -> (N, classes)`: a linear layer."""
    _refuse(keep)
    return classifier(p, x, beta, None)


def _refuse(keep: Tensor | None) -> None:
    if keep is not None:
        raise ConfigError(NO_NOISE)


# ---------------------------------------------------------------- from a plan to its inference form


def folded_plan(plan: Plan) -> Plan:
    """The plan whose blocks are the inference form of `plan`'s, with the same names and features.

    A convolution takes over the activation that the next block begins with, unless its output is a feature map.
    """
    after = [None if b.feature or not isinstance(b.fn, Conv) else _before(c) for b, c in itertools.pairwise(plan)]
    handed = [None, *after]
    return tuple(
        Block(b.name, _function(b, None if taken else _before(b), own), _specs(b), feature=b.feature)
        for b, taken, own in zip(plan, handed, [*after, None], strict=True)
    )


def _before(block: Block) -> str | None:
    """The activation that a block of the stem or the end begins with."""
    fn = block.fn
    return fn.layers.activation if isinstance(fn, Pool) or (isinstance(fn, Conv) and fn.activated) else None


def _function(block: Block, before: str | None, after: str | None) -> BlockFn:
    fn = block.fn
    if isinstance(fn, Conv):
        return FoldedConv(before, after, fn.layers.rule.same_padding, fn.stride)
    if isinstance(fn, ResidualBlock):
        rule = fn.layers.rule
        return FoldedBlock(
            fn.layers.activation,
            rule.same_padding,
            fn.geometry,
            fn.groups,
            fn.attention,
            pair="conv1b.weight" in block.specs,
            inner=isinstance(fn, RegNetBlock),
            pooled=rule.pooled_shortcut or not isinstance(fn, BottleneckBlock),
        )
    if isinstance(fn, Pool):
        return FoldedPool(before, _gamma(fn.layers))
    if fn is classifier:
        return folded_classifier
    if isinstance(fn, MaxPool):
        return fn
    raise TypeError(f"no inference form is known for {block.name!r}, {fn!r}")


def _specs(block: Block) -> Specs:
    kept = {k: s._replace(init=_no_init) for k, s in block.specs.items() if s.kind not in ("gain", "skip_gain")}
    if isinstance(block.fn, ResidualBlock) and block.fn.attention != "none":
        kept["scale"] = ParamSpec((1,), _no_init, "skip_gain")
    return kept


def _no_init(shape, *, generator=None, device=None, dtype=None) -> Tensor:
    """A shape on the meta device; there are no random weights of a folded model."""
    value = torch.empty(shape, device=device, dtype=dtype)
    if not value.is_meta:
        raise ConfigError("a folded model has no random weights; create the model without folded, and fold that")
    return value


def fold_block(block: Block, p: Mapping[str, Tensor]) -> Params:
    """The parameters of a block's inference form, in the dtype of `p`, which should be float64."""
    fn = block.fn
    if isinstance(fn, Conv):
        scale = _gamma(fn.layers) if fn.activated else 1.0
        return {"weight": fn.layers.weight(p, "") * scale, "bias": p["bias"]}
    if not isinstance(fn, ResidualBlock):
        return dict(p)
    gamma = _gamma(fn.layers)
    result = {key: value for key, value in p.items() if block.specs[key].kind not in ("gain", "skip_gain")}
    for key in result:
        if (name := key.removesuffix("weight")) + "gain" in p:  # not the attention's
            first = name in ("shortcut.", "conv0.")
            result[key] = fn.layers.weight(p, name) * (gamma * block.beta if first else gamma)
    end = p["skip_gain"] * fn.alpha if "skip_gain" in p else p["conv2.bias"].new_full((1,), fn.alpha)
    if fn.attention != "none":
        inner = isinstance(fn, RegNetBlock)
        result["scale"] = torch.full_like(end, 2.0) if inner else 2 * end
        if not inner:
            return result
    result["conv2.weight"] = result["conv2.weight"] * end
    result["conv2.bias"] = result["conv2.bias"] * end
    return result


def _gamma(layers: Layers) -> float:
    """The factor of every activation; where the rules have it on the weights, it is there already."""
    return 1.0 if layers.rule.gamma_on_weight else nf.GAMMA[layers.activation]
