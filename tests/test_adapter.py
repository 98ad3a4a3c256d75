"""AGCSGD, the torch optimizer: groups, state, schedulers, scalers; its arithmetic is that of `nfzoo.optim.sgd`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from nfzoo import AGCSGD, NFNet, param_groups
from tests.helpers import SMALL, generator, images, random_params

FLOAT32 = 1e-6  # the same sums in another order
SHAPES = [(6, 4, 3, 3), (5, 7), (8,), (1,)]


def leaves() -> list[nn.Parameter]:
    g = generator()
    return [nn.Parameter(torch.randn(s, generator=g)) for s in SHAPES]


def give_gradients(parameters, step: int, scale: float = 1.0) -> None:
    g = generator(100 + step)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=g)


def shell() -> NFNet:
    made = NFNet(SMALL["nfnet"])
    made.load_state_dict(random_params(made.config))
    return made.eval()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_without_clipping_it_is_torchs_sgd(nesterov, weight_decay):
    a, b = leaves(), leaves()
    mine = AGCSGD(a, lr=0.1, clip=None, nesterov=nesterov, weight_decay=weight_decay)
    theirs = torch.optim.SGD(b, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    for step in range(5):
        for parameters, optimizer in ((a, mine), (b, theirs)):
            give_gradients(parameters, step)
            optimizer.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=FLOAT32, atol=FLOAT32)
    assert mine.clipped_fraction is None


def test_groups_of_a_model():
    model = shell()
    kinds = model.parameter_kinds()
    groups = param_groups(model, weight_decay=0.5, clip=0.25)
    name_of = {id(p): name for name, p in model.named_parameters()}
    seen = []
    for group in groups:
        for p in group["params"]:
            kind = kinds[name_of[id(p)]]
            seen.append(name_of[id(p)])
            assert group["weight_decay"] == (0.5 if kind in ("weight", "head") else 0.0)
            assert group["clip"] == (None if kind == "head" else 0.25)
    assert sorted(seen) == sorted(kinds)
    assert all(g["clip"] is None for g in param_groups(model, clip=None))


def test_frozen_parameters_are_left_out():
    model = shell()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head."))
    groups = param_groups(model)
    assert sorted(p.shape for g in groups for p in g["params"]) == sorted(p.shape for p in model.head.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(images(model.config)).sum().backward()
    AGCSGD(groups, lr=0.1).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


def test_clip_is_a_group_option():
    a, b, c = (nn.Parameter(torch.ones(1, 4)) for _ in range(3))
    optimizer = AGCSGD([{"params": [a]}, {"params": [b], "clip": None}, {"params": [c], "clip": 0.5}], lr=1, momentum=0)
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, change in ((a, 0.01), (b, 1.0), (c, 0.5)):
        torch.testing.assert_close(p.detach(), torch.full((1, 4), 1 - change))
    assert optimizer.clipped_fraction is not None
    assert optimizer.clipped_fraction.item() == 1.0


def test_clipped_fraction_is_of_units():
    p = nn.Parameter(torch.ones(4, 1))
    optimizer = AGCSGD([p], lr=0.1)
    assert optimizer.clipped_fraction is None
    p.grad = torch.tensor([[1.0], [0.0], [1e-3], [1.0]])
    optimizer.step()
    assert optimizer.clipped_fraction is not None
    assert optimizer.clipped_fraction.item() == 0.5


def test_the_gradients_are_not_touched():
    parameters = leaves()
    give_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    AGCSGD(parameters, lr=0.1, weight_decay=0.1).step()
    assert same(before, [p.grad for p in parameters])


def test_state_dict_goes_on_bit_for_bit(tmp_path):
    model = shell()
    optimizer = AGCSGD(param_groups(model), lr=0.1)

    def step(m, o, seed):
        o.zero_grad()
        m(images(m.config, seed=seed)).square().mean().backward()
        o.step()

    for seed in range(2):
        step(model, optimizer, seed)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = shell()
    resumed = AGCSGD(param_groups(other, weight_decay=1.0, clip=None), lr=99.0)
    saved = torch.load(tmp_path / "state.pt")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for seed in range(2, 5):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert same(model.parameters(), other.parameters())
    assert not same(model.parameters(), shell().parameters())


def test_deepcopy_goes_on_bit_for_bit():
    parameters = leaves()
    optimizer = AGCSGD(parameters, lr=0.1)
    give_gradients(parameters, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    copies = twin.param_groups[0]["params"]
    for group in (parameters, copies):
        give_gradients(group, 1)
    optimizer.step()
    twin.step()
    assert same(parameters, copies)
    assert parameters[0] is not copies[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=6),
    ],
    ids=["cosine", "one-cycle"],
)
def test_schedulers_move_the_learning_rate(make):
    """As torch's SGD does under the same scheduler; OneCycleLR moves the momentum too."""
    a, b = leaves(), leaves()
    mine = AGCSGD(a, lr=0.1, clip=None)
    theirs = torch.optim.SGD(b, lr=0.1, momentum=0.9, nesterov=True)
    rates = set()
    for step, (parameters, optimizer) in enumerate([(a, mine), (b, theirs)]):
        scheduler = make(optimizer)
        for step in range(5):
            give_gradients(parameters, step)
            optimizer.step()
            scheduler.step()
            rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) == 5  # five different rates, the same for both
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_tensor_learning_rate():
    a, b = leaves(), leaves()
    for parameters, lr in ((a, 0.25), (b, torch.tensor(0.25))):
        give_gradients(parameters, 0)
        AGCSGD(parameters, lr=lr).step()
    assert same(a, b)


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(1))
    optimizer = AGCSGD([p], lr=1.0, clip=None, momentum=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (3 * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3
    assert p.item() == pytest.approx(-2)
    assert optimizer.step() is None


def test_under_a_grad_scaler():
    a, b = leaves(), leaves()
    scaled, plain = AGCSGD(a, lr=0.1), AGCSGD(b, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaler.scale(torch.zeros(()))
        give_gradients(a, step, scaler.get_scale())
        give_gradients(b, step)
        scaler.step(scaled)
        scaler.update()
        plain.step()
    assert same(a, b)
    give_gradients(a, 9)
    assert a[0].grad is not None
    a[0].grad[0] = math.inf
    scaler.step(scaled)
    scaler.update()
    assert same(a, b)  # skipped
    assert scaler.get_scale() == 2.0**9


def test_no_gradient_no_step():
    a, b = leaves()[:2]
    optimizer = AGCSGD([a, b], lr=0.1, weight_decay=0.1)
    before = b.detach().clone()
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert torch.equal(b, before)
    assert b not in optimizer.state


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"lr": -0.1}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_bad_options_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        AGCSGD(leaves(), **{"lr": 0.1, **bad})
    with pytest.raises(ValueError, match=match):  # in a group as well
        AGCSGD([{"params": leaves(), **bad}], lr=0.1)
    optimizer = AGCSGD(leaves(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": leaves(), **bad})
    assert len(optimizer.param_groups) == 1
