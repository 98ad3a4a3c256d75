"""Differentially private gradients: the bound on each example's part, the noise, the sampling, and the epsilon."""

import builtins
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nfzoo import dp
from nfzoo.data.digits import Digits
from nfzoo.dp import MissingAccountantError, clipped_sum, epsilon, poisson_sample, private_gradient, train_privately
from nfzoo.model import apply, init
from nfzoo.step import cross_entropy
from nfzoo.types import Params
from tests.support.helpers import SMALL, generator, images, random_params, relative

ROUNDING = 1e-5  # float32; vectorised and single convolutions add in another order
CFG = SMALL["nf-resnet-se"]


def problem(batch: int = 6) -> tuple[Params, tuple[Tensor, Tensor]]:
    labels = torch.arange(batch) % CFG.num_classes
    return random_params(CFG), (images(CFG, batch=batch, height=16), labels)


def loss_fn(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(apply(CFG, params, x[None]), y[None])


def single(params: Params, x: Tensor, y: Tensor) -> tuple[Params, float]:
    """One example's gradient and its norm, by plain backpropagation."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss_fn(leaves, x, y).backward()
    grads = {name: p.grad for name, p in leaves.items() if p.grad is not None}
    assert len(grads) == len(params)
    return grads, math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


def flat(tree: Params) -> Tensor:
    return torch.cat([t.flatten() for t in tree.values()])


# ---------------------------------------------------------------- the sum


def test_it_is_the_sum_of_clipped_gradients_taken_one_by_one() -> None:
    params, (x, y) = problem()
    found = [single(params, a, b) for a, b in zip(x, y, strict=True)]
    norms = sorted(norm for _, norm in found)
    clip = (norms[2] + norms[3]) / 2  # half of them are clipped
    expected = sum(flat(g) * min(1.0, clip / norm) for g, norm in found)
    total, measured = clipped_sum(loss_fn, params, (x, y), clip_norm=clip)
    assert isinstance(expected, Tensor)
    assert relative(flat(total), expected) < ROUNDING
    assert relative(measured, torch.tensor([norm for _, norm in found])) < ROUNDING


@pytest.mark.parametrize("clip", [1e-6, 0.1, 1e3])
def test_no_example_adds_more_than_the_clipping_norm(clip: float) -> None:
    params, (x, y) = problem()
    before = torch.zeros(())
    for count in range(1, len(x) + 1):
        total, norms = clipped_sum(loss_fn, params, (x[:count], y[:count]), clip_norm=clip)
        part = (flat(total) - before).norm()
        assert part <= clip * (1 + ROUNDING)
        assert part == pytest.approx(min(clip, float(norms[-1])), rel=1e-3)
        before = flat(total)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
def test_chunks_do_not_change_the_sum(chunk: int) -> None:
    params, batch = problem()
    whole, norms = clipped_sum(loss_fn, params, batch, clip_norm=0.5)
    parts, same = clipped_sum(loss_fn, params, batch, clip_norm=0.5, chunk=chunk)
    assert relative(flat(parts), flat(whole)) < ROUNDING
    assert relative(same, norms) < ROUNDING


def test_an_empty_batch_adds_nothing() -> None:
    params, (x, y) = problem()
    total, norms = clipped_sum(loss_fn, params, (x[:0], y[:0]), clip_norm=1.0)
    assert norms.shape == (0,)
    assert not flat(total).any()


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    params, (x, y) = problem(3)
    x[1] = math.nan
    total, norms = clipped_sum(loss_fn, params, (x, y), clip_norm=1.0)
    assert norms.isfinite().tolist() == [True, False, True]
    others, _ = clipped_sum(loss_fn, params, (x[::2], y[::2]), clip_norm=1.0)
    assert relative(flat(total), flat(others)) < ROUNDING


# ---------------------------------------------------------------- noise and sampling


def test_without_noise_and_clipping_it_is_the_mean_gradient() -> None:
    params, (x, y) = problem()
    private = private_gradient(loss_fn, params, (x, y), clip_norm=1e6, noise_multiplier=0.0, expected_batch=len(x))
    plain = torch.func.grad(lambda p: cross_entropy(apply(CFG, p, x), y))(params)
    assert relative(flat(private), flat(plain)) < ROUNDING


def test_the_noise_is_normal_of_the_given_deviation_and_from_the_generator() -> None:
    params, (x, y) = problem(2)
    empty = (x[:0], y[:0])

    def draw(seed: int) -> Tensor:
        noise = private_gradient(
            loss_fn, params, empty, clip_norm=0.5, noise_multiplier=3.0, expected_batch=10.0, generator=generator(seed)
        )
        assert len({float(t.flatten()[0]) for t in noise.values()}) == len(noise)  # drawn anew for each parameter
        return flat(noise)

    noise = draw(0)
    count = len(noise)
    assert count > 5000
    std = 3.0 * 0.5 / 10.0
    assert float(noise.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count))  # five standard errors
    assert abs(float(noise.mean())) < 5 * std / math.sqrt(count)
    within = math.erf(1 / math.sqrt(2))  # of a normal variable, one standard deviation
    error = math.sqrt(within * (1 - within) / count)
    assert float((noise.abs() < std).float().mean()) == pytest.approx(within, abs=5 * error)
    assert torch.equal(draw(0), noise)
    assert not torch.equal(draw(1), noise)


def test_noise_is_added_to_the_sum_and_not_to_each_example() -> None:
    params, batch = problem()
    options: dict[str, Any] = {"clip_norm": 0.5, "expected_batch": 7.0}
    quiet = private_gradient(loss_fn, params, batch, noise_multiplier=0.0, **options)
    loud = private_gradient(loss_fn, params, batch, noise_multiplier=2.0, generator=generator(5), chunk=2, **options)
    empty = (batch[0][:0], batch[1][:0])
    noise = private_gradient(loss_fn, params, empty, noise_multiplier=2.0, generator=generator(5), **options)
    assert relative(flat(loud), flat(quiet) + flat(noise)) < ROUNDING


@pytest.mark.parametrize(
    "bad",
    [{"clip_norm": 0.0}, {"clip_norm": math.nan}, {"noise_multiplier": -1.0}, {"expected_batch": 0.0}],
)
def test_numbers_without_a_meaning(bad: dict[str, float]) -> None:
    params, batch = problem(1)
    good: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch": 1.0}
    with pytest.raises(ValueError, match=next(iter(bad))):
        private_gradient(loss_fn, params, batch, **{**good, **bad})


def test_poisson_samples_take_each_example_by_itself() -> None:
    g = generator()
    draws = [poisson_sample(50, 0.3, g) for _ in range(2000)]
    assert all(torch.equal(d, d.unique()) for d in draws)
    counts = torch.bincount(torch.cat(draws), minlength=50) / len(draws)
    assert counts == pytest.approx(torch.full((50,), 0.3), abs=5 * math.sqrt(0.21 / len(draws)))
    sizes = torch.tensor([float(len(d)) for d in draws])
    assert float(sizes.var()) == pytest.approx(50 * 0.21, rel=0.2)  # a batch of fixed size would have none
    assert len(poisson_sample(50, 0.0, g)) == 0
    assert len(poisson_sample(50, 1.0, g)) == 50


# ---------------------------------------------------------------- epsilon


def gaussian_delta(eps: float, sigma: float) -> float:
    """The exact delta of the Gaussian mechanism. Source: Balle and Wang (arXiv 1805.06530), theorem 8."""

    def cdf(z: float) -> float:
        return 0.5 * math.erfc(-z / math.sqrt(2))

    a, b = 1 / (2 * sigma), eps * sigma
    return cdf(a - b) - math.exp(eps) * cdf(-a - b)


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (20.0, 100), (5.0, 4)])
def test_without_sampling_epsilon_is_that_of_the_gaussian_mechanism(sigma: float, steps: int) -> None:
    found = epsilon(rate=1.0, noise_multiplier=sigma, steps=steps)
    # `steps` Gaussian mechanisms are one with less noise. The accountant rounds losses up, to a grid of 1e-4.
    assert gaussian_delta(found, sigma / math.sqrt(steps)) <= 1e-5 * (1 + 1e-6)
    assert gaussian_delta(found - 0.02, sigma / math.sqrt(steps)) > 1e-5


def test_epsilon_of_the_paper() -> None:
    # arXiv 1607.00133, section 3.2: q = 0.01, sigma = 4, T = 10,000, delta = 1e-5 have epsilon 1.26 by the moments
    # accountant and 9.34 by strong composition. The moments accountant is an upper bound that is not far off.
    found = epsilon(rate=0.01, noise_multiplier=4.0, steps=10_000)
    assert 0.7 * 1.26 < found < 1.26


def test_epsilon_grows_with_steps_and_falls_with_noise() -> None:
    base = epsilon(rate=0.1, noise_multiplier=2.0, steps=50)
    assert 0 < epsilon(rate=0.1, noise_multiplier=2.0, steps=25) < base
    assert epsilon(rate=0.1, noise_multiplier=3.0, steps=50) < base < epsilon(rate=0.2, noise_multiplier=2.0, steps=50)
    assert epsilon(rate=0.1, noise_multiplier=0.0, steps=1) == math.inf


def test_without_the_accountant_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("dp_accounting"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr(dp, "train_privately", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(MissingAccountantError, match=r"pip install 'nfzoo\[private\]'"):
        epsilon(rate=0.1, noise_multiplier=1.0, steps=1)
    assert dp.main([]) == 2
    assert "nfzoo[private]" in capsys.readouterr().err


# ---------------------------------------------------------------- the example


def small_digits(count: int) -> tuple[Tensor, Tensor]:
    whole = Digits.embedded()
    x, y = dp.digits(CFG.replace(in_channels=1), whole.subset(range(count)))
    return torch.nn.functional.avg_pool2d(x, 2), y


@pytest.mark.slow
def test_private_training_learns() -> None:
    cfg = CFG.replace(in_channels=1, num_classes=10)
    data = small_digits(120)
    found = train_privately(
        cfg, data, data, steps=25, batch=40.0, clip_norm=1.0, noise_multiplier=0.3, lr=0.3, seed=0, chunk=40
    )
    assert found.accuracy > 0.3  # chance is 0.1
    again = train_privately(
        cfg, data, data, steps=2, batch=40.0, clip_norm=1.0, noise_multiplier=0.3, lr=0.3, seed=0, chunk=40
    )
    same = train_privately(
        cfg, data, data, steps=2, batch=40.0, clip_norm=1.0, noise_multiplier=0.3, lr=0.3, seed=0, chunk=40
    )
    assert torch.equal(flat(again.params), flat(same.params))


def test_the_average_is_that_of_the_steps() -> None:
    cfg = CFG.replace(in_channels=1, num_classes=10)
    data = small_digits(12)
    options = {"batch": 6.0, "clip_norm": 1.0, "noise_multiplier": 0.3, "lr": 0.3, "seed": 0}
    start = init(cfg, generator=torch.Generator().manual_seed(0))
    one, two = (train_privately(cfg, data, data, steps=n, **options).params for n in (1, 2))
    averaged = train_privately(cfg, data, data, steps=2, **options, ema_decay=0.15).params
    for name, p in averaged.items():
        first = 0.1 * start[name] + 0.9 * one[name]  # decays begin with (1 + 0) / (10 + 0)
        torch.testing.assert_close(p, 0.15 * first + 0.85 * two[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "0"], "not a positive number"),
        (["--noise", "much"], "invalid"),
        (["--batch", "5000"], "cannot be drawn from"),
        (["--delta", "1"], "not between 0 and 1"),
        (["--ema-decay", "1"], "not between 0 and 1"),
        (["--steps", "1.5"], "not a whole number from 1"),
        (["--fast"], "unrecognized"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert dp.main(arguments) == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 1


def test_the_example_says_what_it_did(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    original = dp.open_split

    def few(source: str) -> object:
        split = original(source)
        return type(split)(split.train.subset(range(30)), split.validation.subset(range(10)))

    monkeypatch.setattr(dp, "open_split", few)
    assert dp.main(["--steps", "2", "--batch", "3", "--noise", "2"]) == 0
    text = capsys.readouterr().out
    assert "of 10 held-out digits" in text
    spent = epsilon(rate=0.1, noise_multiplier=2.0, steps=2)
    assert f"({spent:.2f}, 1e-05)-differentially private" in text
