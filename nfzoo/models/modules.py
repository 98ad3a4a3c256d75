"""A plan as a tree of `torch.nn` layers, for tools that work on layers and not on functions.

The tree is a nest of `nn.Sequential`, in which residual blocks are the only modules that branch. A layer has the name
of its parameters in the plan. There is one form for each form of the parameters: trained, where a parametrization of
`nn.Conv2d` standardises the weight, and folded, where layers are all there is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from nfzoo.models import functional as nf
from nfzoo.models.folded import FoldedBlock, folded_plan
from nfzoo.models.layers import Conv, Layers, Pool, ResidualBlock, classifier
from nfzoo.models.nf_resnet import MaxPool
from nfzoo.types import Block, Drop, Kind, Plan, Specs

ACTIVATIONS = {
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


# torch.fx records these functions as nodes, as they depend on the image's size.


@fx.wrap
def conv_padding(x: Tensor, kernel: int, **geometry: int) -> Tensor:
    """Pad the input of a convolution: see `nf.conv_input`."""
    return nf.conv_input(x, kernel, same=True, **geometry)[0]


@fx.wrap
def max_pool_padding(x: Tensor) -> Tensor:
    """Pad the input of a max pool."""
    height, width = (nf.same_padding(n, 3, 2) for n in x.shape[-2:])
    return nf.pad2d(x, height, width, value=float("-inf"))


@fx.wrap
def dense_pool(x: Tensor, dilation: int, neighbours: bool) -> Tensor:
    """Pool a shortcut whose stride is left out."""
    return nf.shortcut_pool(x, stride=1, dilation=dilation, neighbours=neighbours)


@fx.wrap
def drop_images(x: Tensor, drop: Drop) -> Tensor:
    """Drop the maps of random images."""
    keep = torch.rand((x.shape[0], *drop.shape), device=x.device) >= drop.rate
    return x * (keep.to(x.dtype) * drop.scale)


class StandardizedWeight(nn.Module):
    """Parametrization of a convolution's weight: see `standardize_weight`.

    Attributes:
        gain: `(out,)`.
    """

    def __init__(self, outputs: int, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.gain = nn.Parameter(torch.empty(outputs, device="meta"))

    def forward(self, weight: Tensor) -> Tensor:
        return self.layers.weight({"weight": weight, "gain": self.gain}, "", self.layers.scale(activated=False))


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


class KernelPad(nn.Module):
    """Asymmetric padding before a convolution, which depends on the image's size: see `nf.conv_input`."""

    def __init__(self, kernel: int, **geometry: int) -> None:
        super().__init__()
        self.kernel, self.geometry = kernel, geometry

    def forward(self, x: Tensor) -> Tensor:
        return conv_padding(x, self.kernel, **self.geometry)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, " + ", ".join(f"{name}={value}" for name, value in self.geometry.items())


class MaxPoolPad(nn.Module):
    """SAME padding before the 3x3 max pool of stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool_padding(x)


class DensePool(nn.Module):
    """The pool of a shortcut whose stride is left out: see `nf.shortcut_pool`."""

    def __init__(self, *, dilation: int, neighbours: bool) -> None:
        super().__init__()
        self.dilation, self.neighbours = dilation, neighbours

    def forward(self, x: Tensor) -> Tensor:
        return dense_pool(x, self.dilation, self.neighbours)


class SqueezeExcite(nn.Module):
    """`(N, C, H, W)` to gates `(N, C, 1, 1)`: see `nf.squeeze_excite`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc0 = nn.Linear(channels, hidden, device="meta")
        self.act = nn.ReLU()
        self.fc1 = nn.Linear(hidden, channels, device="meta")
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.fc1(self.act(self.fc0(self.flatten(self.pool(x))))))[:, :, None, None]


class EfficientChannelAttention(nn.Module):
    """`(N, C, H, W)` to gates `(N, C, 1, 1)`: see `nf.efficient_channel_attention`."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False, device="meta")
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.conv(self.flatten(self.pool(x))[:, None]))[:, 0, :, None, None]


class StochasticDepth(nn.Module):
    """In training mode, drop the residual branches of random images of a batch."""

    def __init__(self, drop: Drop) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return drop_images(x, self.drop) if self.training else x

    def extra_repr(self) -> str:
        return f"{self.drop.rate:g}"


class Residual(nn.Module):
    """The residual block of any family: see `ResidualBlock`, and in the folded form `FoldedBlock`.

    Attributes:
        alpha: factor at the end of the branch; 1 in the folded form.
        skip_gain: learned factor `(1,)` there, if the rules have one.
        scale: factor of the attention: 2, or in the folded form a parameter `(1,)`.
    """

    def __init__(self, block: Block, fn: ResidualBlock, form: FoldedBlock, *, beta: float, alpha: float) -> None:
        super().__init__()
        g, specs = form.geometry, block.specs
        conv = functools.partial(convolution, specs, fn.layers)
        act = functools.partial(activation, fn.layers, scaled="conv0.gain" in specs)
        self.act0 = act(beta=beta)
        self.shortcut_pool, self.shortcut = nn.Identity(), None
        if g.transition and form.pooled:
            if g.downsamples:
                self.shortcut_pool = _shortcut_pool(form)
            self.shortcut = conv("shortcut.")[1]
        elif g.transition:
            self.shortcut = conv("shortcut.", stride=g.stride)[1]
        self.conv0 = conv("conv0.")[1]
        self.act1 = act()
        self.conv1_pad, self.conv1 = conv("conv1.", **fn.strided)
        self.act1b, self.conv1b = None, None
        if form.pair:
            self.act1b = act()
            self.conv1b = conv("conv1b.", dilation=g.out_dilation, groups=form.groups)[1]
        self.act2 = act()
        self.conv2 = conv("conv2.")[1]
        self.inner = form.inner
        self.se = self.eca = None
        if form.attention == "se":
            hidden, channels = specs["se.fc0.weight"].shape
            self.se = SqueezeExcite(channels, hidden)
        elif form.attention == "eca":
            self.eca = EfficientChannelAttention(specs["eca.weight"].shape[-1])
        self.scale: float | Tensor = 2.0
        self.skip_gain: Tensor | None = None
        for name in ("scale", "skip_gain"):
            if name in specs:
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(torch.empty(1, device="meta")))
        self.alpha = alpha
        self.drop = nn.Identity() if block.drop is None else StochasticDepth(block.drop)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act0(x)
        shortcut = x if self.shortcut is None else self.shortcut(self.shortcut_pool(out))
        out = self.conv1(self.conv1_pad(self.act1(self.conv0(out))))
        if self.inner:
            out = self.attend(out)
        if self.conv1b is not None and self.act1b is not None:
            out = self.conv1b(self.act1b(out))
        out = self.conv2(self.act2(out))
        if not self.inner:
            out = self.attend(out)
        out = self.drop(out)
        if self.skip_gain is not None:
            out = out * self.skip_gain
        return out * self.alpha + shortcut

    def attend(self, x: Tensor) -> Tensor:
        """Multiply by the gates of the attention, if there is one."""
        gates = self.eca if self.se is None else self.se
        return x if gates is None else self.scale * gates(x) * x


def activation(layers: Layers, *, scaled: bool, beta: float = 1.0) -> nn.Module:
    """Return the activation, times beta and, if it is to be scaled, times gamma unless the weights have it."""
    factor = beta * (layers.pool_gamma if scaled else 1.0)
    act = ACTIVATIONS.get(layers.activation, functools.partial(nf.RegisteredActivation, layers.activation))()
    return act if factor == 1.0 else nn.Sequential(act, Scale(factor))


def convolution(
    specs: Specs,
    layers: Layers,
    name: str,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    skipped_stride: int = 1,
) -> tuple[nn.Module, nn.Conv2d]:
    """Return the padding that is asymmetric, and the convolution `name` without its values."""
    outputs, inputs, kernel, _ = specs[f"{name}weight"].shape
    geometry = {"stride": stride, "dilation": dilation, "skipped_stride": skipped_stride}
    probe = torch.empty((1, 1, 8, 8), device="meta")  # the symmetric padding does not depend on the size
    _, padding = nf.conv_input(probe, kernel, same=layers.rule.same_padding, **geometry)
    conv = nn.Conv2d(inputs * groups, outputs, kernel, stride, padding, dilation, groups, device="meta")
    if f"{name}gain" in specs:
        parametrize.register_parametrization(conv, "weight", StandardizedWeight(outputs, layers), unsafe=True)
    return KernelPad(kernel, **geometry) if kernel > 1 and padding == 0 else nn.Identity(), conv


def _shortcut_pool(form: FoldedBlock) -> nn.Module:
    if form.geometry.stride == 2:
        return nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return DensePool(dilation=form.geometry.dilation, neighbours=form.neighbours)


def _layers(block: Block, trained: Block, lean: Block) -> dict[str, nn.Module]:
    """Return the layers of one block in their order, by dotted name. `block` is one of the two forms of the block."""
    fn, name, scaled = trained.fn, block.name, block is trained
    if isinstance(fn, Conv):
        pad, conv = convolution(block.specs, fn.layers, "", stride=fn.stride)
        act = activation(fn.layers, scaled=scaled) if fn.activated else nn.Identity()
        return {f"{name}_act": act, f"{name}_pad": pad, name: conv}
    if isinstance(fn, ResidualBlock):
        assert isinstance(lean.fn, FoldedBlock)
        beta, alpha = (trained.beta, fn.alpha) if scaled else (1.0, 1.0)
        return {name: Residual(block, fn, lean.fn, beta=beta, alpha=alpha)}
    if isinstance(fn, Pool):
        # The embedding has gamma in the folded form too.
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        factor = Scale(fn.layers.pool_gamma)
        return {f"{name}_act": activation(fn.layers, scaled=False), name: nn.Sequential(*pool, factor)}
    if isinstance(fn, MaxPool):
        pad = MaxPoolPad() if fn.same else nn.Identity()
        return {f"{name}_pad": pad, name: nn.MaxPool2d(3, 2, padding=0 if fn.same else 1)}
    if fn is classifier:
        drop = nn.Identity() if block.drop is None else nn.Dropout(block.drop.rate)
        if not block.specs:
            return {f"{name}_drop": drop, name: nn.Identity()}
        outputs, inputs = block.specs["weight"].shape
        return {f"{name}_drop": drop, name: nn.Linear(inputs, outputs, device="meta")}
    raise TypeError(f"no layers are known for {name!r}, {fn!r}")


class LayerTree(nn.Sequential):
    """The root of a tree of layers, which knows what each parameter is to the optimizer: see `nfzoo.param_groups`."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        super().__init__()
        self._kinds = dict(kinds)

    def parameter_kinds(self) -> dict[str, Kind]:
        """Return the kind of every parameter, by its name in the tree."""
        return dict(self._kinds)


def module_tree(plan: Plan, *, folded: bool) -> LayerTree:
    """Return the layers of a plan, on the meta device; `tree_keys` tells where each parameter goes.

    Args:
        plan: the plan of the trained form.
        folded: whether to return the layers of the folded form.
    """
    own = folded_plan(plan) if folded else plan
    keys = tree_keys(own)
    kinds: dict[str, Kind] = {f"{block.name}.{name}": spec.kind for block in own for name, spec in block.specs.items()}
    tree = LayerTree({keys[name]: kind for name, kind in kinds.items()})
    for trained, lean in zip(plan, folded_plan(plan), strict=True):
        for name, layer in _layers(lean if folded else trained, trained, lean).items():
            if isinstance(layer, nn.Identity) and name != trained.name:
                continue
            *path, leaf = name.split(".")
            parent = tree
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Sequential())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, layer)
    return tree


def tree_keys(plan: Plan) -> dict[str, str]:
    """Return the key of every parameter of a plan in the `state_dict` of its tree."""
    keys = {}
    for block in plan:
        for local in block.specs:
            *_, leaf = local.split(".")
            name = local.removesuffix(leaf)
            own = local
            if f"{name}gain" in block.specs and leaf != "bias":
                own = f"{name}parametrizations.weight." + ("original" if leaf == "weight" else "0.gain")
            elif local == "eca.weight":
                own = "eca.conv.weight"
            keys[f"{block.name}.{local}"] = f"{block.name}.{own}"
    return keys
