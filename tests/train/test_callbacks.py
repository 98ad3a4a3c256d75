"""Callbacks see a run, end it and break, and never change it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nfzoo
from nfzoo.errors import TrainingError
from nfzoo.train import TrainConfig
from nfzoo.train.python.callbacks import State
from tests.support.forks import run_in_group
from tests.support.pictures import few_digits
from tests.train.test_fit import QUICK, digits, same, weights

TWO = {**QUICK, "epochs": 2, "drop_rate": 0.2}
STEPS = 5  # of an epoch


class Look(nfzoo.Callback):
    """Draw random numbers, write to the weights that it gets, and note what it sees."""

    def __init__(self) -> None:
        self.steps: list[State] = []
        self.epochs: list[State] = []

    def on_step(self, state: State) -> None:
        self.steps.append(state)
        torch.manual_seed(random.randrange(100) + np.random.randint(100))
        for value in state.weights().values():
            value.zero_()

    def on_epoch(self, state: State) -> None:
        self.epochs.append(state)
        torch.rand(3)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    look = Look()
    nfzoo.fit("nfnet-test", digits(), output=tmp_path / "alone", **TWO)
    random_numbers = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]
    nfzoo.fit("nfnet-test", digits(), output=tmp_path / "seen", callbacks=[look], **TWO)
    assert same(tmp_path / "alone", tmp_path / "seen")
    assert torch.equal(torch.get_rng_state(), random_numbers[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == random_numbers[1:]  # type: ignore[union-attr]
    assert [(state.epoch, state.step) for state in look.steps] == [(1 + i // STEPS, i + 1) for i in range(2 * STEPS)]
    assert [(state.epoch, state.step, state.is_main) for state in look.epochs] == [
        (1, STEPS, True),
        (2, 2 * STEPS, True),
    ]
    assert [dict(state.figures) for state in look.epochs] == rows(tmp_path / "seen")
    assert all(set(state.figures) == {"loss", "lr", "gradient_norm"} for state in look.steps)
    assert look.steps[-1].figures["lr"] == rows(tmp_path / "seen")[-1]["lr"]
    with pytest.raises(TypeError):
        look.steps[0].figures["loss"] = 0.0  # type: ignore[index]


def test_weights_are_those_after_the_step(tmp_path: Path) -> None:
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(nfzoo.Callback):
        def on_epoch(self, state: State) -> None:
            kept.append(state.weights())

    options = {**QUICK, "optim": {"ema_decay": None}}
    config = TrainConfig(model="nfnet-test", data=few_digits(), output=str(tmp_path / "run"), **options)
    nfzoo.train(config, callbacks=[Keep()])
    saved = weights(tmp_path / "run")
    assert kept[0].keys() == saved.keys()
    assert all(torch.equal(kept[0][key], saved[key]) for key in saved)


class StopAt(nfzoo.Callback):
    def __init__(self, step: int | None = None, epoch: int | None = None) -> None:
        self.step, self.epoch = step, epoch

    def on_step(self, state: State) -> None:
        if state.step == self.step:
            state.stop()

    def on_epoch(self, state: State) -> None:
        if state.epoch == self.epoch:
            state.stop()


def test_a_callback_ends_a_run_which_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nfzoo.fit("nfnet-test", digits(), output=tmp_path / "whole", **TWO)
    for name, stop, step in (
        ("in the midst", StopAt(step=3), 3),
        ("at the end of an epoch", StopAt(step=STEPS), STEPS),
        ("after an epoch", StopAt(epoch=1), STEPS),
    ):
        output = tmp_path / name
        capsys.readouterr()
        result = nfzoo.fit("nfnet-test", digits(), output=output, callbacks=[Look(), stop], **TWO)
        assert f"a callback ended the run after step {step}\n" in capsys.readouterr().out
        (row,) = rows(output)
        assert (row["epoch"], row["step"]) == (1, step)
        assert result.accuracy == row["accuracy"]
        assert set(weights(output)) == set(result.model.state_dict())
        nfzoo.fit("nfnet-test", digits(), output=output, resume=True, **TWO)
        assert same(output, tmp_path / "whole"), name
        assert [row["step"] for row in rows(output)] == [STEPS, 2 * STEPS]


class Fail(StopAt):
    def on_step(self, state: State) -> None:
        if state.step == self.step:
            raise KeyError("no such plot")

    def on_epoch(self, state: State) -> None:
        if state.epoch == self.epoch:
            raise KeyError("no such plot")


def test_an_error_in_a_callback_ends_the_run_and_names_the_checkpoint(tmp_path: Path) -> None:
    for name, fail, where, step in (
        ("a", Fail(step=3), "on_step", 3),
        ("b", Fail(step=STEPS), "on_step", STEPS),
        ("c", Fail(epoch=2), "on_epoch", 2 * STEPS),
    ):
        with pytest.raises(TrainingError) as caught:
            nfzoo.fit("nfnet-test", digits(), output=tmp_path / name, callbacks=[fail], **TWO)
        said = f"the callback Fail.{where} failed after step {step} (KeyError: 'no such plot'); "
        assert str(caught.value).startswith(said)
        assert f"step_{step:08}" in str(caught.value)
        assert str(caught.value).endswith("call nfzoo.fit again with resume=True")
        assert isinstance(caught.value.__cause__, KeyError)
    nfzoo.fit("nfnet-test", digits(), output=tmp_path / "a", resume=True, **TWO)
    assert same(tmp_path / "a", tmp_path / "c")


class Counts:
    """No `nfzoo.Callback`, but with one of its methods."""

    seen = 0

    def on_epoch(self, state: State) -> None:
        self.seen += 1


def test_any_object_with_a_method_is_a_callback(tmp_path: Path) -> None:
    counts = Counts()
    nfzoo.fit("nfnet-test", digits(), output=tmp_path / "run", callbacks=(counts, nfzoo.Callback()), **QUICK)
    assert counts.seen == 1


class OneProcess(nfzoo.Callback):
    """Do something in the second of two processes alone, at the third step or after the first epoch."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_step(self, state: State) -> None:
        if state.step == 3 and not state.is_main:
            if self.kind == "stop":
                state.stop()
            if self.kind == "fail":
                raise KeyError("no such plot")

    def on_epoch(self, state: State) -> None:
        if self.kind == "stop after an epoch" and not state.is_main:
            state.stop()


def in_one_process(arguments: list[str]) -> int:
    kind, output = arguments
    data = digits()
    if kind == "other data" and os.environ["RANK"] == "1":
        data.targets[0], data.samples[0] = 1, (data.samples[0][0], 1)
    try:
        print(nfzoo.fit("nfnet-test", data, output=output, callbacks=[OneProcess(kind)], **TWO).accuracy)
    except nfzoo.NfzooError as error:
        print(error)
        return error.exit_status
    return 0


@pytest.mark.slow
def test_processes_agree_on_what_one_of_them_asks(tmp_path: Path) -> None:
    few_digits()
    failed = (
        "the callback of another process failed after step 3; ",
        "the callback OneProcess.on_step failed after step 3",
    )
    different = "the processes have different images or labels in 'memory:Files'"
    for kind, status, said, step in (
        ("stop", 0, ("a callback ended the run after step 3", ""), 3),
        ("stop after an epoch", 0, (f"a callback ended the run after step {STEPS}", ""), STEPS),
        ("fail", 1, failed, 3),
        ("other data", 2, (different, different), None),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        done = run_in_group(in_one_process, [kind, str(folder / "run")], folder)
        for (code, out, err), text in zip(done, said, strict=True):
            assert (code, text in out) == (status, True), (kind, out, err)
        saved = sorted(path.name for path in (folder / "run" / "checkpoints").glob("step_*"))
        assert saved == ([] if step is None else [f"step_{step:08}"]), kind
