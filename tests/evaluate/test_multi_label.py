"""Evaluation of several labels an image: figures, report, options that are refused, two processes."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nfzoo
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.data.label_files import LabelFiles
from nfzoo.errors import ConfigError
from nfzoo.evaluate import evaluate, main
from nfzoo.evaluate.multi_label_report import set_page
from nfzoo.nn import NFNet
from tests.evaluate.test_accuracy import LABELS, make_model
from tests.support.forks import run_in_group
from tests.support.label_sets import SK
from tests.support.loops import each
from tests.support.pictures import write_images

ALONE = ["--workers", "0", "--device", "cpu"]
# A batch of another size adds a convolution's terms in another order; logits are of order one.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "photos", {"a": 14, "b": 9})


@pytest.fixture(scope="module")
def model(folder: Path) -> NFNet:
    """Return a model with a threshold that splits the images for each class."""
    made = make_model()
    made.problem_type = MULTI_LABEL
    with torch.no_grad():
        p = made(torch.stack([made.preprocess(path) for path in folder.rglob("*.png")])).sigmoid()
    made.thresholds = tuple((p.median(0).values + 1e-4).tolist())
    return made


@pytest.fixture(scope="module")
def checkpoint(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model.save_pretrained(tmp_path_factory.mktemp("models") / "animals"))


@pytest.fixture(scope="module")
def targets(folder: Path) -> dict[str, list[bool]]:
    """Return sets of labels at random, the last of which no image has."""
    rng = np.random.default_rng(0)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    return {name: [*(rng.random(len(LABELS) - 1) < 0.4).tolist(), False] for name in names}


@pytest.fixture(scope="module")
def table(targets: Mapping[str, list[bool]], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    chosen = ("|".join(label for label, there in zip(LABELS, row, strict=True) if there) for row in targets.values())
    rows = (f"{name},{labels}\n" for name, labels in zip(targets, chosen, strict=True))
    path.write_text(f"path,label\n{''.join(rows)}")
    return str(path)


@pytest.fixture(scope="module")
def written(checkpoint: str, folder: Path, table: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = tmp_path_factory.mktemp("reports") / "animals"
    options = ["--data", str(folder), "--labels", table, "--report", str(report), "--batch-size", "5", *ALONE]
    assert main([checkpoint, *options, "--json", str(report.parent / "e.json")]) == 0
    return report


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_figures_are_scikit_learns(
    model: NFNet, folder: Path, targets: Mapping[str, list[bool]], written: Path
) -> None:
    with torch.no_grad():
        p = torch.cat([model(model.preprocess(folder / name)[None]) for name in targets]).double().sigmoid().numpy()
    y = np.array(list(targets.values()))
    found = read(written.parent / "e.json")
    assert (found["problem_type"], found["images"], found["classes"]) == (MULTI_LABEL, 23, len(LABELS) - 1)
    assert "top1" not in found
    known = y.any(0)
    assert known.tolist() == [True] * (len(LABELS) - 1) + [False]
    assert found["map"] == pytest.approx(SK.average_precision_score(y[:, known], p[:, known]), abs=TOLERANCE)
    assert found["loss"] == pytest.approx(SK.log_loss(y.ravel(), p.ravel()), abs=TOLERANCE)
    predictions = p >= np.array(model.thresholds)
    each_class = SK.precision_recall_fscore_support(y, predictions, zero_division=0)
    assert found["f1"] == pytest.approx(each_class[2].mean(), abs=TOLERANCE)  # all classes are predicted somewhere
    micro = SK.precision_recall_fscore_support(y, predictions, average="micro")[2]
    assert found["micro_f1"] == pytest.approx(micro, abs=TOLERANCE)
    for c, row in enumerate(found["per_class"]):
        assert (row["index"], row["label"]) == (c, LABELS[c])
        values = [row[key] for key in ("precision", "recall", "f1", "support")]
        assert values == pytest.approx([column[c] for column in each_class], abs=TOLERANCE)
        assert row["predicted"] == predictions[:, c].sum()
    precisions = [row["average_precision"] for row in found["per_class"]]
    assert precisions[-1] is None
    expected = SK.average_precision_score(y[:, known], p[:, known], average=None)
    assert precisions[:-1] == pytest.approx(expected.tolist(), abs=TOLERANCE)
    # The report has the same, and what was most wrong.
    report = read(written / "report.json")
    assert report["classes"] == found["per_class"]
    assert report["metrics"]["map"]["value"] == found["map"]
    assert all(row["low"] <= row["value"] <= row["high"] for row in report["metrics"].values())
    losses = -np.where(y, np.log(p), np.log1p(-p)).mean(1)
    order = [i for i in np.argsort(-losses) if (predictions[i] != y[i]).any()]
    names = list(targets)
    assert [row["image"] for row in report["mistakes"]] == [names[i] for i in order]
    for row, i in zip(report["mistakes"], order, strict=True):
        for kind, there in (("missed", y[i] & ~predictions[i]), ("wrong", ~y[i] & predictions[i])):
            assert {one["label"] for one in row[kind]} == {LABELS[c] for c in np.flatnonzero(there)}


def test_the_report_is_whole_and_its_own(written: Path, folder: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == [
        "classes.csv",
        "mistakes.png",
        "report.html",
        "report.json",
    ]
    text = (written / "report.html").read_text()
    assert "mean average precision" in text
    for word in ("top-1", "top-5", "Confusion", "temperature", str(folder.parent)):
        assert word not in text
    assert set(re.findall(r'(?:src|href)="(.{5})', text)) == {"data:"}
    with (written / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(LABELS)
    assert rows[-1]["average_precision"] == ""


def test_text_from_files_is_text(written: Path) -> None:
    fields = read(written / "report.json")
    hostile = "<script>alert(1)</script>\x1b[2J"
    fields["classes"][0]["label"] = hostile
    fields["mistakes"][0]["image"] = hostile
    fields["mistakes"][0]["wrong"] = [{"label": hostile, "probability": 0.5}]
    fields["evaluation"]["dataset"] = hostile
    fields["classes"] = fields["classes"] * 20  # beyond those that are all shown at once
    page = set_page(fields, {"mistakes.png": b"1"})
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") >= 5
    fields["mistakes"] = []
    assert "There are none" in set_page(fields, {})


REFUSED = {
    "no table": ([], "give it as labels"),
    "temperature": (["--labels", "{table}", "--save-temperature", "{new}"], "--save-temperature is of a softmax"),
    "corruptions": (["--labels", "{table}", "--corruptions", "pixelate"], "--corruptions measures top-1 accuracy"),
    "other labels": (["--labels", "{other}"], "are no classes of the model"),
}


@each("name", REFUSED)
def test_options_that_do_not_apply(
    checkpoint: str, folder: Path, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options, message = REFUSED[name]
    other = tmp_path / "other.csv"
    other.write_text("path,label\na/0.png,zebra|emu\n")
    given = [option.format(table=table, new=tmp_path / "new", other=other) for option in options]
    assert main([checkpoint, "--data", str(folder), *given, *ALONE]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_problems_are_never_mixed(model: NFNet, folder: Path, table: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multi_label=True"):
        evaluate(model, str(folder), workers=0)
    with pytest.raises(ConfigError, match="evaluate_sets measures it"):
        evaluate(model, str(folder), workers=0, labels=LabelFiles(table, multi_label=True))
    single = make_model()
    with pytest.raises(ConfigError, match="multi_label=False"):
        evaluate(single, str(folder), workers=0, labels=LabelFiles(table, multi_label=True))
    saved = str(single.save_pretrained(tmp_path / "single"))
    assert main([saved, "--data", str(folder), "--labels", table, *ALONE]) == 2


def test_images_that_cannot_be_read_are_left_out(
    checkpoint: str, folder: Path, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "photos", {"a": 14, "b": 9})
    (data / "b" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    options = [checkpoint, "--data", str(data), "--labels", table, *ALONE]
    assert main(options) == 2
    assert "leave such images out with --skip-broken" in capsys.readouterr().err
    assert main([*options, "--skip-broken"]) == 0
    assert "22 (1 cannot be read)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint: str, folder: Path, table: str, tmp_path: Path) -> None:
    options = [checkpoint, "--data", str(folder), "--labels", table, "--batch-size", "1", "--workers", "0"]
    first, second = run_in_group(main, [*options, "--report", str(tmp_path / "two")], tmp_path)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert (first[1].count("report.html"), second[1]) == (1, "")
    assert nfzoo.from_pretrained(checkpoint).multi_label
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes, as it is part of the rounding
    assert main([*options, "--report", str(tmp_path / "one"), *ALONE]) == 0
    torch.set_num_threads(threads)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
