"""The main job: training from the command line, one process and two, and everything it must refuse."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from accelerate.utils import LoggerType
from PIL import Image
from safetensors.torch import load_file
from tensorboard.summary.writer.record_writer import RecordWriter

import nfzoo
from nfzoo.analysis.figures import MissingPlotsError
from nfzoo.cli import demo
from nfzoo.data.source import open_split
from nfzoo.evaluate import evaluate
from nfzoo.hub.publish import bundle
from nfzoo.train import batches as inputs
from nfzoo.train import config as recipe
from nfzoo.train import progress, run_folder, trainer
from nfzoo.train import run as train
from nfzoo.train.config import recipes
from nfzoo.train.progress import Tracker
from tests.support.loops import each
from tests.support.pictures import few_digits, write_images, write_shard

QUICK = ["--model", "nfnet-test", "--epochs", "1", "--batch_size", "16", "--train-size", "16", "--test-size", "16"]
QUICK += ["--workers", "0"]  # processes that load images cost a short run half of its time
# Ten float32 steps with sums in another order; a parameter is of order one.
PROCESSES_TOLERANCE = 1e-5


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def run(output: Path, *options: str, data: str = few_digits()) -> int:
    return train.main([*QUICK, "--data", data, "--output", str(output), *options])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pets", {"cat": 10, "dog": 10, "fish": 10})


@pytest.mark.draws
def test_result_is_a_model_with_its_record(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    assert run(output, "--epochs", "2", "--batch-size", "142", data="digits") == 0
    model = nfzoo.from_pretrained(output)
    assert model.labels == tuple("0123456789")
    assert model.provenance is not None
    assert model.provenance["weights"] == "ema"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["step"] == 20
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert 0 < rows[0]["clipped"] < 1
    assert yaml.safe_load((output / "train.yaml").read_text())["epochs"] == 2
    with Image.open(output / "curves.png") as picture:
        assert picture.width > 500
    assert not [p for p in (tmp_path / "deep").iterdir() if p != output]

    # The recorded accuracy is that of the saved weights.
    validation = open_split("digits").validation
    with torch.no_grad():
        logits = model(torch.stack([model.preprocess(validation[i][0]) for i in range(len(validation))]))
    accuracy = (logits.argmax(1) == torch.tensor(validation.labels)).float().mean()
    assert float(accuracy) == pytest.approx(rows[-1]["ema_accuracy"], abs=1e-6)


def test_runs_repeat_bit_for_bit(tmp_path: Path) -> None:
    options = ["--drop_rate", "0.2", "--stochastic_depth", "0.2"]
    for name in ("a", "b"):
        assert run(tmp_path / name, *options) == 0
    assert run(tmp_path / "c", *options, "--seed", "1") == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    # Ten steps of 16 images, with dropout and stochastic depth, at the full learning rate from the first step on.
    options = ["--drop_rate", "0.2", "--stochastic_depth", "0.2", "--optim.warmup_epochs", "0"]
    options += ["--optim.lr", "0.4"]
    assert run(tmp_path / "one", *options) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1", "-m", "nfzoo.train"]
    done = subprocess.run(
        [*launch, *QUICK, "--data", few_digits(), "--output", str(tmp_path / "two"), *options],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).state_dict()
    moved = max(float((one[key] - start[key]).abs().max()) for key in one)
    assert moved > 1000 * PROCESSES_TOLERANCE
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < PROCESSES_TOLERANCE
    rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "two")]
    for key in ("train_loss", "train_accuracy", "loss", "accuracy", "ema_accuracy"):
        assert rows[0][key] == pytest.approx(rows[1][key], abs=1e-5)


def test_fine_tunes_a_checkpoint_for_other_classes(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = nfzoo.create("nfnet-test")
    source.save_pretrained(tmp_path / "source")
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        options = ["--model", str(tmp_path / "source"), "--batch_size", "8", "--optim.lr", "1e-6", "--workers", "1"]
        assert run(tmp_path / "tuned", *options, "--optim.ema_decay", "null", data=str(folder)) == 0
    assert "10 classes" in caplog.text
    assert "3 classes have fewer than ten images to train on: cat 8, dog 8, fish 8" in caplog.text
    tuned = nfzoo.from_pretrained(tmp_path / "tuned")
    assert tuned.labels == ("cat", "dog", "fish")
    key = "stages.0.0.conv1.weight"
    assert torch.allclose(tuned.state_dict()[key], source.state_dict()[key], atol=1e-4)
    assert tuned.provenance is not None
    assert tuned.provenance["weights"] == "live"
    assert tuned.provenance["data"] == "pets"
    assert run(tmp_path / "again", *options, "--optim.ema_decay", "null", data=str(folder)) == 0
    assert torch.equal(weights(tmp_path / "again")["head.weight"], weights(tmp_path / "tuned")["head.weight"])


def test_recipe_with_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: nfnet-test\ndata: digits\nepochs: 7\noptim:\n  clip: 0.05\n  lr: 0.2\n")
    config = recipes.parse(["--recipe", str(path), "--output", "x", "--optim.lr", "0.3", "--augment.flip", "0.25"])
    assert (config.epochs, config.optim.clip, config.optim.lr) == (7, 0.05, 0.3)
    assert config.augment is not None
    assert config.augment.flip == 0.25
    with pytest.raises(SystemExit) as stop:
        train.main(["--recipe", str(path), "--output", "x", "--print-config"])
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert recipes.parse(["--recipe", str(printed)]) == recipes.parse(["--recipe", str(path), "--output", "x"])


def test_saved_run_file_is_a_recipe(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "--augment.scale", "[0.5,1.0]") == 0
    again = recipes.parse(["--recipe", str(tmp_path / "run" / "train.yaml")])
    assert again.augment is not None
    assert again.augment.scale == (0.5, 1.0)
    assert again.batch_size == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nfnet-tset"], "did you mean 'nfnet-test'"),
        (["--data", "/no/such/folder"], "does not exist"),
        (["--optim.learning_rate", "1"], "unrecognized arguments: --optim.learning-rate 1"),
        (["--epoch", "three"], "did you mean '--epochs'"),
        (["--epochs", "three"], "epochs"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch_size", "5000"], "do not fill a batch of 5000"),
        (["--optim.clip", "-1"], "clip must be positive"),
        (["--optim.momentum", "1.5"], "momentum must be in"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--drop_rate", "1"], "drop_rate must be in"),
        (["--augment.flip", "3"], "flip must be a probability"),
        (["--mixed_precision", "bf61"], "mixed_precision"),
        (["--recipe", "/no/such/recipe.yaml"], "recipe"),
        (["--pretrained", "true"], "no weights are published"),
        (["--validation_fraction", "1.5"], "validation_fraction must be between"),
        (["--seed", "99999999999999999999"], "seed must not be negative"),
        (["--workers", "100000"], "at most 256"),
        (["--data", ""], "data must not be empty"),
        (["--output", ""], "output must not be empty"),
        (["--output", "/proc/nowhere/run"], "cannot be written"),
        (["--accumulation", "5"], "does not divide among 1 processes and 5 accumulated steps; make it a multiple of 5"),
        (["--batch_size", "71", "--augment.mixup", "0.2"], "mixed in pairs"),
        (["--sharding", "fsdp2"], "needs processes to shard over"),
        (["--sharding", "fsdp2", "--optim.sam_rho", "0.05"], "SAM ascends in each process"),
        (["--optim.name", "torch.optim.Sgd"], "the optimizer 'torch.optim.Sgd'"),
        (["--optim.name", "torch.optim.SparseAdam"], "does not support dense gradients"),
        (["--optim.name", "torch.optim.LBFGS"], "'torch.optim.LBFGS'"),
        (["--optim.name", "adamw", "--optim.options", "{beta: 1}"], "unexpected keyword argument 'beta'"),
        (["--optim.options", "{betas: [0.9, 0.99]}"], "are for other optimizers"),
        (["--optim.sam_fraction", "0"], "sam_fraction must be in (0, 1]"),
        (["--tune", "heads"], "tune must be all, head or stages:N"),
        (["--optim.layer-decay", "1.5"], "optim.layer_decay must be in (0, 1]"),
        (["--optim.head-lr-scale", "0"], "optim.head_lr_scale must be positive"),
        (["--max_broken", "-1"], "max_broken must not be negative"),
        (["--keep_checkpoints", "0"], "keep_checkpoints must be at least 1"),
        (["--tracker", "no_such_tracker"], "there is no tracker 'no_such_tracker'"),
        (["--labels", "/no/such/labels.csv"], "is none; give the folder"),
        (["--labels", "/no/such.csv", "--data", "{data}"], "the labels '/no/such.csv' do not exist"),
        (["--class-names", "names.txt"], "class_names 'names.txt' goes with a file of labels"),
        (["--class-weights", "{10: 2}"], "class_weights name '10', which is no class of the data"),
        (["--class-weights", "{1: -2}"], "class_weights must be numbers from 0 on; that of 1 is -2"),
        (["--class-weights", "[1, 2]"], "class_weights must be a mapping, not [1, 2]"),
        (["--class-weights", "balance"], "the class weights 'balance' do not exist; give a file, none, balanced"),
        (["--class-weights", "/dev/null"], "the class weights '/dev/null' cannot be read"),
        (["--class-weights", "balanced", "--sampler", "balanced"], "make up for the same twice"),
        (["--sampler", "even"], "sampler must be one of shuffle, balanced"),
        (["--recipe", "nfnet-f1-finetun"], "there is no recipe 'nfnet-f1-finetun'"),
    ],
)
def test_bad_options_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(tmp_path / "out", *(option.replace("{data}", few_digits()) for option in options), data="digits") == 2
    error = capsys.readouterr().err
    assert error.startswith("nfzoo train: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optim", ["3", "null", "[1, 2]"])
def test_a_recipe_whose_optimizer_is_no_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str], optim: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"optim: {optim}\n")
    assert run(tmp_path / "out", "--recipe", str(tmp_path / "recipe.yaml")) == 2
    error = capsys.readouterr().err
    assert "optim" in error
    assert "functools" not in error
    assert error.count("\n") == 1


def test_output_below_a_file_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "run") == 2
    output = capsys.readouterr()
    assert "cannot be written" in output.err
    assert "epoch" not in output.out


def test_one_class_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "--batch_size", "2", data=str(write_images(tmp_path / "one", {"cat": 8}))) == 2
    assert "one class alone" in capsys.readouterr().err


def test_ctrl_c_ends_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "training_batches", interrupt)
    assert run(tmp_path / "out") == 130
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--seed", "1"], ["--seed", "2", "--validation_fraction", "0.3"]])
def test_evaluation_finds_the_images_that_training_held_out(tmp_path: Path, options: list[str]) -> None:
    assert run(tmp_path / "out", "--batch_size", "142", *options, data="digits") == 0
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    found = evaluate(nfzoo.from_pretrained(tmp_path / "out"), "digits", device="cpu")
    assert found.top1 == pytest.approx(row["ema_accuracy"], abs=1e-9)
    assert found.loss == pytest.approx(row["ema_loss"], abs=1e-6)
    fraction = 0.2 if len(options) == 2 else 0.3
    assert found.images == len(open_split("digits", validation_fraction=fraction).validation)


def test_without_a_network_the_way_out_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run(tmp_path / "out", "--model", "nfnet-f0") == 2
    assert "--pretrained false" in capsys.readouterr().err


def test_missing_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--model", "nfnet-test"]) == 2
    assert "missing --data, --output; give" in capsys.readouterr().err


def test_an_earlier_model_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nfzoo.create("nfnet-test").save_pretrained(tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(tmp_path / "run") == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert run(tmp_path / "run", "--overwrite", "true") == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("part", ["train", "val"])
def test_corrupt_image_is_fatal_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    data = tmp_path / "data"
    write_images(data / "train", {"cat": 8, "dog": 8})
    write_images(data / "val", {"cat": 2, "dog": 2})
    broken = data / part / "dog" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    options = ["--batch_size", "8", "--workers", "1"]
    assert run(tmp_path / "out", *options, data=str(data)) == 2
    error = capsys.readouterr().err
    assert str(broken) in error
    assert "--max-broken" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()  # a held-out image is found before training as well
    broken.write_bytes(whole)
    assert run(tmp_path / "out", *options, "--resume", "true", data=str(data)) == 0


def test_a_corrupt_image_met_after_training_costs_no_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write_images(data / "train", {"cat": 8, "dog": 8})
    write_images(data / "val", {"cat": 2, "dog": 2})
    (data / "val" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.setattr(trainer, "CHECKED", 0)  # as where the held-out images are many
    options = ["--batch_size", "8", "--workers", "0", "--epochs", "1"]
    assert run(tmp_path / "out", *options, data=str(data)) == 2
    error = capsys.readouterr().err
    assert "--max-broken" in error
    assert "step_00000002 holds the last checkpoint; to go on from it: nfzoo train --output " in error
    assert run(tmp_path / "out", *options, "--resume", "true", "--max-broken", "1", data=str(data)) == 0
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert row["broken"] == 1  # in the row of the very epoch
    assert row["step"] == 2


def test_an_output_that_links_to_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert run(tmp_path / "out") == 2
    assert "is a link to nothing" in capsys.readouterr().err


def test_more_epochs_go_on_where_a_run_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--batch_size", "32"]
    assert run(tmp_path / "out", *options, "--epochs", "1") == 0
    assert run(tmp_path / "out", *options, "--epochs", "2", "--resume", "true") == 0
    assert "to have 1 epochs" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 5), (2, 10)]
    assert run(tmp_path / "out", *options, "--epochs", "1", "--resume", "true") == 2
    assert "pass --epochs 2 or more" in capsys.readouterr().err


@each("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_types_are_trained_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    source, output = tmp_path / f"{dtype} model", tmp_path / f"{dtype} run"
    nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).to(dtype).save_pretrained(source)
    assert run(output, "--model", str(source), "--epochs", "1", "--batch_size", "140") == 0
    assert {p.dtype for p in nfzoo.from_pretrained(output).parameters()} == {torch.float32}


def test_what_concerns_one_start_is_no_part_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch_size", "140", "--epochs", "1"]
    assert run(tmp_path / "out", *options, "--overwrite", "true", "--resume", "true") == 0
    written = tmp_path / "out" / "train.yaml"
    assert not {"overwrite", "resume"} & yaml.safe_load(written.read_text()).keys()
    assert train.main(["--recipe", str(written)]) == 2  # overwrites nothing
    assert "holds a model already" in capsys.readouterr().err
    written.write_text(written.read_text() + "overwrite: true\n")
    assert train.main(["--recipe", str(written)]) == 2
    assert "has overwrite: true, which is no part of a recipe" in capsys.readouterr().err
    started = ["--data", "d", "--output", "o", "--resume", "true"]
    with pytest.raises(SystemExit):
        train.main(["--recipe", "nfnet-f0-finetune", *started, "--print-config"])
    assert "resume" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--accumulation"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
        ("ACCELERATE_USE_FSDP", "true", "--sharding fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "does not support"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "does not support"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "--sharding fsdp2"),
        ("ACCELERATE_DOWNCAST_BF16", "true", "--mixed-precision bf16"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "--optim.clip-norm"),
    ],
)
def test_options_of_accelerates_launcher_are_honoured_or_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    remedy: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert run(tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{name}={value!r}" in error
    assert remedy in error


def test_accelerates_defaults_are_no_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_USE_FSDP", "false"),
        ("ACCELERATE_GRADIENT_CLIPPING", "none"),
    ):
        monkeypatch.setenv(name, value)
    assert run(tmp_path / "out", "--epochs", "1", "--batch_size", "140") == 0


def test_corrupt_images_are_left_out_when_asked(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "dog" / "1.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    options = ["--batch_size", "8", "--workers", "0", "--epochs", "2"]
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        assert run(tmp_path / "out", *options, "--max_broken", "1", data=str(folder)) == 0
    assert caplog.text.count(str(broken)) == 1
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["broken"] == 1
    (folder / "cat" / "1.png").write_bytes(b"")
    (folder / "cat" / "2.png").write_bytes(b"")
    assert run(tmp_path / "out3", *options, "--max_broken", "1", data=str(folder)) == 2
    error = capsys.readouterr().err
    assert "images cannot be read, and max_broken is 1" in error
    for image in (folder / "dog").iterdir():
        image.write_bytes(b"")
    assert run(tmp_path / "out2", *options, "--max_broken", "4", data=str(folder)) == 2
    assert not (tmp_path / "out2").exists()


def test_loss_that_is_no_number_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optim.lr", "1e12", "--optim.clip", "null", "--optim.warmup_epochs", "0"]
    assert run(tmp_path / "out", *options) == 1
    assert "nothing was saved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_head_alone_is_tuned(tmp_path: Path) -> None:
    source = nfzoo.create("nfnet-test")
    source.save_pretrained(tmp_path / "source")
    options = ["--model", str(tmp_path / "source"), "--tune", "head", "--optim.ema_decay", "null"]
    assert run(tmp_path / "out", *options, "--optim.warmup_epochs", "0") == 0
    before, after = source.state_dict(), weights(tmp_path / "out")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    "options",
    [
        ["--optim.name", "adamw", "--optim.options", "{betas: [0.9, 0.95]}"],
        pytest.param(["--optim.name", "torch.optim.NAdam"], marks=pytest.mark.slow),
        pytest.param(["--mixed_precision", "bf16"], marks=pytest.mark.slow),
        ["--activation_checkpointing", "true", "--stochastic_depth", "0.3"],
    ],
)
def test_other_ways_to_train_learn_too(tmp_path: Path, options: list[str]) -> None:
    assert run(tmp_path / "out", *options, "--epochs", "2", "--optim.warmup_epochs", "0") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for name, options in (("a", []), ("b", ["--activation_checkpointing", "true"])):
        assert run(tmp_path / name, *options, "--drop_rate", "0.2", "--stochastic_depth", "0.3") == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_training_is_the_same(tmp_path: Path) -> None:
    options = ["--drop_rate", "0.2", "--stochastic_depth", "0.3", "--optim.warmup_epochs", "0"]
    for name, more in (("a", []), ("b", ["--compile", "true"])):
        assert run(tmp_path / name, *options, *more) == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    # Ten float32 steps whose kernels add up in another order.
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


@pytest.mark.draws
def test_tracker_and_sheet(tmp_path: Path) -> None:
    sheet = tmp_path / "first.png"
    options = ["--tracker", "tensorboard", "--augmented_sheet", str(sheet), "--augment.mixup", "0.2"]
    assert run(tmp_path / "out", *options) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "logs" / "nfzoo"))
    events.Reload()
    assert {"train/loss", "train/lr", "train/gradient_norm", "train/clipped", "epoch/accuracy"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("epoch/accuracy")] == [10]
    assert [event.step for event in events.Images("augmented batch")] == [0]
    with Image.open(io.BytesIO(events.Images("augmented batch")[0].encoded_image_string)) as sent:
        assert np.array_equal(np.asarray(sent), np.asarray(Image.open(sheet).convert("RGB")))
    assert [event.step for event in events.Images("confusion matrix")] == [10]


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets; `name` is that of the one whose place it takes."""

    requires_logging_directory = False
    main_process_only = False
    kept: ClassVar[list[tuple[str, Any, int]]] = []

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.kept.extend((key, value, step or 0) for key, value in values.items())

    def log_images(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.kept.extend((key, value, step or 0) for key, (value,) in values.items())


@each("name", ["wandb", "trackio", "mlflow", "dvclive"])
def test_each_tracker_gets_pictures_in_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Wrapped(SimpleNamespace):
        image: Any

    def wrap(image: Image.Image, caption: str) -> Wrapped:
        return Wrapped(image=image, caption=caption)

    def log_image(image: Image.Image, key: str, step: int) -> None:
        Recorder.kept.append((key, image, step))

    kind = type("Stand", (Recorder,), {"name": name})
    Recorder.kept.clear()
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType(name)])
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=wrap))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_image=log_image))  # type: ignore[arg-type]
    assert run(tmp_path / name, "--tracker", name, "--batch-size", "80") == 0
    pictures = [(key, getattr(value, "image", value), step) for key, value, step in Recorder.kept if " " in key]
    taken = [("augmented batch", 0), ("confusion matrix", 2)] if name != "dvclive" else []
    assert [(key, step) for key, _, step in pictures] == taken
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for _, picture, _ in pictures)
    assert any(key == "epoch/accuracy" for key, _, _ in Recorder.kept)


def test_many_classes_have_no_confusion_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "MOST_DRAWN", 9)
    monkeypatch.setattr(trainer, "Confusion", None)
    assert run(tmp_path / "run", "--tracker", "tensorboard", "--batch-size", "80") == 0


@each("error", [MissingPlotsError("the plots need matplotlib"), OSError(28, "No space left on device")])
def test_a_picture_that_cannot_be_drawn_costs_at_most_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    caplog.clear()
    monkeypatch.setattr(progress, "confusion_figure", fails)
    output = tmp_path / type(error).__name__
    assert run(output, "--tracker", "tensorboard", "--epochs", "2", "--batch-size", "80") == 0
    lines = [record.message for record in caplog.records if "tracker" in record.message]
    assert len(lines) == isinstance(error, OSError)


@each("fails", [("start",), ("store_init_configuration",), ("log",), ("finish",), ("start", "log", "finish")])
def test_a_tracker_that_fails_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: tuple[str, ...]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to\nhost")

    caplog.clear()
    with monkeypatch.context() as patch:
        for name in fails:
            patch.setattr(TensorBoardTracker, name, unreachable)
        assert run(tmp_path / "-".join(fails), "--tracker", "tensorboard", "--epochs", "2", "--batch-size", "80") == 0
    lines = [record.message for record in caplog.records if "tracker" in record.message]
    said = "the tracker 'tensorboard' failed (no route to host); training goes on, and metrics.jsonl has its figures"
    assert lines == [said]


def test_a_thread_of_a_tracker_that_fails_costs_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", full)  # which is called by a thread
    assert run(tmp_path / "run", "--tracker", "tensorboard", "--epochs", "2", "--batch-size", "80") == 0
    (line,) = [record.message for record in caplog.records if "tracker" in record.message]
    assert line.startswith("the tracker 'tensorboard' failed ([Errno 28] No space left on device); training goes on")
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook == before


def test_no_path_of_the_data_leaves_the_checkpoints_and_the_recipe(tmp_path: Path) -> None:
    """Neither weights, configuration, figures nor what a tracker sends; `train.yaml` is published with names alone."""
    place = tmp_path / "private-place"
    write_shard(place / "pets-0.tar", {str(i): i % 2 for i in range(20)})
    options = ["--tracker", "tensorboard", "--batch-size", "16", "--augmented-sheet", str(place / "sheet.png")]
    for name, data in (("a", "pets-*.tar"), ("b", "pets-{0..0}.tar")):
        output = tmp_path / name
        assert run(output, *options, data=f"{place}/{data}") == 0
        for file in output.rglob("*"):
            if file.is_file() and "checkpoints" not in file.parts and file.name != "train.yaml":
                assert b"private-place" not in file.read_bytes(), file
        provenance = nfzoo.from_pretrained(output).provenance
        assert provenance is not None
        assert provenance["data"] == data
        published = bundle(output, "someone/pets").files["train.yaml"]
        assert isinstance(published, bytes)
        assert b"private-place" not in published
        assert yaml.safe_load(published)["data"] == data


def test_a_table_of_labels_trains_what_folders_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on from its checkpoint, with the table elsewhere; no path of it leaves the recipe."""
    place = tmp_path / "private-place"
    place.mkdir()
    paths = sorted(path.relative_to(few_digits()).as_posix() for path in Path(few_digits()).rglob("*.png"))
    text = "".join(f"{path},{path.split('/')[0]}\n" for path in paths[::-1])
    (place / "labels.csv").write_text(f"file,digit\n{text}")
    (place / "names.txt").write_text("\n".join("0123456789"))
    labels = ["--labels", f"{place}/labels.csv?label=digit", "--class-names", str(place / "names.txt")]
    quick = ["--save-steps", "4", "--optim.lr", "0.4"]
    assert run(tmp_path / "folders", *quick) == 0
    take_step, told = trainer.Trainer.train_step, []

    def dying(self: trainer.Trainer, parts: list) -> None:
        if self.step == 6:
            raise KeyboardInterrupt
        take_step(self, parts)

    class Silent(Tracker):
        def __init__(self, accelerator: Any, name: str | None, options: Mapping[str, Any]) -> None:
            told.append(str(options))
            super().__init__(accelerator, name, options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", dying)
        patch.setattr(progress, "Tracker", Silent)
        assert run(tmp_path / "table", *quick, *labels) == 130
    assert "'epochs': 1" in told[0]
    assert "private-place" not in told[0]
    (place / "labels.csv").rename(place / "moved.csv")
    assert run(tmp_path / "table", *quick, *labels, "--resume", "true") == 2
    assert "labels.csv' do not exist" in capsys.readouterr().err
    labels[1] = f"{place}/moved.csv?label=digit"
    assert run(tmp_path / "table", *quick, *labels, "--resume", "true") == 0
    one, two = weights(tmp_path / "folders"), weights(tmp_path / "table")
    assert all(torch.equal(one[key], two[key]) for key in one)
    model = nfzoo.from_pretrained(tmp_path / "table")
    assert model.labels == tuple("0123456789")
    assert model.provenance is not None
    assert model.provenance["validation_fraction"] == 0.2
    for file in (tmp_path / "table").rglob("*"):
        if file.is_file() and "checkpoints" not in file.parts and file.name != "train.yaml":
            assert b"private-place" not in file.read_bytes(), file
    published = bundle(tmp_path / "table", "someone/digits").files["train.yaml"]
    assert isinstance(published, bytes)
    assert b"private-place" not in published
    assert yaml.safe_load(published)["labels"] == "moved.csv?label=digit"
    assert yaml.safe_load(published)["class_names"] == "names.txt"


@each(
    ("public", "source", "name"),
    [
        (run_folder.public_data, "digits", "digits"),
        (run_folder.public_data, "hub:org/pets?image=img", "hub:org/pets?image=img"),
        (run_folder.public_data, "secret/pets", "pets"),
        (run_folder.public_data, "/secret/train-{000..099}.tar", "train-{000..099}.tar"),
        (run_folder.public_data, "secret/x.parquet?image=img", "x.parquet?image=img"),
        (run_folder.public_model, "nfnet-f0", "nfnet-f0"),
        (run_folder.public_model, "org/model", "org/model"),
        (run_folder.public_model, "./secret/model", "model"),
        (run_folder.public_model, "very/secret/model", "model"),
    ],
)
def test_names_for_others(public: Callable[[str], str], source: str, name: str) -> None:
    assert public(source) == name


@pytest.mark.parametrize("inside", ["out", "."])
def test_an_output_among_the_data_is_refused(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert run(folder / inside, "--batch_size", "8", data=str(folder)) == 2
    assert "among the data" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_an_option_of_a_union_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "--augment.magnitude", "99") == 2
    error = capsys.readouterr().err
    assert "magnitude must be from 0 to 20, not 99" in error
    assert "Union" not in error


def test_default_learning_rate() -> None:
    rates = {batch: recipe.default_lr(batch, pretrained=False) for batch in (16, 64, 256, 4096)}
    assert rates == {16: 0.025, 64: 0.1, 256: 0.1, 4096: 1.6}  # the papers' is 0.1 * batch / 256
    assert recipe.default_lr(64, pretrained=True) == pytest.approx(0.01)


@pytest.mark.long
def test_demo_reads_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([str(tmp_path / "demo")]) == 0
    last = json.loads((tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["ema_accuracy"] >= demo.TARGET
    printed = capsys.readouterr().out
    for name in ("predictions.png", "curves.png", "metrics.jsonl"):
        assert str(tmp_path / "demo" / name) in printed
        assert (tmp_path / "demo" / name).stat().st_size > 0


def test_a_saved_model_of_random_weights_is_not_pretrained(tmp_path: Path) -> None:
    """It is trained at the full rate, in its own size; one of which any parameter has moved is fine-tuned."""
    config = nfzoo.NFNetConfig(depths=(1, 1, 1, 1), widths=(16, 32, 48, 48), group_width=8, stem_width=16)
    model = nfzoo.create(config, preprocessing=nfzoo.Preprocessing(train_size=32, test_size=48))
    for bias, pretrained in ((0.0, False), (0.1, True)):
        model.get_parameter("final_conv.bias").data.fill_(bias)
        folder = model.save_pretrained(tmp_path / f"m{bias}")
        run = recipe.TrainConfig(model=str(folder), data="digits", output=str(tmp_path / "out"))
        start = train._fresh(run, {"classes": ["a", "b"]})
        assert start.pretrained == pretrained
        assert (start.model.preprocessing.train_size, start.model.preprocessing.test_size) == (32, 48)


def test_a_run_on_grey_images_trains_a_model_of_one_channel(tmp_path: Path) -> None:
    """`--in-channels` makes a fresh model, adapts a trained one, and leaves a fresh one that was saved untrained."""
    assert run(tmp_path / "grey", "--in-channels", "1") == 0
    model = nfzoo.from_pretrained(tmp_path / "grey")
    assert (model.config.in_channels, len(model.preprocessing.mean)) == (1, 1)
    assert model.predict(Image.new("RGB", (30, 20), "red"))

    labels = tuple("0123456789")
    fresh = nfzoo.create("nfnet-test", labels=labels)
    trained = nfzoo.create("nfnet-test", labels=labels)
    trained.get_parameter("final_conv.bias").data.fill_(0.1)
    for pretrained, given in ((False, fresh), (True, trained)):
        folder = given.save_pretrained(tmp_path / f"saved-{pretrained}")
        config = recipe.TrainConfig(model=str(folder), data="digits", output=str(tmp_path / "out"), in_channels=1)
        start = train._fresh(config, {"classes": list(labels)})
        assert (start.pretrained, start.model.config.in_channels) == (pretrained, 1)
        expected = nfzoo.from_pretrained(folder, in_channels=1)
        for name, value in expected.named_parameters():
            assert torch.equal(start.model.get_parameter(name), value), name
        assert start.model.preprocessing == expected.preprocessing


def test_channels_that_no_image_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--in-channels", "4") == 2
    assert "in_channels must be 1, grey, or 3, coloured; not 4" in capsys.readouterr().err
    model = nfzoo.create("nfnet-test")
    with pytest.raises(nfzoo.ConfigError, match="the model takes images of 3 channels, not 1; give one that was"):
        nfzoo.fit(model, "digits", output=tmp_path / "run", epochs=1, in_channels=1)
    assert not (tmp_path / "run").exists()
