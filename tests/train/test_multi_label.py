"""Runs of several labels an image: their figures, their model, faults, other tasks, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nfzoo
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.data.label_files import LabelFiles
from nfzoo.data.source import open_split
from nfzoo.errors import ConfigError
from nfzoo.train import run as train
from nfzoo.train import trainer
from nfzoo.train.config import TrainConfig
from tests.support.label_sets import CLASSES, SK, write_sets
from tests.support.loops import each
from tests.support.pictures import few_digits

QUICK = ["--model", "nfnet-test", "--epochs", "1", "--batch_size", "16", "--train-size", "16", "--test-size", "16"]
QUICK += ["--workers", "0", "--data", few_digits(), "--optim.ema_decay", "0.9", "--optim.warmup_epochs", "0"]
MIXED = ["--drop_rate", "0.2", "--stochastic_depth", "0.2", "--optim.lr", "0.4", "--class-weights", "balanced"]
MIXED += ["--augment.mixup", "0.2", "--augment.cutmix", "true", "--augment.layers", "1", "--keep-best", "map"]
# Ten float32 steps with sums in another order; a parameter is of order one.
PROCESSES_TOLERANCE = 1e-5
# Logits of another batch size; figures are of order one.
TOLERANCE = 1e-5


class Died(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sets(tmp_path_factory.mktemp("labels") / "labels.csv"))


@pytest.fixture(scope="module")
def run(labels: str) -> Callable[..., int]:
    def run(output: Path, *options: str) -> int:
        return train.main([*QUICK, "--output", str(output), "--task", "multi-label", "--labels", labels, *options])

    return run


@pytest.fixture(scope="module")
def whole(run: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, "--epochs", "2", *MIXED) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in found]


def test_the_figures_are_scikit_learns(
    tmp_path: Path, run: Callable[..., int], labels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", "--augmented-sheet", str(tmp_path / "batch.png")) == 0
    assert (tmp_path / "batch.png").exists()
    said = capsys.readouterr().out
    assert "held-out mAP" in said
    assert "images to train on: big 80, even 79, round 64; 32 without a label" in said
    assert "accuracy" not in said
    (row,) = rows(tmp_path / "run")
    assert not [key for key in row if "accuracy" in key or key == "thresholds"]
    held_out = open_split(few_digits(), labels=LabelFiles(labels, multi_label=True)).validation
    model = nfzoo.from_pretrained(tmp_path / "run")
    x = torch.stack([model.preprocess(held_out[i][0], size=16) for i in range(len(held_out))])
    with torch.no_grad():
        p = model(x).double().sigmoid().numpy()
    targets = held_out.labels
    assert row["ema_map"] == pytest.approx(SK.average_precision_score(targets, p), abs=TOLERANCE)
    assert row["ema_loss"] == pytest.approx(SK.log_loss(targets.ravel(), p.ravel()), abs=TOLERANCE)
    assert row["ema_f1"] == pytest.approx(
        SK.f1_score(targets, p >= 0.5, average="macro", zero_division=0), abs=TOLERANCE
    )
    assert row["ema_micro_f1"] == pytest.approx(
        SK.f1_score(targets, p >= 0.5, average="micro", zero_division=0), abs=TOLERANCE
    )
    # The model says what it is, with the thresholds of the best F1 on the held-out images.
    assert (model.problem_type, model.labels) == (MULTI_LABEL, CLASSES)
    assert model.provenance is not None
    assert model.provenance["map"] == row["ema_map"]
    assert "accuracy" not in model.provenance
    assert model.thresholds is not None
    for c, threshold in enumerate(model.thresholds):
        best = max(SK.f1_score(targets[:, c], p[:, c] >= t) for t in np.unique(p[:, c]))
        assert SK.f1_score(targets[:, c], p[:, c] >= threshold) == pytest.approx(best)
    reached = [{name for name, _ in answer} for answer in model.predict([held_out[i][0] for i in range(5)])]
    expected = [{CLASSES[c] for c in np.flatnonzero(row >= model.thresholds)} for row in p[:5]]
    assert reached == expected


def test_a_dead_run_goes_on_to_the_same_bits(
    tmp_path: Path, run: Callable[..., int], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = trainer.Trainer.train_step
    for step in (3, 12):  # after a save within an epoch, and within the second
        with monkeypatch.context() as patch:

            def dying(self: trainer.Trainer, parts: list, step: int = step) -> None:
                if self.step == step:
                    raise Died
                take_step(self, parts)

            patch.setattr(trainer.Trainer, "train_step", dying)
            with pytest.raises(Died):
                run(tmp_path / "run", "--epochs", "2", "--save-steps", "2", *MIXED, "--resume", "true")
    assert run(tmp_path / "run", "--epochs", "2", "--save-steps", "2", *MIXED, "--resume", "true") == 0
    assert same(tmp_path / "run", whole)
    assert rows(tmp_path / "run") == rows(whole)
    assert nfzoo.from_pretrained(tmp_path / "run").thresholds == nfzoo.from_pretrained(whole).thresholds
    best = max(rows(whole), key=lambda row: row["ema_map"])
    provenance = nfzoo.from_pretrained(whole).provenance
    assert provenance is not None
    assert (provenance["best_by"], provenance["map"], provenance["epochs"]) == ("map", best["ema_map"], best["epoch"])


def test_thresholds_are_of_the_epoch_that_is_kept() -> None:
    from nfzoo.train.metrics import Best, without_thresholds

    found = [{"epoch": i + 1, "map": value, "thresholds": (value,)} for i, value in enumerate((0.2, 0.9, 0.5))]
    kept = without_thresholds(found, Best("map", averaged=False))
    assert [row.get("thresholds") for row in kept] == [None, (0.9,), (0.5,)]
    assert kept[1] is found[1]
    assert [row.get("thresholds") for row in without_thresholds(found, None)] == [None, None, (0.5,)]


def test_another_task_gets_a_new_classifier(
    tmp_path: Path, run: Callable[..., int], labels: str, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it has as many classes; the same task goes on from its own, in the order of the data."""
    still = ["--optim.lr", "1e-9", "--optim.weight_decay", "0", "--optim.ema_decay", "null"]
    head = weights(whole)["head.weight"]
    names = tmp_path / "names.txt"
    names.write_text("round\neven\nbig\n")
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        assert run(tmp_path / "same", "--model", str(whole), "--class-names", str(names), *still) == 0
    assert "in another order" in caplog.text
    assert "replaced" not in caplog.text
    assert torch.allclose(weights(tmp_path / "same")["head.weight"], head.flip(0), atol=1e-5)
    # Into one class an image: three classes as well.
    one = tmp_path / "one.csv"
    text = Path(labels).read_text().splitlines()
    one.write_text("\n".join(["path,label", *(f"{r.split(',')[0]},{CLASSES[i % 3]}" for i, r in enumerate(text[1:]))]))
    options = [*QUICK, "--model", str(whole), "--labels", str(one), *still]
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        assert train.main([*options, "--output", str(tmp_path / "single")]) == 0
    assert (
        "has 3 classes of a multi-label task: its classifier is replaced by a fresh one of 3 for task single-label"
        in (caplog.text)
    )
    single = nfzoo.from_pretrained(tmp_path / "single")
    assert (single.problem_type, single.thresholds, single.labels) == (None, None, CLASSES)
    assert not torch.allclose(single.state_dict()["head.weight"], head, atol=1e-3)
    assert torch.allclose(single.state_dict()["stem.conv0.weight"], weights(whole)["stem.conv0.weight"], atol=1e-5)
    caplog.clear()
    # And back.
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        assert run(tmp_path / "back", "--model", str(tmp_path / "single"), *still, "--seed", "1") == 0
    assert "has 3 classes of a single-label task: its classifier is replaced" in caplog.text
    back = nfzoo.from_pretrained(tmp_path / "back")
    assert back.multi_label
    assert not torch.allclose(back.state_dict()["head.weight"], single.state_dict()["head.weight"], atol=1e-3)


REFUSED = {
    "no label": (["--task", "single-label"], "leave it out; sets of labels are for --task multi-label"),
    "no accuracy": (["--keep-best", "accuracy"], "keep_best accuracy is no metric of task multi-label; take map"),
    "no map": (["--task", "single-label", "--keep-best", "map"], "keep_best map is no metric of task single-label"),
    "sampler": (["--sampler", "balanced"], "sampler 'balanced' takes images by their one class"),
    "weights": (["--class-weights", "{square: 2}"], "class_weights name 'square', which is no class"),
    "separator": (["--labels", "{labels}?separator="], "an option without a value"),
    "task": (["--task", "multi"], "task must be one of single-label, multi-label"),
}


@each("name", REFUSED)
def test_bad_options_end_in_one_line(
    tmp_path: Path, run: Callable[..., int], labels: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options, message = REFUSED[name]
    assert run(tmp_path / "run", *(option.replace("{labels}", labels) for option in options)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_multi_label_run_needs_a_table() -> None:
    with pytest.raises(ConfigError, match="give it as labels"):
        TrainConfig(model="nfnet-test", data="digits", output="out", task="multi-label")


def test_balanced_weights_are_negatives_by_positives(labels: str) -> None:
    split = open_split(few_digits(), labels=LabelFiles(labels, multi_label=True))
    config = TrainConfig(
        model="nfnet-test", data=few_digits(), output="o", task="multi-label", labels=labels, class_weights="balanced"
    )
    positives = split.train.labels.sum(0)
    found = trainer.loss_weights(config, split, dict(zip(CLASSES, positives.tolist(), strict=True)))
    assert found is not None
    np.testing.assert_allclose(found, (len(split.train) - positives) / positives)


def test_held_out_images_without_any_label_have_no_score(
    tmp_path: Path, run: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "split.csv"
    paths = [p.relative_to(few_digits()).as_posix() for p in sorted(Path(few_digits()).glob("[0-3]/*.png"))]
    parts = [f"{path},{'big|even' if i < 40 else ''},{'train' if i < 60 else 'val'}" for i, path in enumerate(paths)]
    table.write_text("\n".join(["path,label,split", *parts]))
    assert run(tmp_path / "run", "--labels", str(table)) == 0
    assert "no held-out image has a label, so that there is no mean average precision" in caplog.text
    (row,) = rows(tmp_path / "run")
    assert (row["map"], row["ema_map"]) == (None, None)
    assert run(tmp_path / "best", "--labels", str(table), "--keep-best", "map") == 2
    model = nfzoo.from_pretrained(tmp_path / "run")
    assert model.provenance is not None
    assert model.provenance["map"] is None
    assert model.thresholds == (0.5, 0.5)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, run: Callable[..., int], labels: str) -> None:
    assert run(tmp_path / "one", *MIXED) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", "-m", "nfzoo.train"]
    options = [*QUICK, "--task", "multi-label", "--labels", labels, "--output", str(tmp_path / "two"), *MIXED]
    done = subprocess.run(
        [*launch, *options],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < PROCESSES_TOLERANCE
    (a,), (b,) = rows(tmp_path / "one"), rows(tmp_path / "two")
    for key in ("train_loss", "loss", "map", "f1", "micro_f1", "ema_map", "ema_loss"):
        assert a[key] == pytest.approx(b[key], abs=1e-5), key
    first, second = (nfzoo.from_pretrained(tmp_path / name).thresholds for name in ("one", "two"))
    assert first == pytest.approx(second, abs=1e-4)
