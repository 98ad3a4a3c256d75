"""The optimizer that a recipe names."""

from __future__ import annotations

import importlib

import torch

from nfzoo.errors import ConfigError
from nfzoo.nn import NFNet
from nfzoo.optim.agc_sgd import AGCSGD, param_groups
from nfzoo.optim.sgd import DECAYED
from nfzoo.train.config import OptimConfig


def make_optimizer(optim: OptimConfig, model: NFNet, lr: float, *, compiled: bool = False) -> torch.optim.Optimizer:
    """The papers' for "sgd", which clips by itself; else any of torch's kind, without decay of gains and biases.

    Frozen parameters are left out. `compiled` is for the papers' alone: see `AGCSGD`.

    Raises:
        ConfigError: for a name that is no optimizer's, or options that it does not take.
    """
    if optim.name == "sgd":
        groups = param_groups(model, weight_decay=optim.weight_decay, clip=optim.clip)
        options = {"momentum": optim.momentum, "nesterov": optim.nesterov, "compiled": compiled}
        return AGCSGD(groups, lr, weight_decay=0.0, clip=None, **options)
    kinds = model.parameter_kinds()
    trainable = [(kinds[name], p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for kind, p in trainable if kind in DECAYED], "weight_decay": optim.weight_decay},
        {"params": [p for kind, p in trainable if kind not in DECAYED], "weight_decay": 0.0},
    ]
    package, _, name = ("torch.optim.AdamW" if optim.name == "adamw" else optim.name).rpartition(".")
    try:
        made = getattr(importlib.import_module(package), name)
        if not issubclass(made, torch.optim.Optimizer):
            raise TypeError("it is no torch.optim.Optimizer")
        return made([group for group in groups if group["params"]], **{**optim.options, "lr": lr})
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f'the optimizer {optim.name!r} with options {optim.options!r} cannot be made: {error}; name "sgd", '
            '"adamw", or the import path of an optimizer'
        ) from error
