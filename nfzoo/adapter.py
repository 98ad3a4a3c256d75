"""The pure optimizer as a `torch.optim.Optimizer`, for training loops that want one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .agc import check_clip, clip_unitwise
from .module import NFNet
from .optim import CLIPPED, DECAYED, SGDState, sgd


class AGCSGD(torch.optim.Optimizer):
    """AGC, then weight decay, then Nesterov SGD: the papers' optimizer. A shell over `nfzoo.agc` and `nfzoo.optim.sgd`.

    Args:
        params: parameters or groups; `param_groups(model)` gives the papers' groups.
        lr: learning rate; the papers' is 0.1 * batch / 256.
        momentum, nesterov, weight_decay: of SGD.
        clip: AGC threshold, `None` for no clipping; a group option.
        eps: floor of the parameter norm in AGC.

    Attributes:
        clipped_fraction: fraction of the units that the last step clipped, a tensor; `None` before the first.

    Raises:
        ValueError: for a learning rate, momentum or decay that is negative or no number, or a clip or eps that is not
            positive.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clip: float | None = 0.01,
        eps: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clip": clip,
            "eps": eps,
        }
        super().__init__(params, defaults)
        self.clipped_fraction: Tensor | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {**self.defaults, **param_group}
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= options[name] < float("inf"):
                raise ValueError(f"{name} must be a number that is not negative, not {options[name]!r}")
        check_clip(1.0 if options["clip"] is None else options["clip"], options["eps"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clip, decay, and take one step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clipped: list[Tensor] = []
        units = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad
                if group["clip"] is not None:
                    grad, mask = clip_unitwise(grad, p, clip=group["clip"], eps=group["eps"])
                    clipped.append(mask.sum())
                    units += mask.numel()
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                new, momentum = sgd(
                    {"p": p},
                    {"p": grad},
                    SGDState({"p": state["momentum_buffer"]}),
                    lr=group["lr"],
                    momentum=group["momentum"],
                    nesterov=group["nesterov"],
                    weight_decay=group["weight_decay"],
                )
                p.copy_(new["p"])
                state["momentum_buffer"].copy_(momentum.momentum["p"])
        self.clipped_fraction = torch.stack(clipped).sum() / units if clipped else None
        return loss


def param_groups(model: NFNet, *, weight_decay: float = 2e-5, clip: float | None = 0.01) -> list[dict[str, Any]]:
    """The papers' parameter groups: no decay on gains, biases and skip gains, no clipping of the classifier's weight.

    Frozen parameters (`requires_grad=False`) are left out. Source: arXiv 2102.06171, sections 4.1 and 5.
    """
    kinds = model.parameter_kinds()
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = kinds[name]
            groups.setdefault((kind in DECAYED, kind in CLIPPED), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "clip": clip if clipped else None}
        for (decayed, clipped), params in groups.items()
    ]
