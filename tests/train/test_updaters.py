"""Gates, loss scalers and averages of an update, by the papers' optimizer and by any of torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nfzoo.errors import ConfigError
from nfzoo.optim.agc_sgd import AGCSGD
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.train.run import prepared
from nfzoo.train.updaters import PapersUpdater, TorchUpdater, Updater

LR = 0.1


def updater(kind: str, prepare=lambda optimizer: optimizer) -> tuple[Updater, torch.nn.Parameter]:
    p = torch.nn.Parameter(torch.ones(4, 3))
    live = {"conv.weight": p, "frozen": torch.full((2,), 5.0)}
    config = OptimConfig(clip=None, ema_decay=0.5, momentum=0.0, nesterov=False)
    if kind == "papers":
        optimizer = AGCSGD([p], LR, clip=None, ema_decay=0.5, momentum=0.0, nesterov=False)
        return PapersUpdater(optimizer, prepare(optimizer), live, p.device), p
    sgd = torch.optim.SGD([p], LR)
    return TorchUpdater(sgd, prepare(sgd), live, config), p


both = pytest.mark.parametrize("kind", ["papers", "torch"])


@both
def test_the_average_follows_the_number_of_the_step_and_stays_behind_a_gate(kind: str) -> None:
    made, p = updater(kind)
    p.grad = torch.ones(4, 3)
    made.begin(0, 0.2)
    made.step(torch.tensor(True))
    averages = made.averages
    assert averages is not None
    assert averages.keys() == {"conv.weight", "frozen"}
    torch.testing.assert_close(p.detach(), torch.full((4, 3), 0.8))
    # The decay of step 0 is (1 + 0) / (10 + 0).
    torch.testing.assert_close(averages["conv.weight"], torch.full((4, 3), 0.1 * 1.0 + 0.9 * 0.8))
    before = averages["conv.weight"].clone()
    made.begin(1, 0.2)
    made.step(torch.tensor(False))
    assert torch.equal(made.averages["conv.weight"], before)  # type: ignore[index]
    torch.testing.assert_close(p.detach(), torch.full((4, 3), 0.8))
    made.begin(1000, 0.2)
    made.step(torch.tensor(True))  # far from the beginning it is the decay that was asked for
    torch.testing.assert_close(made.averages["conv.weight"], 0.5 * before + 0.5 * torch.full((4, 3), 0.6))  # type: ignore[index]
    assert torch.equal(made.averages["frozen"], torch.full((2,), 5.0))  # type: ignore[index]


@both
def test_a_step_that_a_loss_scaler_skips_moves_no_average(kind: str) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # Accelerate's optimizer asks its state
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    made, p = updater(kind, lambda optimizer: AcceleratedOptimizer(optimizer, scaler=scaler))
    scaler.scale(torch.zeros(()))  # a scaler makes its scale on first use
    p.grad = torch.full((4, 3), float("inf"))
    made.begin(0, LR)
    made.step(None)
    averages = made.averages
    assert averages is not None
    assert torch.equal(p.detach(), torch.ones(4, 3))
    assert torch.equal(averages["conv.weight"], torch.ones(4, 3))
    assert made.clipped is None
    p.grad = torch.full((4, 3), scaler.get_scale())
    made.begin(1, LR)
    made.step(None)
    torch.testing.assert_close(p.detach(), torch.full((4, 3), 0.9))
    decay = 2 / 11
    torch.testing.assert_close(made.averages["conv.weight"], torch.full((4, 3), decay + (1 - decay) * 0.9))  # type: ignore[index]


def test_a_run_trains_with_the_average_of_its_optimizer(tmp_path: Path) -> None:
    config = TrainConfig(model="nfnet-test", data="digits", output=str(tmp_path / "run"), batch_size=142, workers=0)
    with prepared(config) as trainer:
        optimizer = trainer.learner.optimizer
        assert isinstance(optimizer, AGCSGD)
        assert {group["ema_decay"] for group in optimizer.param_groups} == {config.optim.ema_decay}
        assert {group["eps"] for group in optimizer.param_groups} == {config.optim.agc_eps}
        names, averages = trainer.learner.names, trainer.learner.averages
        assert averages is not None
        for p, name in names.items():
            assert averages[name] is optimizer.state[p]["ema"]
        tensors = trainer.learner.tensors()
        assert tensors["average"].keys() == tensors["model"].keys()
        assert {key.partition("::")[2] for key in tensors["optimizer"]} == {"momentum_buffer"}


def test_options_of_sgd_alone_are_refused_for_others() -> None:
    for option in ({"momentum": 0.5}, {"nesterov": False}):
        with pytest.raises(ConfigError, match=rf"optim\.{next(iter(option))} .* is of sgd"):
            OptimConfig(name="adamw", **option)  # type: ignore[arg-type]
    OptimConfig(name="adamw", options={"betas": [0.9, 0.95]})
