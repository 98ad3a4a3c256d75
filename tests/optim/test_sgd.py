"""SGD, moving averages and schedules as pure functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nfzoo.optim import sgd as module
from nfzoo.optim.sgd import SGDState, ema, ema_, ema_decay, sgd, sgd_, sgd_init, warmup_cosine
from nfzoo.torch_internals import fused_sgd_
from tests.support.helpers import assert_same, generator

FLOAT64 = 1e-12


def params(seed: int = 0) -> dict[str, torch.Tensor]:
    g = generator(seed)
    return {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in {"w": (3, 2), "b": (3,), "s": (1,)}.items()}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_is_torchs(nesterov, weight_decay):
    mine, state = params(), sgd_init(params())
    theirs = {k: v.clone().requires_grad_() for k, v in params().items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=0.3, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    for step in range(4):
        grads = params(step + 1)
        mine, state = sgd(mine, grads, state, lr=0.3, nesterov=nesterov, weight_decay=weight_decay)
        for k, p in theirs.items():
            p.grad = grads[k]
        optimizer.step()
    for k in mine:
        torch.testing.assert_close(mine[k], theirs[k].detach(), rtol=FLOAT64, atol=FLOAT64)


def test_decay_only_where_it_is_wanted():
    p = params()
    zero = {k: torch.zeros_like(v) for k, v in p.items()}
    new, _ = sgd(p, zero, sgd_init(p), lr=0.5, momentum=0.0, weight_decay=0.1, decay=lambda name: name == "w")
    torch.testing.assert_close(new["w"], p["w"] * 0.95)
    assert torch.equal(new["b"], p["b"])


def test_sgd_changes_nothing_in_place():
    p, g, state = params(), params(1), sgd_init(params())
    sgd(p, g, state, lr=0.1, weight_decay=0.1)
    assert_same(p, params())
    assert_same(g, params(1))
    assert all((m == 0).all() for m in state.momentum.values())


def test_a_tensor_learning_rate_is_a_number():
    a, _ = sgd(params(), params(1), sgd_init(params()), lr=0.25)
    b, _ = sgd(params(), params(1), sgd_init(params()), lr=torch.tensor(0.25))
    assert_same(a, b)


def test_ema_by_hand():
    average = {"w": torch.zeros(1, dtype=torch.float64)}
    expected = 0.0
    for step in range(20):
        average = ema(average, {"w": torch.full((1,), step + 1.0, dtype=torch.float64)}, step, decay=0.5)
        d = min(0.5, (1 + step) / (10 + step))
        expected = expected * d + (step + 1) * (1 - d)
    assert average["w"].item() == pytest.approx(expected, rel=FLOAT64)


@pytest.mark.parametrize("step", [0, 1, 10, 10**6, 10**9])
def test_ema_decay_of_tensors_and_numbers(step):
    expected = min(0.99999, (1 + step) / (10 + step))
    assert ema_decay(step) == pytest.approx(expected, rel=FLOAT64)
    tensor = ema_decay(torch.tensor(float(step), dtype=torch.float64))
    assert isinstance(tensor, torch.Tensor)
    assert tensor.item() == pytest.approx(expected, rel=FLOAT64)


def test_an_average_of_the_same_stays():
    p = params()
    new = ema({k: v.clone() for k, v in p.items()}, p, 3)
    for k in p:
        torch.testing.assert_close(new[k], p[k], rtol=FLOAT64, atol=0)


def test_ema_in_place_is_ema():
    average, now = params(), params(1)
    kept = dict(average)
    expected = ema(params(), now, 5)
    ema_(average, now, 5)
    for k in average:
        torch.testing.assert_close(average[k], expected[k], rtol=FLOAT64, atol=FLOAT64)
        assert average[k] is kept[k]
    assert_same(now, params(1))


def test_warmup_cosine():
    def rate(step: int) -> float:
        return warmup_cosine(step, peak=2.0, warmup=10, total=110, minimum=0.5)

    assert rate(0) == 0
    assert rate(5) == pytest.approx(1.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(1.25)  # half way: the middle of peak and minimum
    assert rate(35) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(110) == rate(10**6) == pytest.approx(0.5)
    rates = [rate(s) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_no_warmup_starts_at_the_peak():
    assert warmup_cosine(0, peak=2.0, warmup=0, total=10) == 2.0
    assert warmup_cosine(0, peak=2.0, warmup=0, total=0) == 2.0
    assert warmup_cosine(1, peak=2.0, warmup=0, total=1) == pytest.approx(0.0)


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_gate_on_the_device_lets_all_through_or_nothing(is_open, nesterov):
    p, grads, m, average = (params(seed) for seed in range(4))
    if not is_open:
        grads["w"][0, 0], grads["s"][0] = float("nan"), float("inf")
    options: Any = {"lr": 0.1, "nesterov": nesterov, "weight_decay": 0.01}
    new, state = sgd(p, grads, SGDState(m), **options)
    expected = (new, state.momentum, ema(average, new, 3)) if is_open else (p, m, average)
    q, n, a = ({name: t.clone() for name, t in side.items()} for side in (p, m, average))
    gate = torch.tensor(is_open)
    sgd_(list(q.values()), list(grads.values()), list(n.values()), gate=gate, **options)
    ema_(a, q, 3, gate=gate)
    for side, wanted in zip((q, n, a), expected, strict=True):
        for name, t in side.items():
            torch.testing.assert_close(t, wanted[name], rtol=1e-6, atol=1e-6)  # the gated weight is float32


_LAST = torch.channels_last
_SHAPES = {"kernel": (64, 3, 3, 3), "linear": (10, 64), "rest": (7, 9), "one": (1,), "empty": (0, 4), "bias": (64,)}


def _three(last: bool = False) -> list[list[torch.Tensor]]:
    """Return parameters, gradients and momenta."""
    g = generator(5)
    sets = [[torch.randn(s, generator=g) for s in _SHAPES.values()] for _ in range(3)]
    return [[t.contiguous(memory_format=_LAST) if last and t.ndim == 4 else t for t in tensors] for tensors in sets]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_torchs_fused_kernel_computes_the_same_bits(monkeypatch, nesterov, last, overwrite):
    options: Any = {"lr": 0.3, "momentum": 0.7, "nesterov": nesterov, "weight_decay": 0.01, "overwrite": overwrite}
    fused, plain = _three(last), _three(last)
    taken = []
    monkeypatch.setattr(module, "fused_sgd_", lambda p, *rest, **o: (taken.extend(p), fused_sgd_(p, *rest, **o)))
    sgd_(*fused, **options)
    assert [tuple(t.shape) for t in taken] == [(64, 3, 3, 3), (10, 64), (0, 4), (64,)]
    monkeypatch.setattr(module, "_is_fusible", lambda *_: False)
    sgd_(*plain, **options)
    for a, b in zip((*fused[0], *fused[2]), (*plain[0], *plain[2]), strict=True):
        assert torch.equal(a, b)
    if not overwrite:
        assert all(torch.equal(a, b) for a, b in zip(fused[1], _three(last)[1], strict=True))


def test_what_the_fused_kernel_does_not_take_is_updated_too():
    g = generator(6)
    odd = {
        "transposed": [torch.randn(8, 16, generator=g).t() for _ in range(3)],
        "strides": [torch.randn(16, 8, generator=g), torch.randn(8, 16, generator=g).t(), torch.zeros(16, 8)],
        "part": [torch.randn(16, 16, generator=g)[:, :8] for _ in range(3)],
        "double": [torch.randn(64, generator=g, dtype=torch.float64) for _ in range(3)],
        "half": [torch.randn(64, generator=g).bfloat16() for _ in range(3)],
    }
    for name, (p, grad, m) in odd.items():
        wanted, state = sgd({"p": p}, {"p": grad}, SGDState({"p": m}), lr=0.1, weight_decay=0.1)
        q, n = p.clone(), m.clone()
        sgd_([q], [grad.clone()], [n], lr=0.1, weight_decay=0.1)
        tolerance: Any = {"rtol": 2e-2, "atol": 2e-2} if name == "half" else {}
        torch.testing.assert_close(q, wanted["p"], msg=name, **tolerance)
        torch.testing.assert_close(n, state.momentum["p"], msg=name, **tolerance)


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_momentum_the_momenta_are_the_gradients(nesterov):
    p, grads, m = _three()
    start = [t.clone() for t in p]
    sgd_(p, grads, m, lr=0.5, momentum=0.0, nesterov=nesterov)
    for new, old, grad, momentum in zip(p, start, grads, m, strict=True):
        assert torch.equal(momentum, grad)
        torch.testing.assert_close(new, old - 0.5 * grad)


def test_a_mode_that_counts_operators_sees_torchs_operators(monkeypatch):
    monkeypatch.setattr(module, "fused_sgd_", lambda *_, **__: pytest.fail("fused"))
    with FlopCounterMode(display=False):
        sgd_(*_three(), lr=0.1)
