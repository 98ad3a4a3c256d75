"""The range test takes the steps of `nfzoo train`, at rates of its own, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nfzoo.errors import ConfigError, DataError
from nfzoo.nn import create
from nfzoo.optim.sgd import warmup_cosine
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.train.run import prepared, train
from nfzoo.tuner import Curve, find_rates
from nfzoo.tuner.range_test import RangeTest
from tests.support.loops import each
from tests.support.pictures import few_digits, write_images

# Sums in another order, over ten float32 steps whose losses are of order one.
ORDER_TOLERANCE = 1e-5
# The same over twenty steps, of which the last ones are at rates at which training is about to diverge.
PROCESSES_TOLERANCE = 1e-4


def config(output: str = "not written", **options: object) -> TrainConfig:
    settings: dict = {"model": "nfnet-test", "data": few_digits(), "output": output, "batch_size": 16, "workers": 0}
    return TrainConfig(**{**settings, "train_size": 16, "test_size": 16, **options})


def rate_curves(run: TrainConfig, clips: list[float | None], **options: Any) -> list[Curve]:
    return find_rates(run, clips, **options).curves


def test_its_steps_are_those_of_a_training(tmp_path: Path) -> None:
    run = config(str(tmp_path / "run"), epochs=2, batch_size=32, optim=OptimConfig(lr=0.2, clip=0.04, ema_decay=None))
    train(run)
    make = functools.partial(RangeTest, start=1e-3, end=1.0, steps=10)
    with prepared(dataclasses.replace(run, output=str(tmp_path / "none")), make=make) as test:
        assert isinstance(test, RangeTest)
        steps = test.steps_per_epoch
        assert steps == 5
        test.rates = tuple(warmup_cosine(step, peak=0.2, warmup=steps, total=2 * steps) for step in range(2 * steps))
        losses = [step.loss for step in test.steps()]
    trained = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(trained[name], p) for name, p in test.learner.live.items())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[:steps]) / steps == pytest.approx(rows[0]["train_loss"])
    assert sum(losses[steps:]) / steps == pytest.approx(rows[1]["train_loss"])


def test_every_threshold_begins_alike_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create("nfnet-test", num_classes=3).save_pretrained("three")  # so that a classifier is drawn
    run = config(model="three", sampler="balanced")
    before = sorted(tmp_path.rglob("*"))
    first, second = rate_curves(run, [0.01, None], start=0.01, end=0.3, steps=12)
    assert sorted(tmp_path.rglob("*")) == before
    assert (first.clip, second.clip) == (0.01, None)
    assert first.losses[0] == second.losses[0]
    assert first.losses[-1] != second.losses[-1]
    assert max(first.clipped) > 0 == max(second.clipped)
    assert len(first.rates) == 12  # more than an epoch
    assert (first.rates[0], first.rates[-1]) == pytest.approx((0.01, 0.3))
    again = rate_curves(run, [0.01], start=0.01, end=0.3, steps=12)
    assert again == [first]


def test_default_rates_surround_that_of_training() -> None:
    curve = rate_curves(config(epochs=1), [0.01], steps=10)[0]
    usual = 0.1 * 16 / 64
    assert curve.rates[0] == pytest.approx(usual / 1000)
    assert curve.rates[1] / curve.rates[0] == pytest.approx(1e5 ** (1 / 9))


def test_a_test_ends_where_the_loss_does() -> None:
    (curve,) = rate_curves(config(), [None], start=1e20, end=1e30, steps=20)
    assert len(curve.rates) < 20
    assert math.isnan(curve.losses[-1])
    assert all(math.isfinite(loss) for loss in curve.losses[:-1])


@each(
    "options",
    [
        {"optim": OptimConfig(name="adamw", clip=None)},
        {"optim": OptimConfig(name="torch.optim.NAdam")},
        {"tune": "head", "optim": OptimConfig(clip=None)},
        {"optim": OptimConfig(sam_rho=0.05)},
    ],
)
def test_runs_of_every_kind(options: dict) -> None:
    run = config(**options)
    (curve,) = rate_curves(run, [run.optim.clip], start=1e-3, end=0.01, steps=10)
    assert curve.losses[-1] != curve.losses[0]
    assert (max(curve.clipped) > 0) == (run.optim.clip is not None)


def test_accumulated_steps_have_the_losses_of_whole_ones() -> None:
    whole, parts = (rate_curves(config(accumulation=n), [0.04], start=1e-2, end=0.3, steps=10)[0] for n in (1, 2))
    assert parts.losses == pytest.approx(whole.losses, abs=ORDER_TOLERANCE)


def test_what_cannot_be_tested_is_refused(tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"steps": 3}, "at least 10 steps"),
        ({"start": 0.1, "end": 0.1}, "must rise"),
        ({"start": 1e3}, "must rise"),
        ({"start": math.nan}, "positive"),
        ({"end": -1.0}, "positive"),
    )
    for options, words in cases:
        with pytest.raises(ConfigError, match=words):
            rate_curves(config(), [0.1], **options)
    folder = write_images(tmp_path / "cats", {"cat": 40})
    with pytest.raises(DataError, match="one class alone"):
        rate_curves(config(data=str(folder)), [0.1])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    options = ["--model", "nfnet-test", "--data", few_digits(), "--batch-size", "16", "--workers", "0"]
    options += ["--train-size", "16", "--test-size", "16", "--clips", "0.04,null", "--steps", "20"]
    options += ["--start-lr", "0.02", "--end-lr", "0.5"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    found = []
    for program, name in ((launch, "two"), ([sys.executable, "-m"], "one")):
        target = tmp_path / f"{name}.json"
        command = [*program, "nfzoo.tuner", *options, "--json", str(target), "--output", str(tmp_path / f"{name}.yaml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("found:") == 1
        found.append(json.loads(target.read_text()))
    for two, one in zip(*(result["tests"] for result in found), strict=True):
        assert two["losses"] == pytest.approx(one["losses"], rel=PROCESSES_TOLERANCE)
    assert found[0]["lr"] == found[1]["lr"]
    assert (tmp_path / "two.yaml").read_text() == (tmp_path / "one.yaml").read_text()
