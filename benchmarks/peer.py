"""timm, the library that nfzoo is measured against, as its users would run it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def declare_torchvision() -> None:
    """Let torchvision, which timm imports, load beside a build of torch that it was not made for.

    It then has no operators of its own; classification needs none.
    """
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.define(f"_{name}_backward(Tensor x) -> Tensor")
    declare_torchvision.library = library  # type: ignore[attr-defined]  # it lives as long as the operators


def timm() -> Any:
    """The module, or `None` where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        return None
    try:
        import torchvision  # pyright: ignore[reportMissingImports]  # noqa: F401
    except RuntimeError:
        declare_torchvision()
    return importlib.import_module("timm")


def name_of(variant: str) -> str:
    """timm's name of an NFNet of the paper: `nfnet-f0` -> `dm_nfnet_f0`."""
    return "dm_" + variant.replace("-", "_")


def model(name: str, device: torch.device, *, training: bool, num_classes: int = 1000) -> nn.Module:
    """Make a timm model with random weights and without dropout."""
    rates = {"drop_rate": 0.0, "drop_path_rate": 0.0}
    made = timm().create_model(name, pretrained=False, num_classes=num_classes, **rates)
    return made.to(device).train(training)


class Update:
    """timm's AGC, torch's foreach SGD and timm's EMA over one list of parameters."""

    def __init__(self, params: list[nn.Parameter], head: list[nn.Parameter], *, clip: float | None = 0.01) -> None:
        self.params, self.clip, self.step = params, clip, 0
        heads = {id(p) for p in head}
        self.clipped = [p for p in params if id(p) not in heads]
        wide = [p for p in params if p.ndim > 1]
        narrow = [p for p in params if p.ndim <= 1]
        self.sgd = torch.optim.SGD(
            [{"params": wide, "weight_decay": 2e-5}, {"params": narrow, "weight_decay": 0.0}],
            lr=1e-4,
            momentum=0.9,
            nesterov=True,
            foreach=True,
        )
        self.average = [p.detach().clone() for p in params]
        timm()
        self.agc: Callable[..., None] = importlib.import_module("timm.utils.agc").adaptive_clip_grad

    @torch.no_grad()
    def __call__(self) -> None:
        if self.clip is not None:
            self.agc(self.clipped, self.clip)
        self.sgd.step()
        # What timm.utils.ModelEmaV3 does, on the parameters alone.
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1e-5)  # type: ignore[attr-defined]


def update_of(net: nn.Module, *, clip: float | None = 0.01) -> Update:
    """The update of a whole timm model, the classifier's weight not clipped."""
    return Update(list(net.parameters()), list(net.get_classifier().parameters())[:1], clip=clip)  # type: ignore[operator]
