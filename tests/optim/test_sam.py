"""Sharpness-aware minimisation: the ascent's length and direction, in place and pure alike."""

import pytest
import torch

from nfzoo.model import apply, init
from nfzoo.optim.clipping import agc
from nfzoo.optim.sam import ascent_rows, restore_, sam_ascent, sam_ascent_
from nfzoo.step import StepConfig, cross_entropy, init_state, train_step
from tests.support.helpers import SMALL, generator, images, random_params

EXACT = 1e-6  # float32 sums of a few thousand numbers of order one


def test_ascent_has_the_length_rho_along_the_gradient() -> None:
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]]), "frozen": torch.tensor([5.0])}
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    moved = sam_ascent(params, grads, rho=0.5)
    assert torch.allclose(moved["a"], torch.tensor([1.3, 2.0]))
    assert torch.allclose(moved["b"], torch.tensor([[3.4]]))
    assert moved["frozen"] is params["frozen"]
    assert params["a"].tolist() == [1.0, 2.0]


def test_a_vanishing_gradient_moves_nothing() -> None:
    params = {"a": torch.tensor([1.0, 2.0])}
    assert torch.equal(sam_ascent(params, {"a": torch.zeros(2)})["a"], params["a"])


def test_in_place_equals_pure_and_is_undone_to_the_bit() -> None:
    params = random_params(SMALL["nfnet"])
    grads = random_params(SMALL["nfnet"], seed=1)
    pure = sam_ascent(params, grads, rho=0.05)
    live = [p.clone() for p in params.values()]
    before = sam_ascent_(live, list(grads.values()), rho=0.05)
    assert all(torch.allclose(a, b, atol=EXACT) for a, b in zip(live, pure.values(), strict=True))
    restore_(live, before)
    assert all(torch.equal(a, b) for a, b in zip(live, params.values(), strict=True))


@pytest.mark.parametrize(("rows", "fraction", "wanted"), [(10, 0.2, 2), (4, 0.2, 1), (1, 0.2, 1), (5, 1.0, 5)])
def test_rows_of_the_ascent(rows: int, fraction: float, wanted: int) -> None:
    assert ascent_rows(rows, fraction) == wanted


@pytest.mark.parametrize(("rho", "clip"), [(0.05, None), (30.0, 0.001)])
def test_pure_step_takes_the_gradient_at_the_ascent(rho: float, clip: float | None) -> None:
    cfg = SMALL["nfnet"]
    params = random_params(cfg)
    x, labels = images(cfg, 5), torch.arange(5)
    config = StepConfig(sam_rho=rho, clip=clip, weight_decay=0.0, momentum=0.0, nesterov=False, ema_decay=None)
    state, metrics = train_step(cfg, init_state(params, config), (x, labels), None, 0.1, config=config)

    def loss(p: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
        return cross_entropy(apply(cfg, p, x[:rows]), labels[:rows], 0.1)

    at = sam_ascent(params, torch.func.grad(loss)(params, 1), rho=rho)  # a fifth of five images
    grads = torch.func.grad(loss)(at, 5)
    if clip is not None:  # to a part of the weights from which the ascent began
        grads = agc(grads, params, clip=clip, where=lambda name: name != "head.weight")
    for name, p in params.items():
        assert torch.allclose(state.params[name], p - 0.1 * grads[name], atol=EXACT), name
    assert float(metrics.loss) == pytest.approx(float(loss(at, 5)), abs=EXACT)
    assert abs(float(loss(at, 5)) - float(loss(params, 5))) > 100 * EXACT


def test_pure_step_without_sam_is_what_it_was() -> None:
    cfg = SMALL["nfnet"]
    params = init(cfg, generator=generator())
    batch = images(cfg, 4), torch.arange(4)
    plain, _ = train_step(cfg, init_state(params), batch, None, 0.1)
    tiny, _ = train_step(cfg, init_state(params), batch, None, 0.1, config=StepConfig(sam_rho=1e-12))
    assert all(torch.allclose(plain.params[k], tiny.params[k], atol=EXACT) for k in params)
