"""A block of a plan as a module, the modules that lead to it, and the text by which `print(model)` shows it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nfzoo.errors import ConfigError
from nfzoo.models.folded import FoldedBlock, FoldedConv, folded_plan
from nfzoo.models.layers import Conv, ResidualBlock
from nfzoo.runtime.compile import checkpointed
from nfzoo.types import Block, BlockFn, Params

WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Forward pre-hooks of torch that compute a module's weight anew, and read no input."""


class BlockModule(nn.Module):
    """One block of a plan as a module: its parameters, and its pure function as `forward`.

    Attributes:
        fn: the block's function, or its compiled form.
        checkpointed: whether the backward pass computes the block's intermediate values again.
    """

    def __init__(self, block: Block, params: Params) -> None:
        super().__init__()
        self.block = block
        self.fn: BlockFn = block.fn
        self.checkpointed = False
        for name in layer_names(block):
            *path, leaf = name.split(".")
            submodule(self, path).add_module(leaf, Layer(block, name))
        for name, value in params.items():
            *path, leaf = name.split(".")
            submodule(self, path).register_parameter(leaf, nn.Parameter(value))
        self._find(list(params))

    def _find(self, names: Sequence[str]) -> None:
        """Find the modules that hold the parameters, once for all calls.

        Modules and not parameters: `functional_call`, `to` and FSDP2 put other tensors under the same names.
        """
        self._owners, self._links = owners(self, names)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        if isinstance(x, fx.Proxy):  # a graph of torch.fx holds the plain block, and parameters as its attributes
            owners = self._parameter_owners()
            if any(computes_parameters(holder) for _, _, holder in self._links):
                raise ConfigError(
                    "torch.fx cannot trace weights that hooks compute or load anew in every call: make pruning and "
                    "norms permanent (torch.nn.utils.prune.remove), and remove accelerate's hooks"
                )
            params = {name: getattr(owner, leaf) for name, owner, leaf in owners}
            return self.block.fn(params, x, self.block.beta, keep)
        if self.checkpointed and torch.is_grad_enabled():
            return checkpointed(lambda x, keep: self.fn(self.parameter_dict(), x, self.block.beta, keep), x, keep)
        return self.fn(self.parameter_dict(), x, self.block.beta, keep)

    def _parameter_owners(self) -> list[tuple[str, nn.Module, str]]:
        if replaced(self._links):  # `block.conv0 = ...`
            self._find([name for name, _, _ in self._owners])
        return self._owners

    def parameter_dict(self) -> dict[str, Tensor]:
        """Return the block's parameters as they are now."""
        owners = self._parameter_owners()
        holders = [holder for _, _, holder in self._links if is_hooked(holder)]
        for holder in holders:
            before_read(holder)
        # A parametrized or replicated parameter is an attribute alone; for the others the dictionary is faster.
        params = {
            name: owner._parameters[leaf] if leaf in owner._parameters else getattr(owner, leaf)
            for name, owner, leaf in owners
        }
        for holder in holders:
            after_read(holder)
        return params  # pyright: ignore[reportReturnType]

    def _get_name(self) -> str:
        return lines(self.block)[""].kind

    def extra_repr(self) -> str:
        return lines(self.block)[""].text


class Classifier(BlockModule):
    """The block that maps pooled features to logits, with the attributes of an `nn.Linear`."""

    weight: nn.Parameter
    bias: nn.Parameter

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


Link = tuple[nn.Module, str, nn.Module]
"""A module, the name of one of its children, and that child."""


@fx.has_side_effect  # nothing uses its result, and torch.fx keeps its node nevertheless
def check_input(x: Tensor, channels: int) -> None:
    """Raise a `ValueError` unless `x` is `(N, channels, H, W)` of floating-point numbers."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"the input must be (N, {channels}, H, W), not {tuple(x.shape)}; a single image needs x[None]")
    if not x.is_floating_point():
        raise ValueError(f"the input must be normalised floating-point numbers, not {x.dtype}; see model.preprocess")


def owners(root: nn.Module, names: Sequence[str]) -> tuple[list[tuple[str, nn.Module, str]], list[Link]]:
    """Return `(name, owner, leaf)` for every dotted name, and the links that lead from the root to all owners."""
    owners: list[tuple[str, nn.Module, str]] = []
    links: dict[str, Link] = {}
    for name in names:
        *path, leaf = name.split(".")
        owner = root
        for i, part in enumerate(path):
            child = owner.get_submodule(part)
            links[".".join(path[: i + 1])] = owner, part, child
            owner = child
        owners.append((name, owner, leaf))
    return owners, list(links.values())


def check_holders(root: nn.Module, blocks: Sequence[str]) -> None:
    """Raise a `ConfigError` if modules between the root and the named blocks hold anything else, or are no lists.

    The network calls blocks one by one, and not what holds them.
    """
    children: dict[str, dict[str, None]] = {}  # holder -> its children, in order
    for name in blocks:
        *path, leaf = name.split(".")
        for i, child in enumerate([*path[1:], leaf] if path else []):
            children.setdefault(".".join(path[: i + 1]), {})[child] = None
    for holder, expected in children.items():
        try:
            module: nn.Module | None = root.get_submodule(holder)
        except AttributeError:
            module = None
        if type(module) not in (nn.Module, nn.ModuleList) or list(module._modules) != list(expected):  # type: ignore[union-attr]
            raise ConfigError(
                f"{holder!r} must hold {', '.join(expected)} and nothing else, since the network calls its blocks one "
                "by one; put your module in the place of a block"
            )


def replaced(links: Sequence[Link]) -> bool:
    """Return whether another module stands in the place of one of the children."""
    for parent, name, child in links:  # noqa: SIM110, as `any` with a generator costs as much again
        if parent._modules.get(name) is not child:
            return True
    return False


def is_hooked(holder: nn.Module) -> bool:
    """Return whether something is to happen when `holder` is called, which no block does: it reads parameters only."""
    return bool(
        holder._forward_pre_hooks
        or holder._forward_hooks
        or holder._backward_hooks
        or holder._backward_pre_hooks
        or "forward" in holder.__dict__
    )


def computes_parameters(holder: nn.Module) -> bool:
    """Return whether hooks of `holder` compute or load its parameters: see `before_read`."""
    return "_hf_hook" in holder.__dict__ or any(isinstance(h, WEIGHT_HOOKS) for h in holder._forward_pre_hooks.values())


def before_read(holder: nn.Module) -> None:
    """Run the hooks of `holder` that compute or load its parameters: torch's `WEIGHT_HOOKS`, and accelerate's.

    Any other hook would wait for a call that never comes, of which a warning tells.
    """
    ignored = bool(holder._forward_hooks or holder._backward_hooks or holder._backward_pre_hooks)
    for hook in holder._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_HOOKS):
            hook(holder, ())
        else:
            ignored = True
    accelerate_hook = holder.__dict__.get("_hf_hook")  # it loads offloaded parameters
    if accelerate_hook is not None:
        accelerate_hook.pre_forward(holder)
    elif "forward" in holder.__dict__:
        ignored = True
    if ignored:
        warnings.warn(
            "hooks on modules within a block, such as conv0, are never called: these modules hold parameters, and the "
            "block computes. Register hooks on the block, or on a layer of model.as_modules()",
            stacklevel=2,
        )


def check_hooks(links: Sequence[Link]) -> None:
    """Warn of hooks on modules that hold blocks, which the network never calls; accelerate's have no work there."""
    for _, _, holder in links:
        if is_hooked(holder) and "_hf_hook" not in holder.__dict__:
            warnings.warn(
                "hooks on modules that hold blocks, such as stages[0], are never called: the network calls its blocks. "
                "Register hooks on a block, such as the last of the stage, or on a stage of model.as_modules()",
                stacklevel=2,
            )


def after_read(holder: nn.Module) -> None:
    """Let accelerate release the parameters that `before_read` had it load; what was read stays."""
    accelerate_hook = holder.__dict__.get("_hf_hook")
    if accelerate_hook is not None:
        accelerate_hook.post_forward(holder, None)


def submodule(module: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the submodule at `path`, which is made where it is missing; `stages` and its entries are lists."""
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.ModuleList() if part == "stages" or part.isdigit() else nn.Module())
        module = module.get_submodule(part)
    return module


# ---------------------------------------------------------------- how it is printed


class Line(NamedTuple):
    """A kind, such as `"Linear"`, and the text between its parentheses."""

    kind: str
    text: str


class Layer(nn.Module):
    """The parameters of one layer. It is printed as the layer; its block computes.

    It has no attribute `block`, by which block modules are recognised.
    """

    def __init__(self, block: Block, name: str) -> None:
        super().__init__()
        self._layer_of = (block, name)

    def _get_name(self) -> str:
        return self._line().kind

    def extra_repr(self) -> str:
        return self._line().text

    def _line(self) -> Line:
        block, name = self._layer_of
        return lines(block)[name]


def layer_names(block: Block) -> list[str]:
    """Return the local names of a block's layers, those within the block alone, before the layers that they hold."""
    names: dict[str, None] = {}
    for key in block.specs:
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and name:
            names |= dict.fromkeys([*(["se"] if name.startswith("se.") else []), name])
    return list(names)


def lines(block: Block) -> dict[str, Line]:
    """Return a line for the block itself under `""`, and for each layer by its local name, in the parameters' order."""
    fn, drop = block.fn, {} if block.drop is None else {"drop": block.drop.rate}
    kind, numbers = type(fn).__name__, {}
    if block.name == "head":
        kind = "Identity"  # without classes, else a layer of the same name follows
    if isinstance(fn, ResidualBlock):
        numbers = {"alpha": fn.alpha, "beta": block.beta}
    result = {"": Line(kind, _join({**numbers, **drop}))}
    # The inference form names the geometry of every convolution.
    plain = folded_plan((block,))[0].fn if isinstance(fn, Conv | ResidualBlock) else fn
    for key, spec in block.specs.items():
        name, _, leaf = key.rpartition(".")
        if leaf != "weight":
            continue
        if name.startswith("se."):
            result["se"] = Line("SqueezeExcite", "")
        out, inputs, *kernel = spec.shape
        options = _options(plain, name)
        size = ["x".join(map(str, kernel))] if kernel else []
        shown = {option: value for option, value in options.items() if value != 1}
        text = _join({**shown, **({} if name else drop)})
        convolution = "WSConv2d" if f"{name}.gain".removeprefix(".") in block.specs else "Conv2d"
        result[name] = Line(
            ("Linear", "Conv1d", convolution)[len(kernel)],
            ", ".join([f"{inputs * options.get('groups', 1)} -> {out}", *size, *([text] if text else [])]),
        )
    return result


def _options(fn: BlockFn, name: str) -> dict[str, int]:
    """Return stride, dilation and groups, where they can be above 1, of a layer of a folded block."""
    if isinstance(fn, FoldedConv):
        return {"stride": fn.stride}
    if not isinstance(fn, FoldedBlock):
        return {}
    g = fn.geometry
    if name == "conv1":
        return {"stride": g.stride, "dilation": g.dilation, "groups": fn.groups}
    if name == "conv1b":
        return {"dilation": g.out_dilation, "groups": fn.groups}
    return {"stride": g.stride} if name == "shortcut" and not fn.pooled else {}


def _join(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in numbers.items())
