"""Training runs side by side: what differs, what is best, and how it fails."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from nfzoo.cli.compare import Run, differences, read_run
from nfzoo.cli.main import main
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.transforms.mixing import Augment


def write_run(folder: Path, accuracies: list[float | None], *, averaged: bool = False, **options: Any) -> Path:
    folder.mkdir(parents=True)
    config = TrainConfig(**{"model": "nfnet-test", "data": "digits", "output": str(folder), **options})
    (folder / "train.yaml").write_text(config.to_yaml())
    rows = []
    for epoch, value in enumerate(accuracies, start=1):
        row: dict[str, Any] = {"epoch": epoch, "train_loss": 2 / epoch, "accuracy": value, "loss": 1 / epoch}
        if averaged:
            row |= {"accuracy": 0.0, "ema_accuracy": value, "ema_loss": 0.5 / epoch}
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    return folder


def test_options_curves_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "first", [0.5, 0.9, 0.9, 0.8], epochs=15)
    second = write_run(
        tmp_path / "x" / "second", [0.25, 0.75], averaged=True, epochs=7, optim=OptimConfig(clip=0.16, nesterov=False)
    )
    target, picture = tmp_path / "c.json", tmp_path / "c.png"
    assert main(["compare", str(first), str(second), "--output", str(picture), "--json", str(target)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    default = TrainConfig(model="nfnet-test", data="digits", output="x")
    assert lines[:-2] == [
        ["first", "second"],
        ["epochs", "15", "7"],
        ["optim.clip", str(default.optim.clip), "0.16"],
        ["optim.nesterov", "true", "false"],
        ["epochs", "done", "4", "2"],
        ["best", "accuracy", "90.00%", "75.00%"],
        ["in", "epoch", "2", "2"],
        ["last", "accuracy", "80.00%", "75.00%"],
        ["last", "loss", "0.2500", "0.2500"],
        ["last", "training", "loss", "0.5000", "1.0000"],
    ]
    assert lines[-2:] == [["wrote", str(target)], ["wrote", str(picture)]]
    found = json.loads(target.read_text())["runs"]
    assert [run["name"] for run in found] == ["first", "second"]
    assert found[1]["options"] == {"epochs": 7, "optim.clip": 0.16, "optim.nesterov": False}
    assert {key: found[0][key] for key in ("epochs", "best_accuracy", "best_epoch", "accuracy", "loss")} == {
        "epochs": 4,
        "best_accuracy": 0.9,
        "best_epoch": 2,
        "accuracy": 0.8,
        "loss": 0.25,
    }
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert {(0x25, 0x63, 0xC9), (0xD9, 0x73, 0x0D)} <= colours


def test_runs_that_are_equal_or_have_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two folders of one name, one of them of a run that measured nothing, and a folder of figures alone."""
    runs = [write_run(tmp_path / name / "$run_{x}", [value]) for name, value in (("a", 0.5), ("b", None))]
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "c.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [str(run) for run in runs]
    assert lines[1] == "no option differs"
    assert re.fullmatch(r"best accuracy +50\.00% +-", lines[3])
    (runs[1] / "train.yaml").unlink()
    assert main(["compare", str(runs[0] / "metrics.jsonl"), str(runs[1]), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert found[0]["options"]["model"] == "nfnet-test"
    assert found[1]["options"]["model"] is None


def test_augmentation_by_default_is_compared_by_its_options(tmp_path: Path) -> None:
    """The default of photographs is the papers' crops, from which MixUp alone differs; the digits have another."""
    folders = {"none": None, "mixup": Augment(mixup=0.2)}
    runs = [
        read_run(write_run(tmp_path / name, [0.5], data="photos", augment=value), name)
        for name, value in folders.items()
    ]
    assert differences(runs) == {"augment.mixup": [0.0, 0.2]}
    runs[1] = read_run(write_run(tmp_path / "digits", [0.5]), "digits")
    assert differences(runs) == {
        "data": ["photos", "digits"],
        "augment.scale": [[0.08, 1.0], [0.7, 1.0]],
        "augment.ratio": [[3 / 4, 4 / 3], [0.85, 1.18]],
        "augment.flip": [0.5, 0.0],
    }


def test_an_option_that_a_run_lacks_differs() -> None:
    runs = [Run(name, options, []) for name, options in (("a", {"new": 1, "output": "a"}), ("b", {"output": "b"}))]
    assert differences(runs) == {"new": [1, None]}


def test_bad_input_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(write_run(tmp_path / "good", [0.5]))
    for name, text in (("list", "[1]"), ("tag", "a: !!python/name:os.system"), ("none", None)):
        folder = write_run(tmp_path / name, [0.5])
        (folder / "train.yaml").write_text(text or yaml.safe_dump({}))
    (tmp_path / "none" / "metrics.jsonl").unlink()
    for arguments, message in (
        ([good], "at least two different runs"),
        ([good, f"{good}/../good"], "at least two different runs"),
        ([good, str(tmp_path / "none")], "nfzoo train writes it after the first epoch"),
        ([good, str(tmp_path / "list")], "must hold options"),
        ([good, str(tmp_path / "tag")], "cannot be read"),
        ([good, str(tmp_path / "tag"), "--output", "x.svg"], "must end in .png"),
        ([good, str(tmp_path / "tag"), "--json", str(tmp_path)], "is a folder"),
    ):
        assert main(["compare", *arguments]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert (out, err.count("\n")) == ("", 1)


def test_multi_label_runs_are_compared_by_their_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, values in (("first", (0.5, 0.75)), ("second", (0.25, 0.125))):
        folder = write_run(tmp_path / name, [0.0])
        rows = ({"epoch": i, "map": 0.0, "ema_map": value, "ema_loss": 0.5} for i, value in enumerate(values, 1))
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        folders.append(str(folder))
    assert main(["compare", *folders, "--output", str(tmp_path / "c.png"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["best_map"], run["best_epoch"], run["map"]) for run in found] == [(0.75, 2, 0.75), (0.25, 1, 0.125)]
    assert not any("accuracy" in key for run in found for key in run)
    assert main(["compare", *folders]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["best", "mean", "average", "precision", "75.00%", "25.00%"] in lines
    assert main(["plot", "curves", f"{folders[0]}/metrics.jsonl", "--output", str(tmp_path / "p.png")]) == 0
    capsys.readouterr()
    other = write_run(tmp_path / "third", [0.5])
    assert main(["compare", folders[0], str(other)]) == 2
    assert "have no metric in common" in capsys.readouterr().err
