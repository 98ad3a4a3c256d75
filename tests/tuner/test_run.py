"""The command: its table, picture, recipe and JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from nfzoo.cli.main import main
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.train.config.recipes import parse
from nfzoo.tuner.curves import Suggestion
from nfzoo.tuner.run import recipe
from tests.support.loops import each
from tests.support.pictures import few_digits

SMALL = ["--model", "nfnet-test", "--batch-size", "16", "--train-size", "16", "--test-size", "16", "--workers", "0"]


def find(*options: str) -> int:
    return main(["find-lr", *SMALL, "--data", few_digits(), *options])


def test_a_training_takes_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    test = [
        "--clips",
        "0.04,null",
        "--steps",
        "24",
        "--start-lr",
        "0.02",
        "--end-lr",
        "0.5",
        "--seed",
        "3",
        "--optim.momentum",
        "0.8",
    ]
    targets = ["--output", "found.yaml", "--plot", "lr.png", "--json", "result.json"]
    assert find(*test, *targets) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.yaml", "lr.png", "result.json"]
    with Image.open("lr.png") as picture:
        assert picture.width > 500
    result = json.loads(Path("result.json").read_text())
    assert [one["clip"] for one in result["tests"]] == [0.04, None]
    assert f"found: --optim.lr {result['lr']:g} --optim.clip {result['clip'] or 'null'}" in printed
    assert "threshold  0.04" in printed
    assert "the loss still fell at the end: try a higher --end-lr" in printed
    found = parse(["--recipe", "found.yaml", "--output", "run"])
    assert (found.optim.lr, found.optim.clip) == (result["lr"], result["clip"])
    assert (found.seed, found.optim.momentum, found.batch_size, found.train_size) == (3, 0.8, 16, 16)
    assert found.epochs == 15  # what its data choose
    assert "output" not in yaml.safe_load(Path("found.yaml").read_text())

    # A file that is there is not replaced unless that is said.
    assert find(*test, "--output", "found.yaml") == 2
    assert "'found.yaml' is there already; --overwrite replaces it" in capsys.readouterr().err
    Path("found.yaml").write_text("old")
    assert find(*test, "--output", "found.yaml", "--overwrite", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == result
    assert Path("found.yaml").read_text() != "old"


def test_a_recipe_holds_the_whole_run() -> None:
    run = TrainConfig(model="m", data="d", output="o", keep_best="loss", patience=2, optim=OptimConfig(lr=1.0))
    content = yaml.safe_load(recipe(run, Suggestion(0.25, None)))
    expected = yaml.safe_load(run.to_yaml())
    del expected["output"]
    assert content == {**expected, "optim": {**expected["optim"], "lr": 0.25, "clip": None}}


def test_a_loss_that_falls_at_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "found.yaml"
    rates = ["--steps", "10", "--start-lr", "1e-9", "--end-lr", "1e-8"]
    assert find("--optim.clip", "0.02", *rates, "--output", str(target), "--plot", str(tmp_path / "lr.png")) == 1
    printed = capsys.readouterr()
    assert "at no rate did the loss fall" in printed.err
    assert printed.err.count("\n") == 1
    assert "threshold  0.02" in printed.out  # the run's own
    assert not target.exists()
    assert (tmp_path / "lr.png").exists()


@each(
    ("options", "words"),
    [
        (["--clips", "0.1,-1"], "'-1' is no threshold"),
        (["--clips", "nan"], "'nan' is no threshold"),
        (["--clips", ""], "'' is no threshold"),
        (["--clips", "0.1,0.1"], "'0.1' is there twice"),
        (["--steps", "0"], "'0' is not a whole number"),
        (["--steps", "3"], "needs at least 10 steps, not 3"),
        (["--start-lr", "x"], "invalid float value: 'x'"),
        (["--start-lr", "1", "--end-lr", "0.5"], "must rise, not go from 1 to 0.5"),
        (["--output", "runs/digits"], "must end in .yaml"),
        (["--plot", "lr.jpg"], "must end in .png"),
        (["--json", "/dev/null/x"], "cannot be written"),
        (["--resume", "true"], "--resume is of nfzoo train"),
        (["--print-config"], "--print-config is of nfzoo train"),
        (["--optim.lrr", "1"], "unrecognized arguments: --optim.lrr"),
        (["--recipe", "no-such"], "there is no recipe 'no-such'"),
        (["--batch-size", "1000"], "160 training images do not fill a batch of 1000"),
        (["--optim.name", "torch.optim.None"], "cannot be made"),
    ],
)
def test_bad_input_is_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("nfzoo find-lr: error: ")
    assert words in error
    assert error.count("\n") == 1
