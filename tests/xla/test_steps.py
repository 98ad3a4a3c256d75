"""Training on XLA: the losses of the CPU, in one program that is compiled once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch_xla  # pyright: ignore[reportMissingImports]
import torch_xla.debug.metrics as metrics  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.utils._pytree import tree_map

from nfzoo import AGCSGD, NFNet, model, param_groups
from nfzoo.optim.sgd import ema_
from nfzoo.runtime.device import backend
from nfzoo.step import StepConfig, TrainState, cross_entropy, init_state, train_step
from tests.support.helpers import SMALL, generator, images, random_params

LOSS = 1e-5  # of losses around 1, after a few steps in float32
STEPS = 4
CFG = SMALL["nfnet"].replace(drop_rate=0.3, stochastic_depth=0.5)
LABELS = torch.tensor([0, 1, 3, 4])
RATES = [0.0, 0.2, 0.4, 1.0]  # 0 and 1, and the model's own alpha: numbers that a program could have in it already
STEP = StepConfig(clip=0.05, ema_decay=0.9)


def inputs() -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
    for i, rate in enumerate(RATES):
        yield images(CFG, 4, seed=i), model.sample_noise(CFG, 4, generator=generator(i)), rate


def compilations() -> int:
    """Programs compiled so far in this process."""
    data = metrics.metric_data("CompileTime")
    return 0 if data is None else data[0]


def on_cpu() -> tuple[TrainState, list[float]]:
    state, losses = init_state(random_params(CFG), STEP), []
    for x, noise, rate in inputs():
        state, seen = train_step(CFG, state, (x, LABELS), noise, rate, config=STEP)
        losses.append(seen.loss.item())
    return state, losses


def test_the_pure_step(device: torch.device) -> None:
    expected, expected_losses = on_cpu()
    chosen = backend(device)

    def step(state, x, labels, noise, lr):
        return train_step(CFG, state, (x, labels), noise, lr, config=STEP)

    # Called lazily it is the program that `torch_xla.compile` has compiled already.
    for run, compiled in ((torch_xla.compile(step, full_graph=True), [1, 0, 0, 0]), (step, [0, 0, 0, 0])):
        # Momentum of zeros that was filled on the device would be a part of the first program and of no other.
        state = tree_map(lambda t: t.to(device), init_state(random_params(CFG), STEP))
        labels = LABELS.to(device)
        losses, counts = [], []
        for x, noise, rate in inputs():
            given = x.to(device), labels, tree_map(lambda t: t.to(device), noise), chosen.scalar(rate)
            chosen.step_mark()
            before = compilations()
            state, seen = run(state, *given)
            chosen.step_mark()
            counts.append(compilations() - before)
            losses.append(seen.loss.item())
        assert counts == compiled
        assert losses == pytest.approx(expected_losses, abs=LOSS)
        assert len(set(losses)) == STEPS
        assert state.ema is not None
        assert expected.ema is not None
        for name, average in chosen.to_cpu(state.ema).items():
            torch.testing.assert_close(average, expected.ema[name], rtol=1e-4, atol=LOSS)


def test_the_optimizer(device: torch.device) -> None:
    """`AGCSGD` and a moving average in place, as the training loop runs them."""
    found = {}
    for place in ("cpu", "xla"):
        chosen = backend(place)
        net = NFNet(CFG).to(chosen.device)
        net.load_state_dict(random_params(CFG))
        net.train()
        live = dict(net.named_parameters())
        average = {name: p.detach().cpu().clone().to(chosen.device) for name, p in live.items()}
        optimizer = AGCSGD(param_groups(net, clip=0.05), 0.1)
        chosen.step_mark()
        losses, counts = [], []
        for i, (x, noise, rate) in enumerate(inputs()):
            before = compilations()
            for group in optimizer.param_groups:
                group["lr"] = chosen.scalar(rate)
            logits = net(x.to(chosen.device), {name: mask.to(chosen.device) for name, mask in noise.items()})
            loss = cross_entropy(logits, LABELS.to(chosen.device), 0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema_(average, live, i, decay=0.9)
            chosen.step_mark()
            counts.append(compilations() - before)
            losses.append(loss.item())
        found[place] = losses, chosen.to_cpu(average), counts
    (expected, expected_average, _), (losses, average, counts) = found["cpu"], found["xla"]
    assert losses == pytest.approx(expected, abs=LOSS)
    for name, value in average.items():
        torch.testing.assert_close(value, expected_average[name], rtol=1e-4, atol=LOSS)
    # Momentum is made in the first step, so that the second is another program; from then on they are the same.
    assert counts[2:] == [0, 0], counts
    assert sum(counts) <= 2
