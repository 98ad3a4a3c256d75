"""What fine-tuning trains of a network, and at which share of the learning rate, by the names of the parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

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
