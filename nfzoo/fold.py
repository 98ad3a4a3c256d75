"""From trained parameters to those of the inference form, in which standardisation costs nothing any more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import ConfigError
from .model import plan, specs
from .models.folded import fold_block
from .types import Params


def fold(cfg: ModelConfig, params: Mapping[str, Tensor]) -> tuple[ModelConfig, Params]:
    """Multiply scaled weight standardisation, gains, gamma, beta, alpha and skip gains into plain convolutions.

    `apply(*fold(cfg, params), x) == apply(cfg, params, x)`, and so for `embed` and `features`. Computed in float64 and
    rounded once; the result shares no memory with `params` and has its dtypes, device and memory format. Gradients
    pass through it.

    Returns:
        The configuration with `folded` set, and the parameters of its plan: `weight` and `bias` of every convolution
        and linear layer, and the `scale` of every gate.

    Raises:
        ConfigError: if the configuration is folded already, or the parameters are not those of its plan.
    """
    if cfg.folded:
        raise ConfigError("the model is folded already; fold the trained one, or use this as it is")
    _check(cfg, params)
    result: Params = {}
    for block in plan(cfg):
        local = {name: params[f"{block.name}.{name}"] for name in block.specs}
        for name, value in fold_block(block, {k: _wide(v) for k, v in local.items()}).items():
            like = local.get(name, next(iter(local.values())))
            result[f"{block.name}.{name}"] = value.to(like.dtype).contiguous(memory_format=_layout(like))
    return cfg.replace(folded=True), result


def _wide(value: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64, copy=True)


def _layout(like: Tensor) -> torch.memory_format:
    is_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def _check(cfg: ModelConfig, params: Mapping[str, Tensor]) -> None:
    wanted = {key: shape for key, (shape, _) in specs(cfg).items()}
    for key in [*wanted, *params]:
        found = tuple(params[key].shape) if key in params else None
        if found != wanted.get(key):
            raise ConfigError(
                f"the parameters are not those of the configuration: {key!r} is "
                f"{found or 'missing'} instead of {wanted.get(key) or 'absent'}"
            )
