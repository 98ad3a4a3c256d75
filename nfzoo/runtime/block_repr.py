"""The text by which `print(model)` shows a block: its kind, its numbers, and a line for each layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from nfzoo.models.folded import FoldedBlock, FoldedConv, folded_plan
from nfzoo.models.layers import Conv, ResidualBlock
from nfzoo.types import Block, BlockFn


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
