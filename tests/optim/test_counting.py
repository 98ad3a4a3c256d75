"""Clipped units by kind: those that the rule itself clips, whichever way the update computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nfzoo.optim.agc_sgd import AGCSGD
from nfzoo.optim.clipping import clip_grads_, clip_unitwise, unit_shape
from nfzoo.optim.counting import KindCounter, total
from tests.support.loops import each

SHAPES = ((3, 2, 3, 3), (4, 5), (6,), (1,), (5, 3))
KINDS = (0, 0, 1, 2, 0)
CLIP = 0.3


def leaves() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.3
    params[2].grad = torch.full((6,), 10.0)  # clipped, and the number of one unit is not
    params[3].grad = torch.zeros(1)
    return params


def by_hand(params: list[nn.Parameter]) -> tuple[list[float], int]:
    """The fractions of each kind, and how many units were clipped, with the loop that `clip_unitwise` states."""
    clipped, units = [0, 0, 0], [0, 0, 0]
    for p, kind in zip(params, KINDS, strict=True):
        assert p.grad is not None
        clipped[kind] += int(clip_unitwise(p.grad, p.detach(), clip=CLIP)[1].sum())
        units[kind] += unit_shape(p.shape)[0]
    return [c / u for c, u in zip(clipped, units, strict=True)], sum(clipped)


def counter(params: list[nn.Parameter]) -> KindCounter:
    units: dict[torch.Tensor, int] = {p: unit_shape(p.shape)[0] for p in params}
    return KindCounter(dict(zip(params, KINDS, strict=True)), units)


@pytest.mark.parametrize("options", [{}, pytest.param({"compiled": True}, marks=pytest.mark.slow)])
def test_the_papers_optimizer_counts_kinds(options: dict[str, Any]) -> None:
    params = leaves()
    wanted, clipped = by_hand(params)
    assert 0 < wanted[0] < 1
    assert wanted[1:] == [1.0, 0.0]
    optimizer = AGCSGD(params, lr=0.1, clip=CLIP, **options)
    optimizer.count_kinds = counter(params)
    optimizer.step()
    assert optimizer.clipped_kinds is not None
    torch.testing.assert_close(optimizer.clipped_kinds, torch.tensor(wanted))
    assert optimizer.clipped_fraction == clipped / sum(unit_shape(p.shape)[0] for p in params)


@each("foreach", [True, False])
def test_clipping_before_any_optimizer_counts_kinds(foreach: bool) -> None:
    params = leaves()
    wanted, clipped = by_hand(params)
    tallies = clip_grads_(params, clip=CLIP, eps=1e-3, foreach=foreach)
    assert int(total(tallies)) == clipped
    count = counter(params)
    torch.testing.assert_close(count(tallies), torch.tensor(wanted))
    torch.testing.assert_close(count(tallies), torch.tensor(wanted))  # by what it prepared


def test_without_a_counter_and_behind_a_gate_there_are_none() -> None:
    params = leaves()
    optimizer = AGCSGD(params, lr=0.1, clip=CLIP)
    optimizer.step()
    assert optimizer.clipped_kinds is None
    optimizer.count_kinds = counter(params)
    optimizer.gate = torch.tensor(False)
    optimizer.step()
    assert optimizer.clipped_kinds is None
