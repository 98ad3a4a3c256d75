"""Four devices with a part of the batch each train what one device trains, AGC included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nfzoo.step import StepConfig, init_state, train_step
from tests.support.helpers import random_params, relative
from tests.xla.data_parallel import CFG, LABELS, RATE, STEP, STEPS, batch

ROOT = Path(__file__).resolve().parents[2]
LOSS = 1e-5  # of losses around 1; a mean of four means is summed in another order
PARAMETER = 1e-4  # relative, for the same reason
CLIPPING = 1e-2  # relative: what clipping has to change at least for this to be a test of it


@pytest.fixture(scope="module")
def spread() -> dict:
    """What `tests.xla.data_parallel` reports."""
    env = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.xla.data_parallel"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_same_training(spread: dict) -> None:
    assert spread["devices"] == 4
    assert "devices=[4,1,1,1]" in spread["sharding"]
    ends = {}
    for config in (STEP, StepConfig(clip=None, ema_decay=0.9)):
        state, losses = init_state(random_params(CFG), config), []
        for i in range(STEPS):
            x, noise = batch(i)
            state, seen = train_step(CFG, state, (x, LABELS), noise, RATE, config=config)
            losses.append(seen.loss.item())
        ends[config.clip] = losses, state.params
    losses, params = ends[STEP.clip]
    assert spread["losses"] == pytest.approx(losses, abs=LOSS)
    assert spread["params"].keys() == params.keys()
    for name, value in params.items():
        assert relative(torch.tensor(spread["params"][name]), value) < PARAMETER, name
    assert max(relative(value, ends[None][1][name]) for name, value in params.items()) > CLIPPING
