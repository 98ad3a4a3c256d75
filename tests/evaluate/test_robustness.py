"""Accuracy under corruptions: equal to a plain loop's, with any number of processes, as table, picture and JSON."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfzoo.evaluate import main
from nfzoo.transforms.corruptions import Corruption, corrupt
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.preprocess import evaluation_pixels, normalize
from tests.evaluate.test_accuracy import LABELS, LOSS_TOLERANCE, make_model
from tests.evaluate.test_report import Page
from tests.support.forks import run_in_group
from tests.support.pictures import write_images


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("robust")
    data = write_images(root / "animals", {"bee": 5, "cat": 4})
    return [str(make_model().save_pretrained(root / "model")), "--data", str(data), "--workers", "0"]


def test_accuracy_is_that_of_a_plain_loop(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, curves, report = tmp_path / "e.json", tmp_path / "c.png", tmp_path / "report"
    chosen = ["--corruptions", "rotation", "gaussian_noise", "--corruption-seed", "3", "--batch-size", "4"]
    written = ["--json", str(target), "--curves", str(curves), "--report", str(report), "--device", "cpu"]
    assert main([*options, *chosen, *written]) == 0
    found = json.loads(target.read_text())
    rows = {(row["corruption"], row["severity"]): row for row in found["corruptions"]["rows"]}
    assert list(rows) == [(name, s) for name in ("rotation", "gaussian_noise") for s in (1, 2, 3, 4, 5)]
    assert found["corruptions"]["clean"] == {key: found[key] for key in ("top1", "top5", "loss")}

    model, paths = make_model(), sorted(Path(options[2]).rglob("*.png"))
    labels = torch.tensor([LABELS.index(path.parent.name) for path in paths])
    for name, severity in (("rotation", 1), ("gaussian_noise", 4)):
        inputs = []
        for index, path in enumerate(paths):
            levels = evaluation_pixels(open_image(path, channels=3), model.preprocessing)
            levels = levels.round().clip(0, 255).astype(np.uint8)
            inputs.append(normalize(corrupt(levels, Corruption(name, severity, 3), index), model.preprocessing))
        with torch.no_grad():
            logits = model(torch.stack(inputs))
        row = rows[name, severity]
        assert row["top1"] * 9 == pytest.approx(int((logits.argmax(1) == labels).sum()))
        assert row["loss"] == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, labels)), abs=LOSS_TOLERANCE
        )
        assert abs(row["loss"] - found["loss"]) > 0.001

    means = {name: sum(rows[name, s]["top1"] for s in range(1, 6)) / 5 for name in ("rotation", "gaussian_noise")}
    assert found["corruptions"]["means"] == pytest.approx(means)
    assert found["corruptions"]["mean"] == pytest.approx(sum(means.values()) / 2)

    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("gaussian noise")]
    values = [found["top1"], *(rows["gaussian_noise", s]["top1"] for s in range(1, 6)), means["gaussian_noise"]]
    assert line.split()[2:] == [f"{value:.2%}" for value in values]
    with Image.open(curves) as image:
        assert image.size[0] > 1000
    assert json.loads((report / "report.json").read_text())["corruptions"] == found["corruptions"]
    page = Page((report / "report.html").read_text())
    assert page.tags.count("img") == 4
    assert "rotation: 5, 10, 15, 30, 45 (degrees, to either side)" in page.shown


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(options: list[str], tmp_path: Path) -> None:
    chosen = ["--corruptions", "gaussian_noise", "--batch-size", "2"]
    first, second = run_in_group(main, [*options, *chosen, "--json", str(tmp_path / "two.json")], tmp_path)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert main([*options, *chosen, "--device", "cpu", "--json", str(tmp_path / "one.json")]) == 0
    two, one = (json.loads((tmp_path / name).read_text())["corruptions"] for name in ("two.json", "one.json"))
    for a, b in zip(two["rows"], one["rows"], strict=True):
        assert (a["top1"], a["top5"]) == (b["top1"], b["top5"])
        assert a["loss"] == pytest.approx(b["loss"], abs=LOSS_TOLERANCE)


def test_bad_options_end_in_one_line(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--corruptions", "fog"], "'fog'"),
        (["--curves", str(tmp_path / "c.png")], "add --corruptions"),
        (["--corruption-seed", "0"], "add --corruptions"),
        (["--corruptions", "--curves", str(tmp_path / "c.svg")], "must end in .png"),
        (["--corruptions", "--corruption-seed", "-1"], "not a whole number"),
    ):
        assert main([*options, *words]) == 2
        out, err = capsys.readouterr()
        assert (out, bool(re.fullmatch(r"[^\n]+\n", err))) == ("", True)
        assert message in err
    assert list(tmp_path.iterdir()) == []
