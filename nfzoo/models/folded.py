"""The inference form of a plan: plain convolutions whose weights have every constant factor multiplied into them.

An activation's gamma and a block's beta scale the input of a convolution, so they can scale its weight instead. This
holds for the shortcut's convolution too, as its average pool is linear. Alpha and the skip gain scale the output of a
branch: they go into its last convolution, or into the scale of the gate that follows it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from nfzoo.config import Attention
from nfzoo.errors import ConfigError
from nfzoo.models import cublas, onednn
from nfzoo.models import functional as nf
from nfzoo.models.layers import Conv, Geometry, Pool, ResidualBlock, classifier
from nfzoo.models.nf_regnet import RegNetBlock
from nfzoo.models.nf_resnet import BottleneckBlock, MaxPool
from nfzoo.types import Block, BlockFn, Params, ParamSpec, Plan, Specs

CUDNN_CHANNELS = 8
"""Channels of 16 bits without which cuDNN has no convolution for the GPU's matrix units: colours are padded."""

NO_NOISE = "a model folded for inference takes no noise: dropout and stochastic depth belong to the trained form"


@dataclasses.dataclass(frozen=True)
class FoldedConv:
    """A convolution between the activations `before` and `after`, each of which may be absent."""

    before: str | None
    after: str | None
    same: bool
    stride: int
    alone: bool = False

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        _refuse(keep)
        x = x if self.before is None else onednn.activate(x, self.before)
        return conv2d(
            x, p["weight"], p["bias"], activation=self.after, same=self.same, stride=self.stride, alone=self.alone
        )

    def by_itself(self) -> FoldedConv:
        """Return this convolution for a graph of its own: see `FoldedBlock.alone`."""
        return dataclasses.replace(self, alone=True)


@dataclasses.dataclass(frozen=True)
class FoldedBlock:
    """The residual block of any family: `x -> shortcut + residual`, with all scales in the weights.

    Attributes:
        pair: whether a second 3x3 convolution follows the first.
        inner: whether attention follows the first 3x3 convolution, not the last 1x1.
        pooled: whether a downsampling shortcut averages 2x2 pixels; else its kernel strides.
        neighbours: whether it averages adjacent pixels where its stride is left out: see `Rules.neighbour_pool`.
        alone: whether a compiled graph holds this block only, with no transform of `torch.func` around it.
        gives_pair: whether the block returns its output and the activation of that, for the next block: see `chained`.
    """

    activation: str
    same: bool
    geometry: Geometry
    groups: int
    attention: Attention
    pair: bool
    inner: bool
    pooled: bool
    neighbours: bool
    alone: bool = False
    gives_pair: bool = False

    def __call__(self, p: Mapping[str, Tensor], x: Any, beta: float | Tensor, keep: Tensor | None) -> Any:
        """Return the output of a map `(N, inputs, H, W)` or of a map and its activation; see `gives_pair`."""
        _refuse(keep)
        x, out = x if isinstance(x, tuple) else (x, self.act(x))
        y = self.residual(p, x, out)
        return (y, self.act(y)) if self.gives_pair else y

    def residual(self, p: Mapping[str, Tensor], x: Tensor, out: Tensor) -> Tensor:
        """Return the block's output for its input `x`, with the activation `out` of that."""
        g = self.geometry
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
        """Return this block for a graph of its own: see `alone`."""
        return dataclasses.replace(self, alone=True)

    def act(self, x: Tensor) -> Tensor:
        """Apply the activation; its gamma is in the weights that read it."""
        return onednn.activate(x, self.activation)

    def conv(
        self, p: Mapping[str, Tensor], name: str, x: Tensor, activation: str | None = None, **geometry: int
    ) -> Tensor:
        """Convolve with the weight `name`, already standardised, then apply the activation."""
        return conv2d(
            x,
            p[f"{name}.weight"],
            p[f"{name}.bias"],
            same=self.same,
            activation=activation,
            alone=self.alone,
            **geometry,
        )

    def attend(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Apply the attention that lies inside the branch."""
        return x if self.attention == "none" else self.gate(p, x) * x

    def gate(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return `scale * gate`, `(N, C, 1, 1)`; `scale` is the attention's factor 2, times alpha and the skip gain."""
        if self.attention == "eca":
            return p["scale"] * nf.efficient_channel_attention(p, x)
        weights = {key: value for key, value in p.items() if key.startswith("se.")}
        return p["scale"] * squeeze_excite(weights, x, alone=self.alone)

    def shortcut(self, p: Mapping[str, Tensor], x: Tensor, out: Tensor) -> Tensor:
        """Return `x` or, on a transition, a 1x1 convolution of the activated input `out`, pooled or strided."""
        g = self.geometry
        if not g.transition:
            return x
        if not self.pooled:
            return self.conv(p, "shortcut", out, stride=g.stride)
        if g.downsamples:
            out = nf.shortcut_pool(out, stride=g.stride, dilation=g.dilation, neighbours=self.neighbours)
        return self.conv(p, "shortcut", out)


@dataclasses.dataclass(frozen=True)
class FoldedPool:
    """`(N, C, H, W) -> (N, C)`: activation, mean over all pixels, times gamma, so that embeddings stay equal."""

    before: str | None
    gamma: float

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        _refuse(keep)
        return nf.global_mean(self.act(x)) * self.gamma

    def act(self, x: Tensor) -> Tensor:
        """Apply the activation without gamma, unless the block before has."""
        return x if self.before is None else onednn.activate(x, self.before)

    def activated(self, x: Tensor) -> Tensor:
        """Return the map whose mean is the output."""
        return self.act(x) * self.gamma


def folded_classifier(p: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
    """Map `(N, C)` to logits `(N, classes)` by a linear layer."""
    _refuse(keep)
    return classifier(p, x, beta, None)


@fx.wrap
def squeeze_excite(p: Mapping[str, Tensor], x: Tensor, *, alone: bool) -> Tensor:
    """Return the gates of `nf.squeeze_excite`, by kernels that add bias and apply ReLU where there are such."""
    weights = (p["se.fc0.weight"], p["se.fc0.bias"], p["se.fc1.weight"], p["se.fc1.bias"])
    if isinstance(weights[0], onednn.PackedWeight):  # as 1x1 kernels
        hidden = onednn.conv2d(nf.global_mean(x)[:, :, None, None], *weights[:2], activation="relu", alone=alone)
        return torch.sigmoid(onednn.conv2d(hidden, *weights[2:], alone=alone))
    if not cublas.supports(x, *weights, alone=alone):
        return nf.squeeze_excite(p, x)
    hidden = cublas.linear(nf.global_mean(x), *weights[:2], "relu")
    return torch.sigmoid(cublas.linear(hidden, *weights[2:], None))[:, :, None, None]


@fx.wrap
def conv2d(
    x: Tensor,
    weight: Tensor | onednn.PackedWeight,
    bias: Tensor,
    *,
    activation: str | None,
    alone: bool,
    stride: int = 1,
    groups: int = 1,
    **geometry: Any,
) -> Tensor:
    """Convolve as `Layers.conv` does, then apply the activation without gamma, in as few kernels as there are."""
    if isinstance(weight, Tensor) and groups == 1 and cublas.supports(x, weight, bias, alone=alone):
        if cublas.is_linear(x, weight, stride=stride):
            return cublas.conv1x1(x, weight, bias, activation)
        if weight.shape[1] < CUDNN_CHANNELS:
            x, weight = (F.pad(t, (0, 0, 0, 0, 0, CUDNN_CHANNELS - weight.shape[1])) for t in (x, weight))
    return onednn.conv2d(x, weight, bias, activation=activation, alone=alone, stride=stride, groups=groups, **geometry)


def _refuse(keep: Tensor | None) -> None:
    if keep is not None:
        raise ConfigError(NO_NOISE)


def unfused(conv: FoldedConv, pool: FoldedPool) -> tuple[FoldedConv, Callable[[Tensor], Tensor]]:
    """Return the final convolution without its activation, and the map of which `pool` takes the mean after that."""
    return dataclasses.replace(conv, after=None), dataclasses.replace(pool, before=conv.after).activated


def chained(fns: Sequence[BlockFn]) -> list[BlockFn]:
    """Return block functions that follow one another, of which folded residual blocks pass pairs to one another.

    A pair is a map and its activation. A graph that ends with the block then computes both in one pass over memory,
    where the next block would read the map once more.
    """
    pairs = itertools.zip_longest(fns, fns[1:])
    return [
        dataclasses.replace(fn, gives_pair=True)
        if isinstance(fn, FoldedBlock) and isinstance(following, FoldedBlock)
        else fn
        for fn, following in pairs
    ]


# ---------------------------------------------------------------- from a plan to its inference form


def folded_plan(plan: Plan) -> Plan:
    """Return the plan of the blocks' inference forms, with the same names and features.

    A convolution of the stem or the end computes the activation with which the next block begins, unless its own
    output is a feature map.
    """
    after = [None if b.feature or not isinstance(b.fn, Conv) else _before(c) for b, c in itertools.pairwise(plan)]
    computed = [None, *after]  # the activation that the previous block has applied already
    return tuple(
        Block(b.name, _function(b, None if applied else _before(b), own), _specs(b), feature=b.feature)
        for b, applied, own in zip(plan, computed, [*after, None], strict=True)
    )


def _before(block: Block) -> str | None:
    """Return the activation with which a block of the stem or the end begins."""
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
            neighbours=rule.neighbour_pool,
        )
    if isinstance(fn, Pool):
        return FoldedPool(before, fn.layers.pool_gamma)
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
    """Return an empty tensor on the meta device; a folded model has no random weights."""
    value = torch.empty(shape, device=device, dtype=dtype)
    if not value.is_meta:
        raise ConfigError("a folded model has no random weights; create the model without `folded`, then fold it")
    return value


def fold_block(block: Block, p: Mapping[str, Tensor]) -> Params:
    """Return the parameters of a block's inference form, in the dtype of `p`, which should be float64."""
    fn = block.fn
    if isinstance(fn, Conv):
        return fn.standardized(p, block.beta)
    if not isinstance(fn, ResidualBlock):
        return dict(p)
    result = {key: value for key, value in fn.standardized(p, block.beta).items() if key != "skip_gain"}
    end = p["skip_gain"] * fn.alpha if "skip_gain" in p else p["conv2.bias"].new_full((1,), fn.alpha)
    if fn.attention != "none":
        inner = isinstance(fn, RegNetBlock)
        result["scale"] = torch.full_like(end, 2.0) if inner else 2 * end
        if not inner:
            return result
    result["conv2.weight"] = result["conv2.weight"] * end
    result["conv2.bias"] = result["conv2.bias"] * end
    return result
