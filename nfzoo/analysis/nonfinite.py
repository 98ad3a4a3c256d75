"""Find the origin of a number that is not finite, after a training step whose loss or gradient is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nfzoo.config import ModelConfig
from nfzoo.model import block_params, plan, run_block
from nfzoo.runtime.distributed import full_tensor
from nfzoo.step import cross_entropy
from nfzoo.types import Noise


@torch.no_grad()
def first_not_finite(
    cfg: ModelConfig,
    params: Mapping[str, Tensor],
    x: Tensor,
    targets: Tensor,
    noise: Noise | None,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> str:
    """Return the name of the first input, weight or output of the forward pass that is not finite, or "".

    This runs the model once more, block by block, without compilation. Sharded parameters are gathered, so all
    processes have to call it.
    """
    complete = {name: full_tensor(p.detach()) for name, p in params.items()}
    if not bool(x.isfinite().all()):
        return "the input"
    with autocast():
        for block in plan(cfg):
            if not all(bool(p.isfinite().all()) for p in block_params(block, complete).values()):
                return f"a weight of {block.name!r}"
            x = run_block(block, complete, x, noise)
            if not bool(x.isfinite().all()):
                return f"the output of {block.name!r}"
    return "" if math.isfinite(cross_entropy(x, targets)) else "the loss"


@torch.no_grad()
def bad_gradient(params: Mapping[str, Tensor]) -> str:
    """Return the last parameter, in the model's order, whose gradient is not finite: the backward pass met it first."""
    bad = [name for name, p in params.items() if p.grad is not None and not bool(full_tensor(p.grad).isfinite().all())]
    return f"the gradient of {bad[-1]!r}" if bad else "the gradient's norm"
