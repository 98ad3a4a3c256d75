"""What fine-tuning trains of a network, and at which share of the learning rate, by the names of the parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

TUNE = re.compile(r"all|head|stages:([1-9]\d{0,2})")
"""What `freeze_` takes: all weights, the classifier's, or the last N stages' with all that follows them."""

HEAD = "head."
_STAGE = re.compile(r"stages\.(\d+)\.(\d+)\.")
_STEM = "stem."


def freeze_(model: nn.Module, tune: str) -> None:
    """Freeze all parameters that `tune` leaves out (`requires_grad=False`), so that no step changes a bit of them.

    They have no gradient, so that AGC, weight decay, momentum and moving average pass them by. Autograd records nothing
    below the lowest block that is trained, which saves its backward pass and its activations.

    Args:
        model: a network of the zoo, not wrapped.
        tune: "all"; "head", the classifier; or "stages:N", the last N stages, the final convolution and the classifier.

    Raises:
        ValueError: for another word, and for more stages than the network has.
    """
    names = [name for name, _ in model.named_parameters()]
    tuned = tuned_names(names, tune)
    for name, p in model.named_parameters():
        p.requires_grad_(name in tuned)


def tuned_names(names: Iterable[str], tune: str) -> set[str]:
    """Return the names of the parameters that `freeze_` leaves trainable, among all names of a network."""
    names = list(names)
    match = TUNE.fullmatch(tune)
    if match is None:
        raise ValueError(f"tune must be all, head or stages:N, such as stages:1, not {tune!r}")
    if tune == "all":
        return set(names)
    if match[1] is None:
        return {name for name in names if name.startswith(HEAD)}
    stages = 1 + max(int(m[1]) for name in names if (m := _STAGE.match(name)))
    if int(match[1]) > stages:
        raise ValueError(
            f"tune {tune!r} names more than the {stages} stages of the network; pass stages:{stages} or less"
        )
    first = stages - int(match[1])
    return {
        name
        for name in names
        if not name.startswith(_STEM) and ((m := _STAGE.match(name)) is None or int(m[1]) >= first)
    }


def lr_scales(
    names: Iterable[str], *, layer_decay: float | None = None, head_lr_scale: float = 1.0
) -> dict[str, float]:
    """Return the factor of each parameter's learning rate, by its depth in the network.

    `layer_decay ** (L + 1 - depth)`, where the stem has depth 0, the residual blocks have depths 1 to L in their order,
    the final convolution has that of the last block, and the classifier has L + 1, so that its factor is 1. The
    classifier's is multiplied by `head_lr_scale`.

    Args:
        names: those of all parameters of a network, frozen ones too: the depths are those of the whole network.
        layer_decay: `None` for no decay.
        head_lr_scale: 10, say, for a classifier that was drawn anew.

    Source: BEiT, arXiv 2106.08254, and its `optim_factory.py`; the depths are those of timm's
    `param_groups_layer_decay` with its NFNets' `group_matcher`. Rates by depth are also the discriminative rates of
    ULMFiT, arXiv 1801.06146, section 3.2.
    """
    names = list(names)
    blocks = sorted({_block(name) for name in names} - {None})  # type: ignore[type-var]
    depths = {block: 1 + i for i, block in enumerate(blocks)}

    def scale(name: str) -> float:
        if name.startswith(HEAD):
            return head_lr_scale
        depth = 0 if name.startswith(_STEM) else depths.get(_block(name), len(blocks))
        return 1.0 if layer_decay is None else layer_decay ** (len(blocks) + 1 - depth)

    return {name: scale(name) for name in names}


def _block(name: str) -> tuple[int, int] | None:
    match = _STAGE.match(name)
    return None if match is None else (int(match[1]), int(match[2]))


def split_by_scale(groups: Iterable[dict[str, Any]], scales: Mapping[Tensor, float], lr: float) -> list[dict[str, Any]]:
    """Return an optimizer's groups split so that each has one learning rate, `lr` times its `"lr_scale"`.

    Args:
        groups: parameter groups with further options of any kind.
        scales: the factor of each parameter.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            parts.setdefault(scales[p], []).append(p)
        split += [{**group, "params": params, "lr": lr * scale, "lr_scale": scale} for scale, params in parts.items()]
    return split
