"""Runs that begin with small images: which epoch has which size, and that nothing else of the run changes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import nfzoo
from nfzoo.errors import ConfigError
from nfzoo.train import run as train
from nfzoo.train import trainer
from nfzoo.train.batches import epoch_size
from nfzoo.train.config import TrainConfig, recipes
from nfzoo.train.config.defaults import chosen
from tests.support.pictures import few_digits
from tests.support.processes import together

OPTIONS = ["--model", "nfnet-test", "--data", few_digits(), "--batch-size", "80", "--workers", "0", "--epochs", "4"]
OPTIONS += ["--train-size", "16", "--test-size", "20", "--optim.lr", "0.4", "--optim.warmup-epochs", "0"]
OPTIONS += ["--drop-rate", "0.2", "--stochastic-depth", "0.2", "--optim.ema-decay", "0.9", "--save-steps", "1"]
OPTIONS += ["--augment.layers", "1", "--augment.mixup", "0.2", "--augment.cutmix", "true"]
SIZES = ["--progressive-sizes", "8"]
# Eight float32 steps with sums in another order; a parameter is of order one.
PROCESSES_TOLERANCE = 1e-5


class Died(BaseException):
    """Stands for the end of the process."""


def run(output: Path, *options: str) -> int:
    return train.main([*OPTIONS, "--output", str(output), *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in found]


def sizes(folder: Path) -> list[int]:
    return [row["train_size"] for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, *SIZES, "--keep-checkpoints", "9") == 0
    return folder


def test_epochs_divide_evenly_among_sizes() -> None:
    for count, epochs, shares in (
        (1, 3, [3]),
        (2, 2, [1, 1]),
        (3, 15, [5, 5, 5]),
        (4, 15, [4, 4, 4, 3]),
        (3, 4, [2, 1, 1]),
        (4, 360, [90, 90, 90, 90]),
    ):
        found = [epoch_size(range(count), epoch, epochs) for epoch in range(epochs)]
        assert found == sorted(found)
        assert [found.count(size) for size in range(count)] == shares


def test_images_grow_and_held_out_images_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update, apply = trainer.Trainer._update, trainer.apply
    trained, held_out = [], set()

    def seen(self: trainer.Trainer, inputs: Any) -> Any:
        trained.extend(part.images.shape[-1] for part in inputs)
        return update(self, inputs)

    def scored(cfg: Any, params: Any, x: torch.Tensor) -> torch.Tensor:
        held_out.add(x.shape[-1])
        return apply(cfg, params, x)

    monkeypatch.setattr(trainer.Trainer, "_update", seen)
    monkeypatch.setattr(trainer, "apply", scored)
    sheet = tmp_path / "sheet.png"
    assert run(tmp_path / "run", "--progressive-sizes", "8,12", "--augmented-sheet", str(sheet)) == 0
    assert trained == [8] * 4 + [12] * 2 + [16] * 2
    assert held_out == {20}
    assert sizes(tmp_path / "run") == [8, 8, 12, 16]
    printed = capsys.readouterr().out
    assert "10 classes, 8, 12, 16 pixels (held out at 20); 1 process(es)" in printed
    assert "epoch   3/4  12 pixels  train loss" in printed
    assert nfzoo.from_pretrained(tmp_path / "run").preprocessing.train_size == 16
    assert (
        run(tmp_path / "small", "--train-size", "8", "--epochs", "1", "--augmented-sheet", str(tmp_path / "eight.png"))
        == 0
    )
    with Image.open(sheet) as first, Image.open(tmp_path / "eight.png") as eight:
        assert first.tobytes() == eight.tobytes()


def test_an_epoch_is_that_of_a_run_of_its_size(tmp_path: Path, whole: Path) -> None:
    """Order, crops, masks and mixtures: the first two epochs are to the bit those of a run of small images."""
    assert run(tmp_path / "small", "--train-size", "8", "--keep-checkpoints", "9") == 0
    for step in (1, 4, 5):
        small, grows = (
            load_file(f / "checkpoints" / f"step_0000000{step}" / "model.safetensors")
            for f in (tmp_path / "small", whole)
        )
        assert all(torch.equal(small[key], grows[key]) for key in small) == (step < 5)


def test_dead_in_any_size(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = trainer.Trainer.train_step
    for step in (1, 4, 5):  # in the first size, between the two, in the second

        def dying(self: trainer.Trainer, parts: list, step: int = step) -> None:
            if self.step == step:
                raise Died
            take_step(self, parts)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "train_step", dying)
            with pytest.raises(Died):
                run(tmp_path / "run", *SIZES, "--resume", "true")
    assert run(tmp_path / "run", *SIZES, "--resume", "true") == 0
    assert same(tmp_path / "run", whole)
    assert rows(tmp_path / "run") == rows(whole)
    assert sizes(whole) == [8, 8, 16, 16]


def test_other_epochs_divide_anew_and_never_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch that has begun keeps its size."""
    take_step = trainer.Trainer.train_step

    def dying(self: trainer.Trainer, parts: list) -> None:
        if self.step == 3:
            raise Died
        take_step(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", dying)
        with pytest.raises(Died):
            run(tmp_path / "run", *SIZES)
    assert run(tmp_path / "run", "--progressive-sizes", "12", "--resume", "true") == 2
    assert "is of a run with progressive_sizes [8], not [12]" in capsys.readouterr().err
    shutil.copytree(tmp_path / "run", tmp_path / "shorter")
    assert run(tmp_path / "shorter", *SIZES, "--epochs", "2", "--resume", "true") == 0
    assert sizes(tmp_path / "shorter") == [8, 8]  # the second had begun
    assert run(tmp_path / "run", *SIZES, "--epochs", "3", "--resume", "true") == 0
    assert sizes(tmp_path / "run") == [8, 8, 16]
    assert run(tmp_path / "run", *SIZES, "--epochs", "7", "--resume", "true") == 0
    assert sizes(tmp_path / "run") == [8, 8, *5 * [16]]  # by the rule the fourth would have 8


def test_each_size_has_a_graph(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a graph refuses another shape than the first; the old one is gone before the next is made."""
    graphs: list[set[tuple[int, ...]]] = []

    class Graph:
        def __init__(self, fn: Any) -> None:
            self.fn, self.shapes = fn, set()
            graphs.append(self.shapes)

        def __call__(self, inputs: Any) -> Any:
            self.shapes.update(tuple(part.images.shape) for part in inputs)
            assert len(self.shapes) == 1
            return self.fn(inputs)

    monkeypatch.setattr(trainer, "CudaGraph", Graph)
    monkeypatch.setattr(trainer, "uses_cuda_graph", lambda *_: True)
    assert run(tmp_path / "run", *SIZES) == 0
    assert graphs == [{(80, 3, 8, 8)}, {(80, 3, 16, 16)}]
    assert same(tmp_path / "run", whole)


def test_sizes_that_do_not_rise_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--progressive-sizes", "12,8"], "progressive_sizes must be rising numbers of pixels, not [12, 8]"),
        (["--progressive-sizes", "8,8"], "must be rising"),
        (["--progressive-sizes", "0,8"], "must be rising"),
        (["--progressive-sizes", "[]"], "progressive_sizes must be whole numbers such as 128,160, not '[]'"),
        (["--progressive-sizes", "8:12"], "must be whole numbers such as 128,160, not '8:12'"),
        (["--progressive-sizes", "8,12.5"], "must be whole numbers such as 128,160, not '8,12.5'"),
        (["--progressive-sizes", "8,16"], "[8, 16] come before the model's train_size 16, and must be below it"),
        (["--progressive-sizes", "8,10,12,14"], "4 epochs are too few for 5 sizes"),
    ):
        assert run(tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    in_python: Any = [8, 12]
    config = TrainConfig(model="nfnet-test", data="digits", output="x", progressive_sizes=in_python)
    assert config.progressive_sizes == (8, 12)
    for text in ("8,12", "[8, 12]"):
        parsed = recipes.parse(["--model", "m", "--data", "d", "--output", "o", "--progressive-sizes", text])
        assert parsed.progressive_sizes == (8, 12)
    (tmp_path / "sizes.yaml").write_text("model: m\ndata: d\noutput: o\nprogressive_sizes: [8, 12]\n")
    assert recipes.parse(["--recipe", str(tmp_path / "sizes.yaml")]).progressive_sizes == (8, 12)
    with pytest.raises(ConfigError, match="progressive_sizes must be rising numbers of pixels"):
        TrainConfig(model="nfnet-test", data="digits", output="x", progressive_sizes=())


def test_epochs_need_not_be_given() -> None:
    config = TrainConfig(model="nfnet-test", data="digits", output="x", progressive_sizes=(8, 12))
    assert config.epochs is None
    assert chosen(config, images=400, processes=1).config.epochs == 15
    many = dataclasses.replace(config, progressive_sizes=tuple(range(8, 23)))
    with pytest.raises(ConfigError, match="15 epochs are too few for 16 sizes"):
        chosen(many, images=400, processes=1)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, whole: Path) -> None:
    """With DDP and with sharded parameters."""
    ways = {"ddp": ["--accumulation", "2"], "fsdp2": ["--sharding", "fsdp2"]}
    together(tmp_path, [[*OPTIONS, *SIZES, "--output", str(tmp_path / name), *more] for name, more in ways.items()])
    one = weights(whole)
    for name in ways:
        found = weights(tmp_path / name)
        assert max(float((one[key] - found[key]).abs().max()) for key in one) < PROCESSES_TOLERANCE, name
        assert sizes(tmp_path / name) == sizes(whole)


@pytest.mark.slow
def test_killed_in_the_second_size(tmp_path: Path, whole: Path) -> None:
    options = [*OPTIONS, *SIZES, "--output", str(tmp_path / "run"), "--resume", "true"]
    command = [sys.executable, "-m", "nfzoo.train", *options]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    while not (tmp_path / "run" / "checkpoints" / "step_00000005").is_dir() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "checkpoints" / "step_00000008").is_dir()
    assert train.main(options) == 0
    assert same(tmp_path / "run", whole)
    assert rows(tmp_path / "run") == rows(whole)
