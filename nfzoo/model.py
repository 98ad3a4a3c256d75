"""Pure functions over a plan: initial parameters, forward pass, features, noise, counts, folding.

A plan is a tuple of blocks. Every function depends on a configuration and its arguments alone. Randomness comes from a
generator or a noise dictionary, never from hidden state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from nfzoo.config import ModelConfig, NFNetConfig, NFRegNetConfig, NFResNetConfig
from nfzoo.errors import ConfigError
from nfzoo.models import nf_regnet, nf_resnet, nfnet
from nfzoo.models.folded import fold_block, folded_plan
from nfzoo.models.layers import Conv
from nfzoo.models.weight_standardization import is_channels_last
from nfzoo.types import Block, Kind, Noise, Params, Plan


def plan(cfg: ModelConfig) -> Plan:
    """Return the blocks of a model, in order.

    Raises:
        TypeError: for a configuration of no known family.
    """
    # Cached on the configuration, where compiled code reads it: Dynamo traces through a `functools.cache`, and that of
    # torch 2.9 cannot trace the construction of frozen dataclasses.
    blocks = getattr(cfg, "_plan", None)
    if blocks is None:
        blocks = _plan(cfg)
        if not torch.compiler.is_compiling():
            object.__setattr__(cfg, "_plan", blocks)
    return blocks


def _plan(cfg: ModelConfig) -> Plan:
    if cfg.folded:
        return folded_plan(_plan(cfg.replace(folded=False)))
    if isinstance(cfg, NFNetConfig):
        return nfnet.plan(cfg)
    if isinstance(cfg, NFResNetConfig):
        return nf_resnet.plan(cfg)
    if isinstance(cfg, NFRegNetConfig):
        return nf_regnet.plan(cfg)
    raise TypeError(f"no family has configurations of type {type(cfg).__name__}; use one of nfzoo.config.FAMILIES")


def specs(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], Kind]]:
    """Return shape and kind of every parameter under its full key."""
    return {f"{b.name}.{k}": (s.shape, s.kind) for b in plan(cfg) for k, s in b.specs.items()}


def init(
    cfg: ModelConfig,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Draw initial parameters as the reference code does; `device="meta"` gives shapes without memory.

    Args:
        generator: source of randomness, on `device`; torch's global one by default.
    """
    return {
        f"{b.name}.{k}": s.init(s.shape, generator=generator, device=device, dtype=dtype)
        for b in plan(cfg)
        for k, s in b.specs.items()
    }


def sample_noise(
    cfg: ModelConfig,
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Draw the keep masks of one training step: block name -> `(batch, 1, 1, 1)`, `"head"` -> `(batch, features)`.

    Stochastic depth drops block i of n with probability `rate * i / n`, and does not rescale the branches it keeps;
    `Rules` names timm's two differences. Dropout divides by its keep probability. Blocks without a rate have no mask.

    Source: the code released with arXiv 2102.06171.
    """
    return sample_masks(plan(cfg), batch, generator=generator, device=device, dtype=dtype)


def sample_masks(
    blocks: Plan,
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Draw the keep masks of some blocks of a plan: see `sample_noise`."""
    options = {"generator": generator, "device": device, "dtype": dtype}
    return {b.name: keep_mask(*b.drop, batch, **options) for b in blocks if b.drop is not None}


@fx.wrap
def keep_mask(
    rate: float,
    shape: tuple[int, ...],
    scale: float,
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw a keep mask `(batch, *shape)`: see `nfzoo.types.Drop`."""
    u = torch.rand((batch, *shape), generator=generator, device=device)
    keep = (u >= rate).to(dtype or torch.get_default_dtype())
    return keep * scale if scale != 1.0 else keep


def block_params(block: Block, params: Mapping[str, Tensor]) -> Params:
    """Return a block's part of the full parameter dictionary, under the block's own names."""
    return {name: params[f"{block.name}.{name}"] for name in block.specs}


def run_block(block: Block, params: Mapping[str, Tensor], x: Tensor, noise: Noise | None = None) -> Tensor:
    """Run one block of a plan on its part of the full parameter dictionary."""
    return block.fn(block_params(block, params), x, block.beta, None if noise is None else noise.get(block.name))


def apply(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor, noise: Noise | None = None) -> Tensor:
    """Return logits `(N, num_classes)` of normalised images `(N, in_channels, H, W)`; `noise=None` is evaluation."""
    for block in plan(cfg):
        x = run_block(block, params, x, noise)
    return x


def embed(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor, noise: Noise | None = None) -> Tensor:
    """Return the pooled features `(N, F)`, the classifier's input before dropout."""
    for block in plan(cfg)[:-1]:
        x = run_block(block, params, x, noise)
    return x


def features(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Return feature maps of stride 2, 4, 8, 16 and 32, at most `output_stride`: the stem's, then each stage's.

    A map is the residual stream before the next block's activation.
    """
    maps = []
    for block in feature_blocks(cfg):
        x = run_block(block, params, x)
        if block.feature:
            maps.append(x)
    return maps


def feature_blocks(cfg: ModelConfig) -> Plan:
    """Return the blocks that `features` runs: stem and tower."""
    blocks = plan(cfg)
    return blocks[: max(i for i, block in enumerate(blocks) if block.feature) + 1]


def parameter_count(cfg: ModelConfig) -> int:
    """Return the number of parameters."""
    return sum(math.prod(shape) for shape, _ in specs(cfg).values())


class BlockCost(NamedTuple):
    """Cost of one block for one image: output `(C, H, W)` or `(C,)`, parameters, multiply-accumulates."""

    name: str
    output: tuple[int, ...]
    parameters: int
    macs: int


def costs(cfg: ModelConfig, height: int, width: int | None = None) -> list[BlockCost]:
    """Return the cost of each block for one `height x width` image, by running the plan on the meta device.

    As in the papers, multiply-accumulates of convolutions, attention and classifier count. Weight standardisation and
    element-wise operations do not.
    """
    params = init(cfg, device="meta")
    x = torch.empty((1, cfg.in_channels, height, width or height), device="meta")
    seen: dict[tuple[object, ...], tuple[Tensor, int]] = {}  # blocks that differ only in name and beta have equal costs
    table = []
    for block in plan(cfg):
        key = (block.fn, tuple(s.shape for s in block.specs.values()), tuple(x.shape))
        if key not in seen:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                seen[key] = run_block(block, params, x), counter.get_total_flops() // 2
        x, macs = seen[key]
        count = sum(math.prod(s.shape) for s in block.specs.values())
        table.append(BlockCost(block.name, tuple(x.shape[1:]), count, macs))
    return table


def mac_count(cfg: ModelConfig, height: int, width: int | None = None) -> int:
    """Return the multiply-accumulates of one `height x width` image, which the papers call "FLOPs"."""
    return sum(cost.macs for cost in costs(cfg, height, width))


def fold(cfg: ModelConfig, params: Mapping[str, Tensor]) -> tuple[ModelConfig, Params]:
    """Fold weight standardisation, gains, gamma, beta, alpha and skip gains into the weights of plain convolutions.

    `apply(*fold(cfg, params), x) == apply(cfg, params, x)` up to rounding, and likewise for `embed` and `features`.
    Weights are computed in float64 and rounded once. They share no memory with `params`, and have its dtypes, device
    and memory format. Gradients pass through.

    Returns:
        The configuration with `folded` set, and the parameters of its plan: `weight` and `bias` of every convolution
        and linear layer, and the `scale` of every gate.

    Raises:
        ConfigError: if the configuration is folded already, or the parameters are not those of its plan.
    """
    if cfg.folded:
        raise ConfigError("the model is folded already; use it as it is")
    check_params(cfg, params)
    result: Params = {}
    for block in plan(cfg):
        local = block_params(block, params)
        for name, value in fold_block(block, {k: _wide(v) for k, v in local.items()}).items():
            like = local.get(name, next(iter(local.values())))
            last = value.ndim == 4 and is_channels_last(like)
            layout = torch.channels_last if last else torch.contiguous_format
            result[f"{block.name}.{name}"] = value.to(like.dtype).contiguous(memory_format=layout)
    return cfg.replace(folded=True), result


def adapt_input(cfg: ModelConfig, params: Mapping[str, Tensor], in_channels: int) -> tuple[ModelConfig, Params]:
    """Adapt the first convolution to images of another number of channels.

    One channel gets the sum of the old channels' kernels. n channels get the old ones in turn, times `old / n`. These
    are the kernels of timm's `adapt_input_conv`. Standardisation would undo their scale, so the gains are scaled too:
    an image of equal channels then has the output of an image of the old number of such channels. This is exact for one
    channel and for multiples of the old number. For others it holds but for the mean of each kernel, which
    standardisation removes.

    Returns:
        The configuration with `in_channels`, and the parameters, of which the others are shared.

    Raises:
        ConfigError: if the configuration is folded, the parameters are not those of its plan, or `in_channels` is no
            positive integer.

    Source: timm 1.0, models/_manipulate.py.
    """
    if cfg.folded:
        raise ConfigError("a folded model takes no other images; adapt the trained model, then fold it")
    check_params(cfg, params)
    adapted, stem = cfg.replace(in_channels=in_channels), plan(cfg)[0]
    if not isinstance(stem.fn, Conv):
        raise TypeError(f"the first block is {stem.fn!r}, not a convolution")

    def adapt(kernel: Tensor) -> Tensor:
        if in_channels == 1:
            return kernel.sum(dim=1, keepdim=True)
        turn = torch.arange(in_channels, device=kernel.device) % cfg.in_channels
        return kernel[:, turn] * (cfg.in_channels / in_channels)

    old = {key: _wide(value) for key, value in block_params(stem, params).items()}
    new = {**old, "weight": adapt(old["weight"])}
    target, standardised = (
        adapt(stem.fn.standardized(old, 1.0)["weight"]).flatten(1),
        stem.fn.standardized(new, 1.0)["weight"].flatten(1),
    )
    norm = (target - target.mean(1, keepdim=True)).norm(dim=1) / standardised.norm(dim=1)
    new["gain"] = old["gain"] * norm.nan_to_num(nan=1.0, posinf=1.0)  # kernels of zero remain so
    changed = {f"{stem.name}.{key}": new[key].to(params[f"{stem.name}.{key}"].dtype) for key in ("weight", "gain")}
    return adapted, {**params, **changed}


def _wide(value: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64, copy=True)


def is_untrained(cfg: ModelConfig, params: Mapping[str, Tensor]) -> bool:
    """Return whether gains, biases and skip gains are all as `init` makes them, which any step of training changes."""
    if cfg.folded:
        return False
    fixed = {
        f"{b.name}.{k}": s for b in plan(cfg) for k, s in b.specs.items() if s.kind in ("gain", "bias", "skip_gain")
    }
    return all(
        torch.equal(
            value := params[key].detach().cpu(), s.init(s.shape, generator=None, device=None, dtype=value.dtype)
        )
        for key, s in fixed.items()
    )


def check_params(cfg: ModelConfig, params: Mapping[str, Tensor]) -> None:
    """Raise a `ConfigError` unless the parameters are those of the configuration."""
    found = mismatch({key: shape for key, (shape, _) in specs(cfg).items()}, params)
    if found:
        raise ConfigError(f"the parameters are not those of the configuration: {found}{reparametrized_hint(params)}")


def mismatch(expected: Mapping[str, tuple[int, ...]], params: Mapping[str, Tensor]) -> str | None:
    """Return the first difference in names or shapes, in words; `None` if there is none."""
    for key in [*expected, *params]:
        shape = tuple(params[key].shape) if key in params else None
        if shape != expected.get(key):
            return f"{key!r} is {shape or 'missing'} instead of {expected.get(key) or 'absent'}"
    return None


def reparametrized_hint(keys: Iterable[str]) -> str:
    """Return the remedy if the keys of parameters tell of pruning or another parametrization by torch, else ""."""
    if not any(re.search(r"\bparametrizations\.|_(orig|mask|g|v|u)$", key) for key in keys):
        return ""
    return (
        "; weights are pruned or parametrized: make that permanent with torch.nn.utils.prune.remove or "
        "torch.nn.utils.parametrize.remove_parametrizations"
    )
