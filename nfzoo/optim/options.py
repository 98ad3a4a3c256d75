"""The options of `AGCSGD`, and the states that it can load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nfzoo.optim.clipping import CLIP, EPS, check_clip
from nfzoo.optim.sgd import MOMENTUM

OPTIONS: dict[str, Any] = {
    "momentum": MOMENTUM,
    "nesterov": True,
    "weight_decay": 0.0,
    "clip": CLIP,
    "eps": EPS,
    "ema_decay": None,
    "compiled": False,
    "steps": 0,
}
"""The options of a parameter group besides `lr`, with their defaults."""

OWN_OPTIONS = {"clip", "ema_decay", "compiled", "steps"}
"""Options that no optimizer of torch has."""

STATE = {"momentum_buffer", "ema"}
"""What is kept for each parameter."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a number that is out of its range."""
    for name in ("lr", "momentum", "weight_decay"):
        if not 0 <= options[name] < float("inf"):
            raise ValueError(f"{name} must be a number that is not negative, not {options[name]!r}")
    if options["ema_decay"] is not None and not 0 <= options["ema_decay"] < 1:
        raise ValueError(f"ema_decay must be in [0, 1), not {options['ema_decay']!r}; None keeps no average")
    check_clip(1.0 if options["clip"] is None else options["clip"], options["eps"])


def check_state(state_dict: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless a state is that of `AGCSGD`, or of `torch.optim.SGD` with options that AGCSGD has."""
    groups, state = state_dict["param_groups"], state_dict["state"]
    for group in groups:
        for name in ("maximize", "dampening"):
            if group.get(name):
                raise ValueError(f"AGCSGD has no {name}, which is {group[name]!r} in the state to load")
    others = {name for values in state.values() for name in values} - STATE
    # Before their first step the others show only by their floor of a denominator, which has the name of AGC's floor.
    if others or any("eps" in group and not OWN_OPTIONS & set(group) for group in groups):
        kept = f", with {', '.join(sorted(others))} for each parameter" if others else ""
        raise ValueError(
            f"the state to load is of another optimizer than AGCSGD or torch.optim.SGD{kept}; "
            "start with a new AGCSGD, which needs no state"
        )
