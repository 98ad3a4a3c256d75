"""Figures of a comparison, by contenders whose outputs are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nfzoo.benchmark import measure
from nfzoo.benchmark.contenders import Contender, Program, Task
from nfzoo.benchmark.images import Data
from nfzoo.benchmark.measure import compare, facts
from nfzoo.benchmark.run import report
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.errors import ConfigError
from nfzoo.nn import NFNet, create


@pytest.fixture
def model() -> NFNet:
    return create("nfnet-test", num_classes=3, generator=torch.Generator().manual_seed(0))


# The first pixels of each image are its logits.
LOGITS = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [2.0, 1.0, 0.0], [1.0, 0.0, -1.0]])
DATA = Data(torch.zeros(5, 3, 32, 32), torch.tensor([2, 0, 1, 1, 1]), None, "by hand")
DATA.images[:, 0, 0, :3] = LOGITS


def gives(change: Tensor | float = 0.0, name: str = "eager") -> Contender:
    """A contender that answers the first pixels, plus a change of each image's logits."""

    def build(task: Task, precision: str) -> Program:
        def run(x: Tensor) -> Tensor:
            assert len(x) == task.batch
            logits = x[:, 0, 0, :3]
            if isinstance(change, Tensor):
                rows = [int((row == LOGITS).all(1).nonzero()[0]) if row.any() else 0 for row in logits]
                logits = logits + change[rows]
            return logits + (0 if isinstance(change, Tensor) else change)

        return Program(run, 3 << 20, 0.25)

    return Contender(name, "float32", build)


def test_figures_are_those_by_hand(model: NFNet) -> None:
    change = torch.zeros(5, 3)
    change[0] = torch.tensor([0.0, 2.0, 0.0])  # the second class now is the most probable
    change[4] = torch.tensor([0.5, 0.0, 0.0])
    for batch in (1, 2, 5, 7):
        first, second = compare(model, [gives(), gives(change, "other")], DATA, batch=batch, rounds=2)
        assert (first.accuracy, first.agreement, first.distance) == (3 / 5, 1.0, 0.0)
        assert (second.accuracy, second.agreement) == (2 / 5, 4 / 5)
        expected = np.sqrt(2.0**2 + 0.5**2) / np.linalg.norm(LOGITS.double().numpy())
        assert second.distance == pytest.approx(expected)
        assert (second.megabytes, second.load_seconds, second.status) == (3.0, 0.25, "measured")


def test_times_are_those_of_one_image(model: NFNet, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is asked for the time: begin and end of making it, two beginnings of calls that are not timed, then both ends
    # of five calls, of 1, 2, 4, 7 and 9 seconds.
    clock = iter([0, 3, 3, 3, 10, 11, 20, 22, 30, 34, 40, 47, 50, 59])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    (result,) = compare(model, [gives()], DATA, batch=4, rounds=5)
    assert (result.low, result.milliseconds, result.high) == (500.0, 1000.0, 1750.0)
    assert result.make_seconds == 3


def test_sets_of_labels_agree_as_a_whole(model: NFNet) -> None:
    model.problem_type, model.thresholds = MULTI_LABEL, (0.5, 0.9, 0.5)
    change = torch.zeros(5, 3)
    change[0, 1] = 0.5  # sigmoid(2.5) is 0.924, and sigmoid(2) 0.881
    change[2, 1] = 0.5  # above the threshold before and after
    unlabelled = DATA._replace(labels=None)
    _, other = compare(model, [gives(), gives(change, "other")], unlabelled, rounds=1)
    assert (other.agreement, other.accuracy) == (4 / 5, None)


def test_what_cannot_be_measured_says_why(model: NFNet) -> None:
    calls = []

    def breaks(task: Task, precision: str) -> Program:
        raise RuntimeError("no kernel\nfor this \x1b[31mprocessor")

    def later(task: Task, precision: str) -> Program:
        def run(x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 8:
                raise MemoryError
            return x[:, 0, 0, :3]

        return Program(run, 0)

    contenders = [
        gives(),
        Contender("broken", "float32", breaks),
        Contender("absent", "bf16", breaks, "some", ("no_such_module", "torch")),
        Contender("later", "float32", later),
        Contender("numbers", "int8", breaks),
        gives(float("nan"), "wrong"),
    ]
    results = compare(model, contenders, DATA, rounds=5)
    assert [(r.format, r.status, r.reason) for r in results] == [
        ("eager", "measured", None),
        ("broken", "failed", "RuntimeError: no kernel for this \x1b[31mprocessor"),
        ("absent", "missing", "needs no_such_module: pip install 'nfzoo[some]'"),
        ("later", "failed", "MemoryError"),
        ("numbers", "missing", "needs images to take ranges from: give --data"),
        ("wrong", "failed", "ArithmeticError: its outputs are not finite"),
    ]
    assert all(r.milliseconds is None for r in results[1:])
    assert facts(model, DATA, batch=1, rounds=5, results=results)["results"][1]["status"] == "failed"
    with pytest.raises(RuntimeError, match="no kernel"):
        compare(model, contenders[1:], DATA)


def test_memory_is_asked_for_and_may_fail(model: NFNet, monkeypatch: pytest.MonkeyPatch) -> None:
    def resident(contender: Contender, task: Task) -> float:
        assert (task.folder / "trained" / "config.json").exists()
        assert (task.folder / "folded" / "config.json").exists()
        if contender.format == "other":
            raise RuntimeError("its memory: killed")
        return 12.5

    monkeypatch.setattr(measure, "resident", resident)
    contenders = [gives(), gives(0.0, "other")]
    first, second = compare(model, contenders, DATA, rounds=1, memory=True)
    assert (first.memory_megabytes, first.reason, first.status) == (12.5, None, "measured")
    assert (second.memory_megabytes, second.reason, second.status) == (None, "its memory: killed", "measured")
    lines = report([first, second]).splitlines()
    assert lines[0].endswith("  MB used")
    assert sum(line.endswith(" 12") for line in lines) == 1
    assert lines[-1] == "other float32 was measured but for a part: its memory: killed"
    assert "MB used" not in report(compare(model, contenders, DATA, rounds=1))


def test_models_and_numbers_that_are_refused(model: NFNet) -> None:
    with pytest.raises(ConfigError, match="rounds must be a positive integer, not 0"):
        compare(model, [gives()], DATA, rounds=0)
    with pytest.raises(ConfigError, match=r"this one has torch\.bfloat16 on cpu"):
        compare(create("nfnet-test", dtype=torch.bfloat16), [gives()], DATA)
    with pytest.raises(ConfigError, match="no classifier"):
        compare(create("nfnet-test", num_classes=0), [gives()], DATA)
