"""Training from Python: the same as from the command line, on data sets and models of a program."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset

import nfzoo
from nfzoo.cli.main import main
from nfzoo.data.images import ImageFolder
from nfzoo.errors import ConfigError, DataError
from nfzoo.train import TrainConfig, trainer
from nfzoo.train import run as train
from nfzoo.train.config.recipes import python_options
from tests.support.loops import each
from tests.support.pictures import few_digits, write_images
from tests.support.processes import ROOT, free_ports

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 32, "workers": 0, "train_size": 16, "test_size": 16}
PROCESSES_TOLERANCE = 1e-5  # float32 steps with sums in another order; a parameter is of order one


class Died(BaseException):
    """Stands for the end of the process."""


class Files(Dataset[tuple[Image.Image, int]]):
    """A folder of classes, as torchvision's `ImageFolder` has it."""

    def __init__(self, folder: str) -> None:
        images = ImageFolder.scan(folder)
        self.classes = list(images.classes)
        self.samples = [(str(images.paths[i]), int(images.labels[i])) for i in range(len(images))]
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def digits() -> Files:
    return Files(few_digits())


def arguments(options: Mapping[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_data_set_trains_what_its_folder_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "nfnet-test", "--data", few_digits(), "--output", str(tmp_path / "folder")]
    assert train.main([*command, *arguments(QUICK)]) == 0
    result = nfzoo.fit("nfnet-test", digits(), output=tmp_path / "data-set", **QUICK)
    assert same(tmp_path / "folder", tmp_path / "data-set")
    assert result.folder == tmp_path / "data-set"
    assert result.model is result.model
    assert result.model.labels == tuple("0123456789")
    assert torch.equal(result.model.get_parameter("head.weight"), weights(tmp_path / "folder")["head.weight"])
    provenance = result.model.provenance
    assert provenance is not None
    assert (provenance["data"], provenance["validation_fraction"]) == ("memory:Files", 0.2)
    # By name it is the run of the command line, which goes on with it.
    nfzoo.fit("nfnet-test", Path(few_digits()), output=tmp_path / "name", **QUICK)
    assert same(tmp_path / "folder", tmp_path / "name")
    assert train.main(["--output", str(tmp_path / "name"), "--resume", "true"]) == 0
    capsys.readouterr()
    assert main(["train", "--output", str(tmp_path / "data-set"), "--resume", "true"]) == 2
    assert "names data of a Python program, which no command opens; nfzoo.fit takes them" in capsys.readouterr().err


def test_data_held_out_by_the_program(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "private-place" / "b"
    write_images(first, {"cat": 10, "dog": 10})
    write_images(second, {"cat": 4, "dog": 3}, seed=1)
    options = {**QUICK, "batch_size": 10}
    for train_on, held_out, name in (
        (Files(str(first)), Files(str(second)), "memory:Files?validation=Files"),
        (first, Files(str(second)), "memory:a?validation=Files"),
        (Files(str(first)), second, "memory:Files?validation=b"),
        (first, second, "memory:a?validation=b"),
    ):
        output = tmp_path / name.replace("?", "-")
        result = nfzoo.fit("nfnet-test", train_on, held_out, output=output, **options)
        provenance = result.model.provenance
        assert provenance is not None
        assert provenance["data"] == name
        assert "validation_fraction" not in provenance
        assert result.accuracy * 7 == pytest.approx(round(result.accuracy * 7))
        assert "private-place" not in (output / "train.yaml").read_text()
    (first / "fish").mkdir()
    Image.new("RGB", (8, 8)).save(first / "fish" / "1.png")
    with pytest.raises(DataError, match="Files has 2 classes where 3 are expected"):
        nfzoo.fit("nfnet-test", first, Files(str(second)), output=tmp_path / "other", **options)


def test_a_given_model_is_the_start_and_stays_as_it_is(tmp_path: Path) -> None:
    model = nfzoo.create(
        "nfnet-test", num_classes=10, labels=list("0123456789"), generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(0.25)  # no longer as it was drawn
    before = {key: value.clone() for key, value in model.state_dict().items()}
    still = {**QUICK, "optim": {"lr": 1e-12, "warmup_epochs": 0, "ema_decay": None}}
    result = nfzoo.fit(model, digits(), output=tmp_path / "run", **still)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for key, value in result.model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)
    assert result.model.provenance is not None
    assert result.model.provenance["trained_from"] == "memory:nfnet-test"
    with pytest.raises(ConfigError, match="was a model of a Python program"):
        nfzoo.fit("memory:nfnet-test", digits(), output=tmp_path / "other", **QUICK)
    with pytest.raises(ConfigError, match="is folded for inference"):
        nfzoo.fit(model.for_inference(), digits(), output=tmp_path / "other", **QUICK)
    with pytest.raises(ConfigError, match=r"model must be a name, a folder or a model of nfzoo, not .* Linear"):
        nfzoo.fit(torch.nn.Linear(2, 2), digits(), output=tmp_path / "other")  # type: ignore[arg-type]


def test_a_given_model_of_other_classes_gets_a_fresh_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nfzoo.create("nfnet-test", num_classes=3).to(torch.bfloat16)
    result = nfzoo.fit(model, digits(), output=tmp_path / "run", **QUICK)
    assert "the given model has 3 classes: its classifier is replaced" in caplog.text
    assert result.model.get_parameter("head.weight").shape[0] == 10
    assert result.model.get_parameter("head.weight").dtype == torch.float32
    assert model.get_parameter("head.weight").shape[0] == 3


@each(
    ("options", "message"),
    [
        ({"epoch": 3}, "there is no option 'epoch'; did you mean 'epochs'?"),
        ({"lr": 0.1}, "there is no option 'lr'; did you mean 'optim.lr'?"),
        ({"optim": {"learning_rate": 0.1}}, "there is no option 'optim.learning_rate'"),
        ({"epochs": 2.5}, "epochs must be a whole number, not 2.5"),
        ({"epochs": np.float64(2.5)}, "epochs must be a whole number, not 2.5"),
        ({"teacher": nfzoo.create("nfnet-test")}, "teacher must be text, not an object of the class NFNet"),
        ({"data": "digits"}, "the data are the second argument of fit, train"),
        ({"labels": "labels.csv"}, "labels and class_names are for data by name alone"),
        ({"callbacks": [nfzoo.Callback]}, "the callback Callback is a class; make an object of it"),
        ({"callbacks": nfzoo.Callback()}, "callbacks must be a list of nfzoo.Callback objects"),
        ({"callbacks": [print]}, "a callback has a method on_step or on_epoch"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        nfzoo.fit("nfnet-test", digits(), output=tmp_path / "run", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_options() -> None:
    found = python_options({"epochs": np.int64(3), "optim": {"lr": np.float64(0.5), "clip": np.float32(0.25)}})
    assert found == {"epochs": 3, "optim": {"lr": 0.5, "clip": 0.25}}
    assert [type(value) for value in (found["epochs"], *found["optim"].values())] == [int, float, float]


def test_other_ways_in_point_to_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give a data set of a Python program to nfzoo\.fit"):
        TrainConfig(model="nfnet-test", data=digits(), output="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"give a model of a Python program to nfzoo\.fit"):
        TrainConfig(model=nfzoo.create("nfnet-test"), data="digits", output="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="of data by name, give the option class_names"):
        nfzoo.fit("nfnet-test", "digits", output=tmp_path / "run", classes=["a", "b"])


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**QUICK, "epochs": 2, "save_steps": 2, "drop_rate": 0.2, "resume": True}
    model = nfzoo.create("nfnet-test", num_classes=10, generator=torch.Generator().manual_seed(3))
    nfzoo.fit(model, digits(), output=tmp_path / "whole", **options)
    take_step = trainer.Trainer.train_step
    for step in (3, 8):
        with monkeypatch.context() as patch:

            def dying(self: trainer.Trainer, parts: list, last: int = step) -> None:
                if self.step == last:
                    raise Died
                take_step(self, parts)

            patch.setattr(trainer.Trainer, "train_step", dying)
            with pytest.raises(Died):
                nfzoo.fit(model, digits(), output=tmp_path / "run", **options)
        if step == 3:
            with pytest.raises(ConfigError, match=r"unfinished run; .* call nfzoo\.fit again with resume=True"):
                nfzoo.fit(model, digits(), output=tmp_path / "run", **{**options, "resume": False})
    fewer, other = digits(), digits()
    fewer.samples, fewer.targets = fewer.samples[:-1], fewer.targets[:-1]
    other.samples = [(path.replace("few-digits", "others"), label) for path, label in other.samples]
    other.samples[0], other.samples[1] = other.samples[1], other.samples[0]
    for data in (fewer, other):
        with pytest.raises(DataError, match="resume with the same data, or start anew"):
            nfzoo.fit(model, data, output=tmp_path / "run", **options)
    nfzoo.fit(model, digits(), output=tmp_path / "run", **options)
    assert same(tmp_path / "run", tmp_path / "whole")


def test_other_pixels_in_memory_are_noticed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8)
    labels = np.arange(40) % 2
    options = {**QUICK, "batch_size": 16, "resume": True}
    nfzoo.fit("nfnet-test", list(zip(images, labels, strict=True)), output=tmp_path / "run", **options)
    images[7] += 1
    with pytest.raises(DataError, match=r"files of the same names and other sizes"):
        nfzoo.fit("nfnet-test", list(zip(images, labels, strict=True)), output=tmp_path / "run", **options)


class Broken(Files):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in (3, 30):
            raise OSError("the disk is\ngone")
        return super().__getitem__(index)


def test_items_that_cannot_be_read_count_as_broken_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Broken(few_digits())
    with pytest.raises(DataError, match=r"cannot be read \(OSError: the disk is gone\)"):
        nfzoo.fit("nfnet-test", data, output=tmp_path / "a", **QUICK)
    nfzoo.fit("nfnet-test", data, output=tmp_path / "b", **QUICK, max_broken=2)
    said = [record.message for record in caplog.records if "item 3 of Broken cannot" in record.message]
    assert len(said) == 1
    del data.targets  # so that they are met when all items are read for their labels
    with pytest.raises(DataError, match="max_broken=N lets training go on"):
        nfzoo.fit("nfnet-test", data, output=tmp_path / "c", **QUICK)
    nfzoo.fit("nfnet-test", data, output=tmp_path / "d", **QUICK, max_broken=2)


def test_what_cannot_be_pickled_is_refused_where_processes_are_not_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = digits()
    data.transform = lambda image: image  # type: ignore[attr-defined]
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(DataError, match=r"Files cannot be pickled for the processes that load images .* workers=0"):
        nfzoo.fit("nfnet-test", data, output=tmp_path / "run", **{**QUICK, "workers": 1})
    nfzoo.fit("nfnet-test", data, output=tmp_path / "run", **QUICK)


@pytest.mark.slow
def test_what_cannot_be_pickled_is_forked(tmp_path: Path) -> None:
    data = digits()
    data.transform = lambda image: image  # type: ignore[attr-defined]
    nfzoo.fit("nfnet-test", digits(), output=tmp_path / "a", **QUICK)
    nfzoo.fit("nfnet-test", data, output=tmp_path / "b", **{**QUICK, "workers": 2})
    assert same(tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------- as programs

SCRIPT = """
import sys, time
import nfzoo
from tests.train.test_fit import QUICK, digits

class Slow(nfzoo.Callback):
    def on_step(self, state):
        time.sleep(float(sys.argv[2]))

if __name__ == "__main__":
    result = nfzoo.fit("nfnet-test", digits(), output=sys.argv[1], resume=True, callbacks=[Slow()],
                       **{**QUICK, "epochs": 2, "save_steps": 1})
    print("accuracy", result.accuracy, len(result.model.labels))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    few_digits()
    return file


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_same_script_goes_on_after_sigkill(tmp_path: Path, script: Path) -> None:
    def start(output: Path, pause: str) -> subprocess.Popen:
        command = [sys.executable, str(script), str(output), pause]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    killed = start(tmp_path / "killed", "0.5")
    while not list((tmp_path / "killed" / "checkpoints").glob("step_*2")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for name in ("killed", "whole"):
        done = start(tmp_path / name, "0")
        printed, _ = done.communicate(timeout=300)
        assert done.returncode == 0, printed
        assert "accuracy" in printed
        assert ("step 2's weights" in printed or "step 3's weights" in printed) == (name == "killed"), printed
    assert same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path, script: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(free_ports(1)[0]), str(script), str(tmp_path / "two"), "0"]
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout
    assert done.stdout.count("accuracy ") >= 2
    nfzoo.fit("nfnet-test", digits(), output=tmp_path / "one", **{**QUICK, "epochs": 2})
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=PROCESSES_TOLERANCE, rtol=0)
