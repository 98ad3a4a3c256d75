"""The grouped 3x3 convolutions of the F-blocks, computed in several ways: which one is the wall, and how high it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import contenders, timing
from benchmarks.report import Options, Page, Table, number
from nfzoo.model import plan
from nfzoo.models.nfnet import FBlock
from nfzoo.variants import VARIANTS

Conv = Callable[[Tensor, Tensor, int], Tensor]


class Layer(NamedTuple):
    """A grouped convolution of stride 1, and how many of its kind the network has."""

    stage: int
    channels: int
    groups: int
    size: int
    number: int


def layers(variant: str, size: int) -> list[Layer]:
    """The distinct grouped convolutions of stride 1 of a variant: `conv1b` of every block, `conv1` of most."""
    cfg, found = VARIANTS[variant].config, []
    pixels = -(-size // 4)
    for stage in range(len(cfg.depths)):
        blocks = [b.fn for b in plan(cfg) if b.name.startswith(f"stages.{stage}.") and isinstance(b.fn, FBlock)]
        pixels = -(-pixels // blocks[0].geometry.stride)
        count = 2 * len(blocks) - (blocks[0].geometry.stride > 1)
        found.append(Layer(stage, blocks[0].middle, blocks[0].groups, pixels, count))
    return found


def by_torch(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, weight, padding=1, groups=groups)


def by_unfolding(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Patches written out, then one batched matrix product."""
    n, c, h, w = x.shape
    patches = F.unfold(x, 3, padding=1).view(n, groups, c // groups * 9, h * w)
    out = weight.view(groups, c // groups, -1) @ patches
    return out.view(n, c, h, w)


def one_by_one(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A dense convolution for each group."""
    pairs = zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True)
    return torch.cat([F.conv2d(a, w, padding=1) for a, w in pairs], 1)


def as_dense(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """One dense convolution with zeros between the groups: `groups` times the arithmetic."""
    out, inner = weight.shape[:2]
    full = weight.new_zeros(groups, out // groups, groups, inner, 3, 3)
    place = torch.arange(groups, device=weight.device)
    full[place, :, place] = weight.view(groups, out // groups, inner, 3, 3)
    return F.conv2d(x, full.view(out, groups * inner, 3, 3), padding=1)


def ways() -> dict[str, tuple[Conv, bool]]:
    """Name -> the function, and whether it is given images and weights channels last."""
    return {
        "grouped, NCHW": (by_torch, False),
        "grouped, channels last": (by_torch, True),
        "unfolded, batched product": (by_unfolding, False),
        "a convolution a group, NCHW": (one_by_one, False),
        "a convolution a group, channels last": (one_by_one, True),
        "dense, channels last": (as_dense, True),
    }


def page(options: Options) -> Page:
    work, rows, notes = options.work, [], []
    rate = timing.matmul_rate(work.device, work.dtype, size=512 if options.quick else None)
    for variant in options.models or ["nfnet-f0"]:
        size = options.size or (64 if options.quick or not options.gpu else contenders.sizes(variant)[0])
        batch = (options.batches or [32 if options.gpu else 2])[0]
        for layer in layers(variant, size):
            for task in ("forward", "forward and backward"):
                calls: dict[str, Callable[[], Any]] = {}
                for name, (conv, last) in ways().items():
                    call = functools.partial(_call, task, conv, layer, *_tensors(work, layer, batch, last))
                    try:
                        call()
                    except Exception as error:  # a candidate that fails here is a result as well
                        notes.append(f"{variant}, stage {layer.stage}, {task}: {name}: {str(error).splitlines()[0]}")
                        continue
                    calls[name] = call
                times = timing.interleave(
                    calls, work.device, rounds=options.rounds, least=0.02 if options.gpu else 0.0, warm=3
                )
                macs = batch * layer.size**2 * layer.channels * (layer.channels // layer.groups) * 9
                macs *= 1 if task == "forward" else 3
                base = times["grouped, NCHW"]
                for name, values in times.items():
                    middle = timing.median(values)
                    rows.append(
                        [
                            variant,
                            f"{layer.channels} in {layer.groups}, {batch} x {layer.size}²",
                            str(layer.number),
                            task,
                            name,
                            number(1e3 * middle),
                            number(timing.ratio(base, values)),
                            f"{macs / middle / rate:.0%}",
                        ]
                    )
    header = [
        "model",
        "channels in groups, images",
        "layers",
        "task",
        "way",
        "ms",
        "grouped NCHW / it",
        "of matmul rate",
    ]
    note = (
        f"The matmul rate is {rate / 1e12:.3g} T multiply-accumulates a second, that of a large product; zeros that a "
        "way multiplies by do not count."
    )
    title = f"Grouped 3x3 convolutions, {str(work.dtype).split('.')[1]}"
    return "Grouped convolutions", [Table(title, header, rows, note)], notes


def _tensors(work: contenders.Work, layer: Layer, batch: int, last: bool) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if last else torch.contiguous_format
    inner = layer.channels // layer.groups
    x = torch.randn(batch, layer.channels, layer.size, layer.size, device=work.device).to(work.dtype)
    weight = torch.randn(layer.channels, inner, 3, 3, device=work.device).mul_((9 * inner) ** -0.5).to(work.dtype)
    return tuple(t.to(memory_format=layout).requires_grad_() for t in (x, weight))  # type: ignore[return-value]


def _call(task: str, conv: Conv, layer: Layer, x: Tensor, weight: Tensor) -> None:
    if task == "forward":
        with torch.no_grad():
            conv(x, weight, layer.groups)
    else:
        y = conv(x, weight, layer.groups)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))
