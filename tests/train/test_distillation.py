"""Knowledge distillation: the loss, what a teacher sees and answers, and runs that have one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import nfzoo
from nfzoo.config import Preprocessing
from nfzoo.hub.publish import bundle
from nfzoo.train import run as train
from nfzoo.train import trainer
from nfzoo.train.distillation import Teacher, distillation_loss
from nfzoo.train.learner import Learner
from tests.support.helpers import random_params
from tests.support.loops import each
from tests.support.pictures import few_digits
from tests.support.processes import together

OPTIONS = ["--model", "nfnet-test", "--data", few_digits(), "--epochs", "1", "--batch-size", "32", "--workers", "0"]
OPTIONS += ["--train-size", "16", "--test-size", "16", "--optim.lr", "0.4", "--optim.warmup-epochs", "0"]
OPTIONS += ["--drop-rate", "0.2", "--stochastic-depth", "0.2", "--optim.ema-decay", "0.9", "--save-steps", "2"]
OPTIONS += ["--augment.layers", "1", "--augment.mixup", "0.2", "--augment.cutmix", "true"]
# Five float32 steps with sums in another order; a parameter is of order one.
PROCESSES_TOLERANCE = 1e-5


class Died(BaseException):
    """Stands for the end of the process."""


def model(seed: int = 0, *, labels: str | None = "0123456789", **changes: Any) -> nfzoo.nn.NFNet:
    """Return a network whose answers differ from image to image, as those of random weights do not."""
    made = nfzoo.create("nfnet-test", **changes)
    made.load_state_dict(random_params(made.config, seed))
    made.labels = None if labels is None else tuple(labels)
    return made.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = model(3)
    teacher.preprocessing = dataclasses.replace(teacher.preprocessing, train_size=16)
    return teacher.save_pretrained(tmp_path_factory.mktemp("teachers") / "private-place" / "wise")


def run(output: Path, *options: str) -> int:
    return train.main([*OPTIONS, "--output", str(output), *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_loss_is_hintons() -> None:
    """By sums over classes in float64, and by torch's kl_div of probabilities."""
    g = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    for temperature in (0.5, 1.0, 4.0):
        total = 0.0
        for student, teacher in zip(s.tolist(), t.tolist(), strict=True):
            p, q = ([math.exp(z / temperature) for z in row] for row in (teacher, student))
            total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        wanted = temperature**2 * total / 5
        assert float(distillation_loss(s, t, temperature)) == pytest.approx(wanted, rel=1e-12)
        of_torch = torch.nn.functional.kl_div(
            (s / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="batchmean"
        )
        assert float(distillation_loss(s, t, temperature)) == pytest.approx(float(of_torch * temperature**2), rel=1e-12)
    assert float(distillation_loss(t, t, 2.0)) == 0
    # Half precision of the student's logits does not reach the sums.
    low = distillation_loss(s.bfloat16(), t.float(), 4.0)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(distillation_loss(s.bfloat16().double(), t, 4.0)), rel=1e-5)


def test_a_teacher_answers_for_the_students_pixels() -> None:
    """In its own normalisation, channels and size, and in the order of the data's classes."""
    teacher = model(1, labels="9876543210")
    teacher.preprocessing = Preprocessing(train_size=16, test_size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    order = tuple(range(9, -1, -1))
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def normalised(x: torch.Tensor, p: Preprocessing) -> torch.Tensor:
        return (x - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None]

    def answers(student: Preprocessing, x: torch.Tensor, **options: Any) -> torch.Tensor:
        prepared = Teacher(teacher, order, student, **options).prepare(torch.device("cpu"), compiled=False)
        return prepared.logits(normalised(x, student), contextlib.nullcontext)

    with torch.no_grad():
        wanted = teacher(normalised(pixels, teacher.preprocessing))[:, list(order)]
        for student in (teacher.preprocessing, Preprocessing(train_size=16, test_size=16)):
            assert torch.allclose(answers(student, pixels), wanted, atol=1e-4)
        # A grey student's image is an image of three equal channels, as Pillow converts it.
        grey = Preprocessing(train_size=16, test_size=16).for_channels(1)
        equal = pixels[:, :1].expand(-1, 3, -1, -1)
        wanted = teacher(normalised(equal, teacher.preprocessing))[:, list(order)]
        assert torch.allclose(answers(grey, pixels[:, :1]), wanted, atol=1e-4)
        # Another size is resized to that of the teacher's training, or to one that is named.
        for size, options in ((16, {}), (12, {"size": 12})):
            small = torch.nn.functional.interpolate(pixels, size=8, mode="area")
            large = torch.nn.functional.interpolate(small, size=size, mode="bicubic", antialias=True)
            wanted = teacher(normalised(large, teacher.preprocessing))[:, list(order)]
            assert torch.allclose(answers(grey.for_channels(3), small, **options), wanted, atol=1e-4)


def test_a_grey_teacher_sees_luma() -> None:
    teacher = model(1, in_channels=1)
    student = Preprocessing(train_size=32, test_size=32)
    made = Teacher(teacher, range(10), student).prepare(torch.device("cpu"), compiled=False)
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    grey = torch.tensor(np.asarray(Image.fromarray(levels).convert("L")) / 255, dtype=torch.float32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.mean, student.std))
    seen = made.images((((torch.tensor(levels) / 255).permute(2, 0, 1) - mean) / std)[None])
    own = teacher.preprocessing
    assert torch.allclose(seen[0, 0] * own.std[0] + own.mean[0], grey, atol=0.51 / 255)  # Pillow rounds


def test_answers_are_float32_in_mixed_precision() -> None:
    teacher = model(1)
    made = Teacher(teacher, range(10), teacher.preprocessing).prepare(torch.device("cpu"), compiled=False)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    low = made.logits(x, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert low.dtype == torch.float32
    assert not torch.equal(low, low.bfloat16().float())  # the classifier did not round
    exact = made.logits(x, contextlib.nullcontext)
    assert not torch.equal(low, exact)  # the convolutions did
    assert torch.allclose(low, exact, rtol=0.05, atol=0.1)
    assert not low.requires_grad


def test_a_run_learns_the_loss_that_its_options_say(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mixing, class weights, smoothing and accumulation; the teacher sees the very pixels of the student."""
    update, seen, wise = trainer.Trainer._update, [], nfzoo.from_pretrained(folder)

    def checked(self: trainer.Trainer, inputs: Any) -> Any:
        for part in inputs:
            logits, answers = torch.randn(len(part.images), 10), self.learner.answers(part.images)
            resized = torch.nn.functional.interpolate(part.images, size=24, mode="bicubic", antialias=True)
            with torch.no_grad():
                own = wise(resized)
            assert answers is not None
            assert torch.allclose(answers, own, atol=1e-4)
            hard = -(0.9 * part.targets + 0.01) * torch.tensor([2.5] + 9 * [1.0]) * logits.log_softmax(1)
            soft = torch.nn.functional.kl_div((logits / 2).log_softmax(1), (own / 2).softmax(1), reduction="batchmean")
            wanted = 0.25 * hard.sum(1).mean() + 0.75 * 4 * soft
            assert float(self.learner.loss(logits, part.targets, answers)) == pytest.approx(float(wanted), rel=1e-4)
            seen.append(len(part.images))
        return update(self, inputs)

    monkeypatch.setattr(trainer.Trainer, "_update", checked)
    options = ["--teacher", str(folder), "--distillation.alpha", "0.75", "--distillation.temperature", "2"]
    options += ["--distillation.size", "24"]
    options += ["--class-weights", "{0: 2.5}", "--accumulation", "2", "--batch-size", "80"]
    assert run(tmp_path / "run", *options) == 0
    assert seen == 4 * [40]


@each("options", [["--optim.name", "adamw"], ["--optim.sam-rho", "0.05"]])
def test_a_run_learns_from_its_teacher(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """An alpha of 0 leaves the bits of a run without one, and any other does not. SAM ascends by the whole loss."""
    shutil.rmtree(tmp_path, ignore_errors=True)
    loss, answered = Learner.loss, []

    def seen(self: Learner, logits: torch.Tensor, targets: torch.Tensor, answers: torch.Tensor | None) -> torch.Tensor:
        answered.append((len(logits), 0 if answers is None else len(answers)))
        return loss(self, logits, targets, answers)

    monkeypatch.setattr(Learner, "loss", seen)
    options = [*options, "--optim.lr", "0.01", "--batch-size", "140"]
    assert run(tmp_path / "none", *options) == 0
    assert run(tmp_path / "zero", *options, "--teacher", str(folder), "--distillation.alpha", "0") == 0
    assert run(tmp_path / "some", *options, "--teacher", str(folder)) == 0
    assert same(tmp_path / "none", tmp_path / "zero")
    assert not same(tmp_path / "none", tmp_path / "some")
    some = answered[-len(answered) // 3 :]
    assert some == ([(28, 28)] if "--optim.sam-rho" in options else []) + [(140, 140)]


def test_dead_runs_go_on_with_the_same_teacher_alone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = trainer.Trainer.train_step

    def dying(self: trainer.Trainer, parts: list) -> None:
        if self.step == 3:
            raise Died
        take_step(self, parts)

    teacher = ["--teacher", str(folder)]
    assert run(tmp_path / "whole", *teacher) == 0
    for name, options in (("run", teacher), ("alone", [])):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "train_step", dying)
            with pytest.raises(Died):
                run(tmp_path / name, *options)
    other = model(4).save_pretrained(tmp_path / "other")
    turned = model(3, labels="9876543210").save_pretrained(tmp_path / "turned")
    capsys.readouterr()
    for name, options, message in (
        ("run", ["--teacher", str(other)], "is not the 'wise' of"),
        ("run", ["--teacher", str(turned)], "is not the 'wise' of"),
        ("run", [], "is of a run with the teacher 'wise'; name it with --teacher"),
        ("run", [*teacher, "--distillation.alpha", "0.5"], "is of a run with distillation.alpha 0.9, not 0.5"),
        ("alone", teacher, "is of a run without a teacher"),
    ):
        assert run(tmp_path / name, *options, "--resume", "true") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert run(tmp_path / "run", "--teacher", str(moved), "--resume", "true") == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    # Neither the model nor what is published of the run has the teacher's path, and both have its name.
    whole = tmp_path / "whole"
    assert (nfzoo.from_pretrained(whole).provenance or {})["teacher"] == "wise"
    assert '| teacher | "wise" |' in bundle(whole, "someone/digits").card
    published = bundle(whole, "someone/digits").files["train.yaml"]
    assert isinstance(published, bytes)
    assert yaml.safe_load(published)["teacher"] == "wise"
    for file in whole.rglob("*"):
        if file.is_file() and "checkpoints" not in file.parts and file.name != "train.yaml":
            assert b"private-place" not in file.read_bytes(), file


def test_a_teacher_that_does_not_fit_is_refused(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    letters = model(labels="abcdefghij").save_pretrained(tmp_path / "letters")
    few = model(labels="012345678", num_classes=9).save_pretrained(tmp_path / "few")
    headless = model(labels=None, num_classes=0).save_pretrained(tmp_path / "headless")
    five = model(in_channels=5).save_pretrained(tmp_path / "five")
    broken = model(5)
    with torch.no_grad():
        broken.get_parameter("head.bias")[0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    sets = model(4)
    sets.problem_type = "multi_label_classification"
    sets.save_pretrained(tmp_path / "sets")
    several = ["--task", "multi-label", "--labels", str(tmp_path / "labels.csv")]
    for options, message in (
        (["--teacher", str(letters)], "letters' does not know the classes of the data: 10 of the 10"),
        (["--teacher", str(few)], "few' does not know the classes of the data: 1 of the 10"),
        (["--teacher", str(headless)], "headless' has no classifier"),
        (["--teacher", str(five)], "takes images of 5 channels, and the model of 3"),
        (["--teacher", str(tmp_path / "broken")], "has numbers in 'head.bias' that are not finite"),
        (["--teacher", "nfnet-test"], "the teacher: no weights are published for 'nfnet-test'"),
        (["--teacher", "nfnet-tset"], "did you mean 'nfnet-test'"),
        (["--teacher", str(tmp_path / "sets")], "sets' gives sets of labels"),
        (["--teacher", str(folder), *several], "with task multi-label an image has several; leave it out"),
        (["--teacher", ""], "teacher must not be empty"),
        (["--distillation.alpha", "0.9"], "the options of distillation need a teacher"),
        (["--teacher", str(tmp_path / "out")], "out' would replace the teacher; choose another output"),
        (["--teacher", str(folder), "--distillation.alpha", "1.5"], "distillation.alpha must be in [0, 1]"),
        (["--teacher", str(folder), "--distillation.temperature", "0"], "distillation.temperature must be positive"),
        (["--teacher", str(folder), "--distillation.size", "0"], "distillation.size must be from 1 to 4096"),
    ):
        assert run(tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    # More classes than the data have, and none by name, can be answered for.
    more = model(labels="x0123456789", num_classes=11).save_pretrained(tmp_path / "more")
    nameless = model(labels=None, num_classes=10).save_pretrained(tmp_path / "nameless")
    folded = model(3).for_inference().save_pretrained(tmp_path / "folded")
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        for teacher in (more, nameless, folded):
            assert run(tmp_path / f"of-{teacher.name}", "--teacher", str(teacher), "--batch-size", "140") == 0


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, folder: Path) -> None:
    """With DDP, in parts of a batch, and with sharded parameters, where each process has the whole teacher."""
    teacher = ["--teacher", str(folder)]
    assert run(tmp_path / "one", *teacher) == 0
    ways = {"ddp": [], "parts": ["--accumulation", "2"], "fsdp2": ["--sharding", "fsdp2"]}
    runs = [[*OPTIONS, *teacher, "--output", str(tmp_path / name), *options] for name, options in ways.items()]
    together(tmp_path, runs)
    one, start = weights(tmp_path / "one"), nfzoo.create("nfnet-test").state_dict()
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1000 * PROCESSES_TOLERANCE
    for name in ways:
        found = weights(tmp_path / name)
        assert max(float((one[key] - found[key]).abs().max()) for key in one) < PROCESSES_TOLERANCE, name


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same() -> None:
    teacher = model(1, depths=(1, 1, 1, 1), widths=(16, 16, 16, 16), group_width=8, stem_width=16)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, compiled = (
        Teacher(teacher, range(10), teacher.preprocessing)
        .prepare(torch.device("cpu"), compiled=way)
        .logits(x, contextlib.nullcontext)
        for way in (False, True)
    )
    assert not torch.equal(plain, compiled)  # one was compiled
    assert torch.allclose(plain, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, folder: Path) -> None:
    options = [*OPTIONS, "--teacher", str(folder), "--epochs", "8"]
    assert train.main([*options, "--output", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "nfzoo.train", *options, "--output", str(tmp_path / "run"), "--resume", "true"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    while not (tmp_path / "run" / "checkpoints").is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert train.main(command[3:]) == 0
    assert same(tmp_path / "run", tmp_path / "whole")
