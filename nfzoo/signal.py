"""Signal propagation: how the statistics of activations evolve with depth, the papers' diagnostic.

Source: arXiv 2101.08692, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .model import plan, run_block


class SignalMetrics(NamedTuple):
    """Statistics at one depth, each a 0-dimensional tensor.

    Attributes:
        name: the block after which they are taken; the first is the end of the stem.
        avg_sq_mean: mean over channels of the squared channel mean, over batch and pixels.
        avg_var: mean channel variance.
        res_avg_var: mean channel variance of the residual branch before skip gain and alpha; `None` for the stem.
    """

    name: str
    avg_sq_mean: Tensor
    avg_var: Tensor
    res_avg_var: Tensor | None


@torch.no_grad()
def signal_metrics(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor) -> list[SignalMetrics]:
    """Statistics after the stem and after each residual block, for images `(N, C, H, W)`, without noise."""
    rows: list[SignalMetrics] = []
    stem = ""
    for block in plan(cfg):
        if block.branches is None:
            if rows or block.name == "final_conv":
                break
            x, stem = run_block(block, params, x), block.name
            continue
        if not rows:
            rows.append(SignalMetrics(stem, *_statistics(x), None))
        local = {k: params[f"{block.name}.{k}"] for k in block.specs}
        _, residual = block.branches(local, x, block.beta)
        x = run_block(block, params, x)
        rows.append(SignalMetrics(block.name, *_statistics(x), _statistics(residual)[1]))
    return rows


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean.square().mean(), var.mean()
