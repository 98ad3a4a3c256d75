"""Signal propagation: how the statistics of activations evolve with depth, the papers' diagnostic.

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
        name: the block after which they are taken; the first is the end of the stem.
        avg_sq_mean: mean over channels of the squared channel mean, over batch and pixels.
        avg_var: mean channel variance.
        res_avg_var: mean channel variance of the residual branch before skip gain and alpha; `None` for the stem.
        expected_var: the variance that the next beta assumes, if every branch had unit variance and a skip gain of 1:
            see `expected_variances`.
    """

    name: str
    avg_sq_mean: Tensor
    avg_var: Tensor
    res_avg_var: Tensor | None
    expected_var: float | None = None


@torch.no_grad()
def signal_metrics(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor) -> list[SignalMetrics]:
    """Statistics after the stem and after each residual block, for images `(N, C, H, W)`, without noise.

    A `ConfigError` for a folded model: its branches end in weights that have skip gain and alpha in them.
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
    """The variance of the residual stream for which beta is made: before the first block, then after each block.

    `1` before the first block, `1 + alpha ** 2` after the first block of each stage, `alpha ** 2` more after each
    other: all but the last are `1 / beta ** 2` of the block that follows.

    Source: arXiv 2101.08692, section 4.
    """
    found, variance = [1.0], 1.0
    for depth in cfg.depths:
        variance = 1.0
        for _ in range(depth):
            variance += cfg.alpha**2
            found.append(variance)
    return found


def open_branches(cfg: ModelConfig, params: Mapping[str, Tensor]) -> Params:
    """These parameters with every residual branch at full strength: what starts at 0 to silence it becomes 1.

    That is the skip gain, or, under rules without one, the gain of the branch's last convolution. At initialisation a
    plot of the signal shows nothing else: silent branches leave the stream as it is.
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
