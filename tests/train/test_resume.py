"""Interrupted runs: whatever ends them, they go on from a complete checkpoint to the very same weights."""

import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import nfzoo
from nfzoo.checkpoint import run_state
from nfzoo.cli.main import main as nfzoo_command
from nfzoo.data.loader import epoch_order
from nfzoo.train import run as train
from nfzoo.train import run_folder, trainer
from nfzoo.train.config import OptimConfig, recipes
from tests.support.pictures import few_digits, write_images
from tests.support.processes import ROOT, free_ports, together

OPTIONS = ["--model", "nfnet-test", "--data", few_digits(), "--epochs", "2", "--batch_size", "32", "--save_steps", "2"]
OPTIONS += ["--workers", "0"]
OPTIONS += ["--drop_rate", "0.2", "--stochastic_depth", "0.2", "--optim.ema_decay", "0.9", "--optim.warmup_epochs", "0"]
OPTIONS += ["--optim.lr", "0.4", "--train-size", "16", "--test-size", "16"]
OPTIONS += ["--augment.layers", "1", "--augment.mixup", "0.2", "--augment.cutmix", "true"]
# Ten float32 steps with sums in another order; a parameter is of order one.
PROCESSES_TOLERANCE = 1e-5


class Died(BaseException):
    """Stands for the end of the process."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def rows(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in found]


def run(output: Path, *options: str) -> int:
    return train.main([*OPTIONS, "--output", str(output), *options])


def die_before_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = trainer.Trainer.train_step

    def dying(self: trainer.Trainer, parts: list) -> None:
        if self.step == step:
            raise Died
        take_step(self, parts)

    monkeypatch.setattr(trainer.Trainer, "train_step", dying)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed, in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


def test_dead_in_an_epoch_and_between_two(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (3, 5, 8):  # after a save in the middle, after an epoch, in the middle of the second
        with monkeypatch.context() as patch:
            die_before_step(step, patch)
            with pytest.raises(Died):
                run(tmp_path / "run", "--resume", "true")
    assert run(tmp_path / "run", "--resume", "true") == 0
    assert same(tmp_path / "run", whole)
    assert rows(tmp_path / "run") == rows(whole)
    figures = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(tmp_path / "run", "--resume", "true") == 0  # there is nothing left to do
    assert same(tmp_path / "run", whole)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == figures


RARE = ["--data", "{data}", "--labels", "{labels}", "--batch_size", "16", "--sampler", "balanced"]
RARE += ["--class-weights", "{weights}"]


def rare(folder: Path) -> list[str]:
    """Return options of a run whose table names few images of some classes, and with weights of others."""
    data, labels, weights = Path(few_digits()), folder / "labels.csv", folder / "weights.yaml"
    kept = [path for label in data.iterdir() for path in sorted(label.iterdir())[: 6 if label.name in "37" else 20]]
    rows = [f"{path.relative_to(data)},{path.parent.name}\n" for path in kept]
    labels.write_text(f"path,label\n{''.join(rows)}")
    weights.write_text("1: 2.5\n7: 0.5\n")
    return [option.format(data=data, labels=labels, weights=weights) for option in RARE]


def test_dead_in_a_run_of_rare_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = rare(tmp_path)
    assert run(tmp_path / "whole", *options) == 0
    for step in (3, 13):
        with monkeypatch.context() as patch:
            die_before_step(step, patch)
            with pytest.raises(Died):
                run(tmp_path / "run", *options, "--resume", "true")
    (tmp_path / "weights.yaml").write_text("1: 2.5\n7: 0.25\n")
    assert run(tmp_path / "run", *options, "--resume", "true") == 2
    assert "is of a run with class_weights.7 0.5, not 0.25" in capsys.readouterr().err
    (tmp_path / "weights.yaml").write_text('{"7": 0.5, "1": 2.5}')
    assert run(tmp_path / "run", *options, "--resume", "true") == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    # The recipe of a run needs no file of weights.
    assert yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())["class_weights"] == {"1": 2.5, "7": 0.5}
    assert run(tmp_path / "other", *options[:-1], "none") == 0
    assert not same(tmp_path / "other", tmp_path / "whole")


@pytest.mark.slow
def test_rare_classes_in_two_processes(tmp_path: Path) -> None:
    options = rare(tmp_path)
    assert run(tmp_path / "one", *options) == 0
    together(tmp_path, [[*OPTIONS, *options, "--output", str(tmp_path / "two"), "--accumulation", "2"]])
    found, wanted = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < PROCESSES_TOLERANCE
    for mine, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_options_of_an_optimizer_do_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--optim.name", "adamw", "--optim.lr", "0.001", "--optim.options.betas", "[0.8, 0.9]"]
    with monkeypatch.context() as patch:
        die_before_step(3, patch)
        with pytest.raises(Died):
            run(tmp_path / "run", *options, "--epochs", "1")
    assert run(tmp_path / "run", *options, "--epochs", "1", "--resume", "true") == 0


def test_dead_before_the_first_checkpoint(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_before_step(1, patch)
        with pytest.raises(Died):
            run(tmp_path / "run")
    assert run(tmp_path / "run", "--resume", "true") == 0
    assert same(tmp_path / "run", whole)


def test_a_checkpoint_becomes_a_model(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = max((whole / "checkpoints").iterdir())
    assert nfzoo_command(["convert", str(newest), str(tmp_path / "model")]) == 0
    assert "read as checkpoint" in capsys.readouterr().out
    found, wanted = weights(tmp_path / "model"), weights(whole)  # of the average
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert nfzoo.from_pretrained(tmp_path / "model").labels == nfzoo.from_pretrained(whole).labels
    damaged = shutil.copytree(newest, tmp_path / newest.name)
    (damaged / "average.safetensors").unlink()
    assert nfzoo_command(["convert", str(damaged), str(tmp_path / "other")]) == 2
    assert "average.safetensors is missing" in capsys.readouterr().err
    damaged.rename(renamed := tmp_path / "renamed")
    assert nfzoo_command(["convert", str(renamed), str(tmp_path / "other")]) == 2
    assert f"so its folder must be {newest.name}" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    for target in (newest, renamed):  # --overwrite would replace the run's own files
        assert nfzoo_command(["convert", str(newest), str(target), "--overwrite"]) == 2
        assert "give another folder for the model" in capsys.readouterr().err
    assert nfzoo_command(["info", str(newest)]) == 2
    assert "a checkpoint of a run, of which `nfzoo convert` makes a model" in capsys.readouterr().err


@pytest.mark.slow
def test_shards_resume_in_other_numbers_of_processes(tmp_path: Path, whole: Path) -> None:
    shards = tmp_path / "shards"
    together(tmp_path, [[*OPTIONS, "--output", str(shards), "--sharding", "fsdp2"]])
    newest = max((shards / "checkpoints").iterdir())
    assert sorted(path.suffix for path in newest.iterdir()) == [".json", ".safetensors", ".safetensors"]
    shutil.rmtree(newest)  # as if the last epoch's end had not been reached
    for name in ("one", "two", "four"):
        shutil.copytree(shards, tmp_path / name)
    common = [*OPTIONS, "--resume", "true", "--output"]
    assert run(tmp_path / "one", "--resume", "true") == 0
    together(tmp_path, [[*common, str(tmp_path / "two")]])
    together(tmp_path, [[*common, str(tmp_path / "four"), "--sharding", "fsdp2"]], world=4)
    for name in ("shards", "one", "two", "four"):
        found, wanted = weights(tmp_path / name), weights(whole)
        assert max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < PROCESSES_TOLERANCE, name


def test_what_a_launcher_starts_anew_goes_on_by_itself(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints of another launcher are refused as ever; `--overwrite` is for the first start."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default: the launcher's process identifies it
    for step, options in ((1, []), (3, []), (8, ["--overwrite", "true"])):
        with monkeypatch.context() as patch:
            die_before_step(step, patch)
            with pytest.raises(Died):
                run(tmp_path / "run", *options)
    assert "step 2's weights" in capsys.readouterr().out
    for name in ("another", None):
        with monkeypatch.context() as patch:
            patch.setenv("TORCHELASTIC_RUN_ID", name) if name else patch.delenv("TORCHELASTIC_RUN_ID")
            assert run(tmp_path / "run") == 2
        assert "holds an unfinished run; to go on with it: " in capsys.readouterr().err
    assert run(tmp_path / "run") == 0
    assert "step 8's weights" in capsys.readouterr().out
    assert same(tmp_path / "run", whole)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One of two is killed before there is a checkpoint, and one after; all go on without `--resume`."""
    together(tmp_path, [[*OPTIONS, "--output", str(tmp_path / "whole")]])
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    command += ["--monitor-interval", "0.1", "--master-port", str(free_ports(1)[0]), "-m", "nfzoo.train", *OPTIONS]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--output", str(output)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        try:
            assert next(line for line in launcher.stdout if "random weights" in line)
            psutil.Process(launcher.pid).children()[1].kill()
            assert next(line for line in launcher.stdout if "weights" in line)
            while not list(output.glob("checkpoints/step_*")):
                time.sleep(0.01)
            psutil.Process(launcher.pid).children()[0].kill()
            printed, _ = launcher.communicate(timeout=120)
        finally:
            launcher.kill()
    assert launcher.returncode == 0, capfd.readouterr().err
    assert re.search(r"step \d+'s weights", printed)
    assert same(output, tmp_path / "whole")
    assert rows(output) == rows(tmp_path / "whole")


@pytest.mark.slow
def test_other_numbers_of_processes_go_on(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 -> 2 and 2 -> 1, with other parts for accumulation on the way.
    one, two = tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as patch:
        die_before_step(3, patch)
        with pytest.raises(Died):
            run(one)
    common = [*OPTIONS, "--resume", "true"]
    together(
        tmp_path,
        [
            [*common, "--output", str(one), "--accumulation", "2"],
            [*OPTIONS, "--output", str(two)],
        ],
    )
    first = two / "checkpoints"
    for path in (two / "config.json", two / "model.safetensors", two / "metrics.jsonl"):
        path.unlink()
    newest = max(first.iterdir())
    newest.rename(tmp_path / "aside")  # as if the last epoch's end had not been reached
    assert run(two, "--resume", "true") == 0
    start = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).state_dict()
    for folder in (one, two):
        found, wanted = weights(folder), weights(whole)
        assert max(float((found[k] - wanted[k]).abs().max()) for k in found) < PROCESSES_TOLERANCE
        assert max(float((found[k] - start[k]).abs().max()) for k in found) > 1000 * PROCESSES_TOLERANCE


def test_a_run_goes_on_as_itself_alone(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        die_before_step(3, patch)
        with pytest.raises(Died):
            run(tmp_path / "run")
    for options, said in (
        (["--resume", "true", "--optim.lr", "0.3"], "optim.lr 0.4, not 0.3"),
        (["--resume", "true", "--augment.mixup", "0.4"], "augment.mixup 0.2, not 0.4"),
        (["--resume", "true", "--validation_fraction", "0.3"], "validation_fraction"),
        ([], "--resume true"),
    ):
        assert run(tmp_path / "run", *options) == 2
        assert said in capsys.readouterr().err
    assert run(tmp_path / "run", "--overwrite", "true", "--seed", "1", "--epochs", "1", "--save_steps", "9") == 0
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000005"]


def test_the_folder_alone_says_how_to_go_on(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first epoch has ended, when there is no train.yaml, from the folder's newest checkpoint."""
    output = tmp_path / "a run"

    def stop(self: trainer.Trainer, parts: object, keep=trainer.Trainer.train_step) -> None:
        keep(self, parts)  # type: ignore[arg-type]
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", stop)
        for variable in ("RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
            patch.delenv(variable, raising=False)
        assert run(output) == 143
        error = capsys.readouterr().err
    command = re.search(r"to go on from it: nfzoo (train .*)\n", error)
    assert command is not None, error
    assert not (output / "train.yaml").exists()
    arguments = shlex.split(command[1])
    assert arguments == ["train", "--output", str(output), "--resume", "true"]
    for more, said in ((["--optim.lr", "0.3"], "optim.lr 0.4, not 0.3"), (["--model", "nfnet-f0"], "model")):
        assert nfzoo_command([*arguments, *more]) == 2
        assert said in capsys.readouterr().err
    assert nfzoo_command(arguments) == 0
    assert same(output, whole)
    assert rows(output) == rows(whole)
    shutil.rmtree(output / "checkpoints")  # train.yaml knows as well
    assert recipes.parse(arguments[1:]).optim.lr == 0.4
    (tmp_path / "other").mkdir()
    for name, said in (("other", "holds no run to go on with; a new"), ("a rum", "did you mean")):
        assert nfzoo_command(["train", "--output", str(tmp_path / name), "--resume", "true"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "--model and --data as well" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a run", "other"]


def test_a_launchers_options_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = train.TrainConfig(model="m", data="d", output="runs/x", optim=OptimConfig(name="my.Optimizer"))
    for variable in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, start in (
        ("", "nfzoo train"),
        ("RANK", "… -m nfzoo.train"),
        ("TORCHELASTIC_RUN_ID", "torchrun … -m nfzoo.train"),
        ("ACCELERATE_MIXED_PRECISION", "accelerate launch … -m nfzoo.train"),
    ):
        if variable:
            monkeypatch.setenv(variable, "x")
        assert run_folder.resume_command(config) == f"{start} --output runs/x --resume true --allow-import"


def test_other_data_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "pets", {"cat": 10, "dog": 10})
    options = ["--model", "nfnet-test", "--data", str(data), "--output", str(tmp_path / "run"), "--batch_size", "4"]
    options += ["--workers", "0", "--save_steps", "1", "--epochs", "1"]
    with monkeypatch.context() as patch:
        die_before_step(2, patch)
        with pytest.raises(Died):
            train.main(options)
    moved = data.rename(tmp_path / "moved")
    options[3] = str(moved)
    (moved / "cat" / "1.png").rename(moved / "cat" / "other.png")
    assert train.main([*options, "--resume", "true"]) == 2
    assert "others by name" in capsys.readouterr().err
    (moved / "cat" / "other.png").rename(moved / "cat" / "1.png")
    assert train.main([*options, "--resume", "true"]) == 0
    write_images(moved, {"cow": 10})
    assert train.main([*options, "--resume", "true"]) == 2
    assert "24 training images of 3 classes" in capsys.readouterr().err


def test_other_pixels_under_the_same_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_images(tmp_path / "pets", {"cat": 10, "dog": 10})
    options = ["--model", "nfnet-test", "--data", str(data), "--output", str(tmp_path / "run"), "--batch_size", "4"]
    options += ["--workers", "0", "--save_steps", "1", "--epochs", "1", "--keep-checkpoints", "9"]
    with monkeypatch.context() as patch:
        die_before_step(2, patch)
        with pytest.raises(Died):
            train.main(options)
    image = data / "dog" / "3.png"
    pixels = image.read_bytes()
    image.write_bytes(pixels + b"\0")
    assert train.main([*options, "--resume", "true"]) == 2
    assert "files of the same names and other sizes" in capsys.readouterr().err
    image.write_bytes(pixels)
    os.utime(image, (1, 1))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with monkeypatch.context() as patch:  # a process that is not the first goes on too, and leaves the warning to it
        patch.setattr(train.program, "is_first_process", lambda *_: False)
        assert train.main([*options, "--output", str(tmp_path / "other"), "--resume", "true"]) == 0
    assert train.main([*options, "--resume", "true"]) == 0
    assert [r.message for r in caplog.records if "fewer than ten" not in r.message] == [
        f"the files of {data} were written anew since the run began, with the same names and sizes"
    ]
    # Runs of before knew neither sizes nor times.
    image.write_bytes(pixels + b"\0")
    for state in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        facts = json.loads(state.read_text())
        del facts["data"]["sizes"], facts["data"]["times"], facts["sha256"]
        state.write_text(json.dumps({**facts, "sha256": run_state._digest(facts)}))
    assert train.main([*options, "--resume", "true"]) == 0


# ---------------------------------------------------------------- signals and dying processes


def start(output: Path, *options: str, world: int, module: str = "nfzoo.train") -> list[subprocess.Popen[str]]:
    """The processes of a run, each in a group of its own, past their start."""
    port = free_ports(1)[0]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if world > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *OPTIONS, "--output", str(output), *options],
            cwd=ROOT,
            env={**environment, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(world)
    ]
    assert processes[0].stdout is not None
    if not processes[0].stdout.readline():  # says what it begins with
        raise AssertionError([process.communicate(timeout=60) for process in processes])
    return processes


def kill(processes: list[subprocess.Popen[str]]) -> bool:
    """SIGKILL to all; whether any still ran."""
    lived = any(process.poll() is None for process in processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate(timeout=60)
    return lived


def killed_often(output: Path, times: int, seed: int, *options: str) -> tuple[int, int]:
    """Kill a run of two processes so often, then let it end: every other time at a random moment, else in a save."""
    rng = random.Random(seed)
    kills = in_saves = 0
    while kills < times:
        processes = start(output, "--resume", "true", "--save_steps", "1", *options, world=2)
        if kills % 2:
            time.sleep(rng.uniform(0, 1.5))
        else:
            before = set(output.glob("checkpoints/*"))
            while set(output.glob("checkpoints/*")) <= before and processes[0].poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
        kills += kill(processes)
        in_saves += bool(list(output.glob("**/.*.partial")))
        if (output / "model.safetensors").exists():
            nfzoo.from_pretrained(output)  # what was saved last loads, whatever the moment
    processes = start(output, "--resume", "true", "--save_steps", "1", *options, world=2)
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    return kills, in_saves


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    together(tmp_path, [[*OPTIONS, "--output", str(tmp_path / "whole")]])
    kills, _ = killed_often(tmp_path / "run", 3, seed=0)
    assert kills == 3
    assert same(tmp_path / "run", tmp_path / "whole")
    for found, wanted in zip(rows(tmp_path / "run"), rows(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)  # an epoch's sums, which two processes share, are added anew


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    options = ["--epochs", "12"]
    together(tmp_path, [[*OPTIONS, *options, "--output", str(tmp_path / "whole")]])
    kills, in_saves = killed_often(tmp_path / "run", 20, 1, *options)
    print(f"{kills} kills, {in_saves} of them in a save")
    assert kills == 20
    assert in_saves > 0
    assert same(tmp_path / "run", tmp_path / "whole")
    for found, wanted in zip(rows(tmp_path / "run"), rows(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)  # an epoch's sums, which two processes share, are added anew


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_asked_to_stop_it_saves_and_goes(tmp_path: Path, number: int, status: int) -> None:
    options = ["--epochs", "200", "--save_steps", "100000"]
    processes = start(tmp_path / "run", *options, world=2 if number == signal.SIGTERM else 1)
    time.sleep(1)
    processes[0].send_signal(number)  # to one of them alone
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), printed
    error = printed[0][1]
    assert error.count("\n") == 1
    assert f"stopped by {signal.Signals(number).name} after step" in error
    assert "--resume true" in error
    saved = trainer.Path(tmp_path / "run" / "checkpoints")
    assert len(list(saved.iterdir())) in (1, 2)
    assert not list(saved.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "options", "said"),
    [
        ("train", ["--workers", "0"], "after step 4; "),
        ("train", ["--workers", "1"], "after step 4; "),
        ("val", ["--workers", "1"], "held-out images; nothing"),
    ],
)
def test_asked_to_stop_while_it_waits_for_a_disk(tmp_path: Path, part: str, options: list[str], said: str) -> None:
    data = write_images(tmp_path / "pets" / "train", {"cat": 10, "dog": 10}).parent
    write_images(data / "val", {"cat": 2, "dog": 2})
    order = epoch_order(20, seed=0, epoch=0)
    index = int(order[17])  # of the fifth step
    image = (
        data / "train" / ("cat", "dog")[index >= 10] / f"{index % 10}.png"
        if part == "train"
        else data / "val/cat/0.png"
    )
    image.unlink()
    os.mkfifo(image)
    options = [*options, "--data", str(data), "--batch_size", "4", "--save_steps", "999"]
    (process,) = start(tmp_path / "run", *options, world=1, module="tests.support.silent_disk")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert f"stopped by SIGTERM {'after' if part == 'train' else 'while it waited for'} " in error
    assert said in error
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").exists() == (part == "train")


@pytest.mark.slow
def test_two_processes_are_asked_to_stop_while_one_waits_for_a_disk(tmp_path: Path) -> None:
    data = write_images(tmp_path / "pets" / "train", {"cat": 10, "dog": 10}).parent
    write_images(data / "val", {"cat": 2, "dog": 2})
    index = int(epoch_order(20, seed=0, epoch=0)[19])  # of the fifth step, for the second process
    image = data / "train" / ("cat", "dog")[index >= 10] / f"{index % 10}.png"
    image.unlink()
    os.mkfifo(image)
    options = ["--data", str(data), "--batch_size", "4", "--save_steps", "999"]
    processes = start(tmp_path / "run", *options, world=2, module="tests.support.silent_disk")
    time.sleep(2)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], printed
    assert "stopped by SIGTERM after step 4" in printed[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others(tmp_path: Path, victim: int) -> None:
    processes = start(tmp_path / "run", "--epochs", "500", "--save_steps", "5", world=2)
    time.sleep(1)
    processes[victim].kill()
    survivor = processes[1 - victim]
    _, error = survivor.communicate(timeout=60)
    processes[victim].communicate(timeout=60)
    assert survivor.returncode == 1, error
    last = error.strip().splitlines()[-1]
    assert f"process {1 - victim} lost the others at step" in last
    assert "--resume true" in last or "nothing was saved" in last


# ---------------------------------------------------------------- disks and numbers that give out


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = run_folder.save_state

    def full(root: Path, step: int, *rest: object, **more: object) -> Path:
        if step >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(root, step, *rest, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_state", full)
        assert run(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert f"could not save to '{tmp_path / 'run'}': [Errno 28] No space left on device" in error
    assert "step_00000002 holds the last checkpoint" in error
    assert run(tmp_path / "run", "--resume", "true") == 0
    assert same(tmp_path / "run", whole)


def test_what_a_killed_run_left_of_its_last_write_is_removed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    left = [output.with_name(".run.01234567.partial"), output / ".run.89abcdef.partial"]
    left += [output / "checkpoints" / name for name in (".step_00000004.01234567.partial", ".step_00000002.partial")]
    theirs = [output.with_name(".other.01234567.partial"), output / ".pictures.partial"]
    for folder in (*left, *theirs):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
    assert run(output, "--epochs", "1", "--nonfinite", "stop", "--optim.lr", "1e12", "--optim.clip", "null") == 1
    assert [folder.exists() for folder in left + theirs] == [False] * 4 + [True] * 2
    assert not (output / "checkpoints").exists()  # nor is an empty folder left


def test_a_run_that_could_not_save_at_all_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nfzoo.checkpoint.run_state.save_tensors", full)
    assert run(tmp_path / "deep" / "run") == 1
    assert not list(tmp_path.iterdir())


def test_an_update_reaches_no_checkpoint_that_is_being_written(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread writes the checkpoint of step 2 only after the next steps, as a slow disk would."""
    save, stepped = run_folder.save_state, threading.Event()
    take = trainer.Trainer.train_step
    waited: list[bool] = []

    def late(root: Path, step: int, *rest: object, **more: object) -> Path:
        if step == 2:
            waited.append(stepped.wait(60))
        return save(root, step, *rest, **more)  # type: ignore[arg-type]

    def train_step(self: trainer.Trainer, *rest: object) -> None:
        take(self, *rest)  # type: ignore[arg-type]
        if self.step == 4:
            stepped.set()

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_state", late)
        patch.setattr(trainer.Trainer, "train_step", train_step)
        patch.setattr(os, "fsync", lambda descriptor: None)
        assert run(tmp_path / "run", "--keep-checkpoints", "100") == 0
    assert waited == [True]
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    assert run(tmp_path / "run", "--resume", "true") == 0  # from step 2
    assert same(tmp_path / "run", whole)


def test_checkpoints_that_cannot_be_read_are_not_removed_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be a newer version's."""
    manifest = tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"format": 99}')
    assert run(tmp_path / "run") == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert run(tmp_path / "run", "--resume", "true") == 2
    error = capsys.readouterr().err
    assert "no checkpoint in" in error
    assert manifest.exists()


def test_saving_while_training_goes_on_changes_nothing(tmp_path: Path, whole: Path) -> None:
    assert run(tmp_path / "run", "--async-save", "false") == 0
    assert same(tmp_path / "run", whole)


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    model = nfzoo.create("nfnet-test")
    with torch.no_grad():
        model.get_parameter("stages.1.0.skip_gain").fill_(1e30)
        model.get_parameter("stages.1.0.conv2.gain").fill_(1e30)
    return model.save_pretrained(tmp_path / "poisoned")


def test_where_numbers_stop_being_finite(tmp_path: Path, poisoned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--model", str(poisoned)) == 1
    error = capsys.readouterr().err
    assert "the output of 'stages.1.0' is not finite, at step 1 (epoch 1)" in error
    assert "nothing was saved" in error
    assert not (tmp_path / "run").exists()


def test_steps_that_are_not_finite_are_skipped_when_asked(
    tmp_path: Path, poisoned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(poisoned), "--nonfinite", "skip", "--epochs", "1", "--optim.ema_decay", "null"]
    assert run(tmp_path / "run", *options) == 0
    assert "step 5 skipped: the output of 'stages.1.0' is not finite (5 so far)" in capsys.readouterr().out
    assert rows(tmp_path / "run")[0]["skipped"] == 5
    before, after = weights(poisoned), weights(tmp_path / "run")
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("head."))


@pytest.mark.slow
def test_skipping_for_good_is_no_training(tmp_path: Path, poisoned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(poisoned), "--nonfinite", "skip", "--epochs", "9", "--batch_size", "16"]
    assert run(tmp_path / "run", *options, "--save_steps", "100") == 1
    assert f"is not finite, the {trainer.SKIPS_IN_A_ROW}th time in a row, at step 20" in capsys.readouterr().err
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (row["train_loss"], row["skipped"]) == (None, 10)  # JSON has no NaN


def test_the_last_good_checkpoint_is_named_when_training_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = trainer.Trainer.train_step

    def diverging(self: trainer.Trainer, parts: list) -> None:
        if self.step == 3:
            with torch.no_grad():
                self.learner.live["stages.0.0.conv1.weight"].fill_(float("nan"))
        take_step(self, parts)

    monkeypatch.setattr(trainer.Trainer, "train_step", diverging)
    assert run(tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "a weight of 'stages.0.0' is not finite, at step 4" in error
    assert "step_00000002 holds the last checkpoint" in error


HOLDER = """
import sys, time
from nfzoo.checkpoint.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            (tmp_path / "link").symlink_to(output)
            for name in ("run", "link"):
                assert run(tmp_path / name) == 2
                assert "another run is writing into" in capsys.readouterr().err
            assert not output.exists()
        finally:
            other.kill()
    assert run(output) == 0  # the lock went with the process


LAUNCHER = """
import subprocess, sys
print(subprocess.Popen([sys.executable, *sys.argv[2:]]).wait())
"""
WORKER = """
import time
from nfzoo.runtime.distributed import Agreement
with Agreement() as agreement:
    assert agreement.reached(0) == (None, [0])
    print("running", flush=True)
    while agreement.reached()[0] is None:
        time.sleep(0.05)
    print("asked", int(agreement.reached()[0]), flush=True)
"""


@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="only Linux has /proc, which says what started a process"
)
def test_the_end_of_accelerate_launch_is_heard(tmp_path: Path) -> None:
    launcher = tmp_path / "accelerate"
    launcher.write_text(LAUNCHER)
    command = [sys.executable, str(launcher), "launch", "-c", WORKER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.terminate()
        assert process.stdout.readline() == f"asked {int(signal.SIGTERM)}\n"
