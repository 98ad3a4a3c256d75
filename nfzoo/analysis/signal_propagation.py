"""Signal propagation, the papers' diagnostic: statistics of the activations by depth.

Source: arXiv 2101.08692, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nfzoo.config import ModelConfig
from nfzoo.errors import ConfigError
from nfzoo.model import block_params, plan, run_block
from nfzoo.types import Params


class SignalMetrics(NamedTuple):
    """Statistics at one depth, each a 0-dimensional tensor.

    Attributes:
        name: the block whose output they describe; in the first row, the last block of the stem.
        avg_sq_mean: mean over channels of the squared channel mean, over batch and pixels.
        avg_var: mean channel variance.
        res_avg_var: mean channel variance of the residual branch before skip gain and alpha; `None` for the stem.
        expected_var: the variance that the next block's beta assumes: see `expected_variances`.
    """

    name: str
    avg_sq_mean: Tensor
    avg_var: Tensor
    res_avg_var: Tensor | None
    expected_var: float | None = None


@torch.no_grad()
def signal_metrics(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor) -> list[SignalMetrics]:
    """Measure the statistics after the stem and after each residual block, for images `(N, C, H, W)`, without noise.

    Raises:
        ConfigError: for a folded model, as its branches contain skip gain and alpha.
    """
    if cfg.folded:
        raise ConfigError("the branches of a folded model cannot be told apart; measure the trained one")
    expected = expected_variances(cfg)
    rows: list[SignalMetrics] = []
    stem = ""
    for block in plan(cfg):
        if block.branches is None:
            if rows or block.name == "final_conv":
                break
            x, stem = run_block(block, params, x), block.name
            continue
        if not rows:
            rows.append(SignalMetrics(stem, *_statistics(x), None, expected[0]))
        local = block_params(block, params)
        _, residual = block.branches(local, x, block.beta)
        x = run_block(block, params, x)
        rows.append(SignalMetrics(block.name, *_statistics(x), _statistics(residual)[1], expected[len(rows)]))
    return rows


def expected_variances(cfg: ModelConfig) -> list[float]:
    """Return the variance that beta assumes of the residual stream, before the first block and after each block.

    It assumes that every branch has unit variance and a skip gain of 1. The variance is then 1 before the first block
    and `1 + alpha ** 2` after the first block of each stage; every other block adds `alpha ** 2`. The beta of a block
    is `1 / sqrt` of the variance before it.

    Source: arXiv 2101.08692, section 4.
    """
    variances, variance = [1.0], 1.0
    for depth in cfg.depths:
        variance = 1.0
        for _ in range(depth):
            variance += cfg.alpha**2
            variances.append(variance)
    return variances


def open_branches(cfg: ModelConfig, params: Mapping[str, Tensor]) -> Params:
    """Return the parameters with every residual branch at full strength.

    Branches are silent at initialisation, and a plot of the signal would show a constant stream: the skip gain is 0 or,
    under rules without one, the gain of the branch's last convolution is. Here that gain is 1.
    """
    opened = dict(params)
    for block in plan(cfg):
        if block.branches is not None:
            name = f"{block.name}.{'skip_gain' if cfg.rule.skip_gain else 'conv2.gain'}"
            opened[name] = torch.ones_like(params[name])
    return opened


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean.square().mean(), var.mean()
