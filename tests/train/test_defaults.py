"""The options that are chosen by the data where nobody gave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nfzoo.data.loader import share_of_batch
from nfzoo.train import run as train
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.train.config.defaults import chosen, reasons
from nfzoo.train.config.recipes import parse
from nfzoo.transforms.mixing import Augment
from tests.support.loops import each
from tests.support.pictures import few_digits


def config(**options: object) -> TrainConfig:
    settings: dict = {"model": "nfnet-test", "data": "photos", "output": "run", **options}
    return TrainConfig(**settings)


@each(
    ("images", "batch", "epochs"),
    [
        (1_281_167, 32, 15),
        (1438, 32, 15),  # the embedded digits
        (224, 32, 15),  # 7 steps an epoch
        (223, 16, 15),
        (112, 16, 15),
        (111, 8, 15),
        (56, 8, 15),
        (55, 8, 17),  # 6 steps an epoch
        (8, 8, 100),
        (3, 8, 100),  # too few for a batch, which is refused later
    ],
)
def test_small_data_have_smaller_batches_and_more_epochs(images: int, batch: int, epochs: int) -> None:
    run, lines = chosen(config(), images, 1)
    assert (run.batch_size, run.epochs) == (batch, epochs)
    assert [line.split(",")[0] for line in lines] == [f"batch size {batch}", f"epochs {epochs}"]


def test_what_is_given_stays() -> None:
    run, lines = chosen(config(batch_size=64, epochs=3), 100, 1)
    assert (run.batch_size, run.epochs, lines) == (64, 3, ())
    run, lines = chosen(config(batch_size=50), 1000, 1)
    assert (run.batch_size, run.epochs, len(lines)) == (50, 15, 1)
    run, lines = chosen(config(epochs=3), 100, 1)
    assert (run.batch_size, run.epochs, len(lines)) == (8, 3, 1)


def test_a_batch_divides_among_all_parts() -> None:
    for processes, accumulation, mixup in ((1, 1, 0.2), (3, 1, 0.0), (3, 1, 0.2), (2, 3, 0.2), (64, 1, 0.0)):
        run, _ = chosen(config(accumulation=accumulation, augment=Augment(mixup=mixup)), 200, processes)
        share = share_of_batch(run.batch_size, world=processes, accumulation=accumulation)
        assert not (mixup and share % 2)
        assert run.batch_size - 16 < processes * accumulation * (2 if mixup else 1)


def test_a_resumed_run_never_chooses_anew() -> None:
    earlier = config(batch_size=16, epochs=40).to_dict()
    run, lines = chosen(config(), 100, 1, earlier)
    assert (run.batch_size, run.epochs, lines) == (16, 40, ())
    assert chosen(config(epochs=50), 100, 1, earlier).config.epochs == 50


def test_a_run_keeps_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "nfnet-test", "--data", few_digits(), "--workers", "0", "--train-size", "16"]
    small += ["--test-size", "16", "--validation-fraction", "0.8", "--output"]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert train.main([*small, first, "--epochs", "1"]) == 0
    assert "batch size 8, as 40 images then make 5 steps an epoch\n" in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "first/train.yaml").read_text())
    assert (written["batch_size"], written["epochs"]) == (8, 1)
    # Resumed with the same options but for that which the data would choose, and without any.
    assert train.main([*small, second, "--epochs", "1", "--batch-size", "20"]) == 0
    assert train.main([*small, second, "--epochs", "2", "--resume", "true"]) == 0
    assert train.main(["--output", second, "--epochs", "3", "--resume", "true"]) == 0
    assert "batch size" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]


def test_print_config_shows_what_is_chosen_later_as_null(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--print-config", "--optim.lr", "0.3"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["epochs"], shown["batch_size"], shown["accumulation"]) == (None, None, None)
    run = parse(["--model", "m", "--data", "d", "--output", "o", "--epochs", "null", "--batch-size", "16"])
    assert (run.epochs, run.batch_size) == (None, 16)


@each(
    ("options", "pretrained", "said"),
    [
        ({}, False, ["learning rate 0.05, as 0.1 is for", "AGC threshold 0.1, which is for batches below 1024"]),
        (
            {},
            True,
            ["learning rate 0.005, as 0.1 is for batches of 64 to 256, and in proportion outside, and a", "AGC"],
        ),
        ({"lr": 0.3, "clip": 0.02}, False, []),
        ({"name": "adamw", "clip": None}, False, ["learning rate 0.001, the default of adamw"]),
        (
            {"batch": 4096},
            False,
            ["learning rate 1.6,", "AGC threshold 0.1, which is for batches below 1024; the papers' 0.01"],
        ),
    ],
)
def test_rate_and_threshold_are_explained(options: dict, pretrained: bool, said: list[str]) -> None:
    batch = options.pop("batch", 32)
    lines = reasons(config(batch_size=batch, optim=OptimConfig(**options)), pretrained)
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
