"""The learning-rate range test: the steps of a training run at rates that rise, with one AGC threshold after another.

Source: L. Smith, arXiv 1506.01186, section 3.3, whose rate rises linearly; here it rises geometrically, as in fastai.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nfzoo.data.loader import TrainingBatch
from nfzoo.errors import ConfigError
from nfzoo.train.batches import Inputs
from nfzoo.train.config import TrainConfig, default_lr
from nfzoo.train.config.train_config import CHOSEN
from nfzoo.train.run import prepared
from nfzoo.train.trainer import Trainer
from nfzoo.tuner.curves import Curve, has_diverged, rising_rates, smooth

STEPS = 100
"""Steps of a test, as in fastai and Lightning."""
LEAST_STEPS = 10


class Step(NamedTuple):
    """A step of a range test: the mean loss of its batch, NaN if loss or gradient is not finite, and clipped units."""

    loss: float
    clipped: float


class RangeTest(Trainer):
    """The steps of a run at rates that rise, without its epochs, evaluations and checkpoints.

    Args:
        run: as `Trainer` takes them.
        start, end, steps: see `find_rates`.

    Attributes:
        rates: the rate of each step.
    """

    def __init__(self, *run: Any, start: float | None, end: float | None, steps: int) -> None:
        super().__init__(*run)
        usual = default_lr(self.config.batch_size, self.pretrained, self.config.optim.name)
        first, last = start or usual / 1000, end or usual * 100
        _check_rates(first, last)
        self.rates, self.finite = rising_rates(first, last, steps), True

    def _announce(self, counts: Mapping[str, int], *, resumed: bool) -> None:
        """Print nothing."""

    def _learning_rate(self, step: int) -> float:
        return self.rates[step]

    def _not_finite(self, step: int, inputs: Sequence[Inputs]) -> None:
        self.finite = False

    def steps(self) -> Iterator[Step]:
        """Take a step at each rate, through as many epochs as that takes; end after one whose loss is NaN."""
        self.learner.model.train()
        while True:
            parts: list[TrainingBatch] = []
            for batch in self.pipeline.batches(self.epoch, 0):
                parts.append(batch)
                if len(parts) < self.config.accumulation:
                    continue
                self.metrics.clear()
                self.train_step(parts)
                self.check_steps()
                parts = []
                loss, _, seen = self._sum(self.metrics.sums())
                whole = self.finite and seen == self.config.batch_size
                yield Step(loss / seen if whole else math.nan, float(self.metrics.clipped))
                if not whole or self.step == len(self.rates):
                    return
            self.epoch += 1


class RangeTests(NamedTuple):
    """The run that was tested, with the batch size and the epochs that its data have chosen, and the curves."""

    config: TrainConfig
    curves: list[Curve]


def find_rates(
    config: TrainConfig,
    clips: Sequence[float | None],
    *,
    start: float | None = None,
    end: float | None = None,
    steps: int = STEPS,
    report: Callable[[Curve], None] = lambda curve: None,
) -> RangeTests:
    """Return the curve of each AGC threshold, from the same weights and with the same batches and random numbers.

    Nothing is written. A curve ends where the loss is not finite, or its average more than four times the lowest.

    Args:
        config: the run; `output`, `optim.lr` and `optim.clip` are not used.
        clips: the thresholds; `None` for none.
        start, end: the first and the last learning rate; by default a thousandth and a hundredfold of `default_lr`.
        steps: of each threshold.
        report: takes each curve as soon as it is measured.

    Raises:
        ConfigError: if the rates do not rise, or there are fewer than `LEAST_STEPS` steps.
        NfzooError: as `train` does.
    """
    if steps < LEAST_STEPS:
        raise ConfigError(f"a range test needs at least {LEAST_STEPS} steps, not {steps}")
    _check_rates(start, end)
    curves, tested = [], config
    with tempfile.TemporaryDirectory() as scratch:  # for the lock of a run's folder
        once = {"tracker": None, "augmented_sheet": None, "resume": False, "output": os.path.join(scratch, "run")}
        for clip in clips:
            run = dataclasses.replace(config, **once, optim=dataclasses.replace(config.optim, clip=clip))
            make = functools.partial(RangeTest, start=start, end=end, steps=steps)
            with prepared(run, make=make) as test:
                assert isinstance(test, RangeTest)
                curves.append(_curve(test, clip))
                tested = dataclasses.replace(config, **{name: getattr(test.config, name) for name in CHOSEN})
                test.accelerator.free_memory()
            report(curves[-1])
    return RangeTests(tested, curves)


def _check_rates(start: float | None, end: float | None) -> None:
    for rate in (start, end):
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"a learning rate must be positive and finite, not {rate!r}")
    if start is not None and end is not None and not start < end:
        raise ConfigError(f"the rates of a test must rise, not go from {start:g} to {end:g}")


def _curve(test: RangeTest, clip: float | None) -> Curve:
    losses: list[float] = []
    clipped: list[float] = []
    smoothed: tuple[float, ...] = ()
    for step in test.steps():
        losses.append(step.loss)
        clipped.append(step.clipped)
        smoothed = smooth(losses, len(test.rates))
        if has_diverged(smoothed):
            break
    return Curve(clip, tuple(test.rates[: len(losses)]), tuple(losses), smoothed, tuple(clipped))
