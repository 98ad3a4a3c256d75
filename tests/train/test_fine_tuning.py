"""Fine-tuning runs: what is frozen, rates by depth, the best epoch, and that all of it resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nfzoo
from nfzoo.cli.main import main as nfzoo_command
from nfzoo.train import run as train
from nfzoo.train import trainer
from tests.support.loops import each
from tests.support.pictures import few_digits
from tests.support.processes import ROOT, together

QUICK = [
    "--model",
    "nfnet-test",
    "--data",
    few_digits(),
    "--batch-size",
    "32",
    "--train-size",
    "16",
    "--test-size",
    "16",
]
QUICK += ["--workers", "0", "--epochs", "1"]


def run(output: Path, *options: str) -> int:
    return train.main([*QUICK, "--output", str(output), *options])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- what is trained


@each(
    ("tune", "name", "trained"),
    [
        ("stages:1", "sgd", ("stages.3.", "final_conv.", "head.")),
        ("stages:1", "adamw", ("stages.3.", "final_conv.", "head.")),
        ("head", "sgd", ("head.",)),
        ("head", "adamw", ("head.",)),
    ],
)
def test_what_is_frozen_keeps_its_bits(tmp_path: Path, tune: str, name: str, trained: tuple[str, ...]) -> None:
    """Also in the average, and with weight decay; of the classifier alone AGC clips the bias, which is one unit."""
    options = ["--tune", tune, "--optim.name", name, "--optim.lr", "0.01", "--optim.warmup-epochs", "0"]
    options += ["--optim.weight-decay", "0.1", "--optim.ema-decay", "0.9"]
    options += ["--optim.clip", "1e-7" if tune == "head" else "0.1"]
    output = tmp_path / f"{tune}-{name}".replace(":", "-")
    assert run(output, *options) == 0
    before = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).state_dict()
    (newest,) = (output / "checkpoints").iterdir()
    for file in ("model", "average"):
        after = load_file(newest / f"{file}.safetensors")
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        parts = {key for key in before if key.startswith(trained)}
        assert {key for key in parts if key.endswith(".weight")} <= changed <= parts, file
    state = load_file(newest / "optimizer.safetensors")
    assert {key.partition("::")[0] for key in state} == parts
    if name == "sgd" and tune == "head":
        assert rows(output)[0]["clipped"] == 1.0


def test_a_classifier_takes_the_order_of_the_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model that has the same classes in another order is as good as before; one of other classes is told."""
    model = nfzoo.create("nfnet-test", num_classes=10, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.get_parameter("head.weight"), generator=torch.Generator().manual_seed(1))
    turned = [3, 0, 7, 1, 9, 2, 4, 8, 6, 5]
    for name, labels, said in (
        ("same", "0123456789", None),
        ("turned", "3071924865", "put into that of the data"),
        ("other", "abcdefghij", "with other names (the data have '0')"),
    ):
        caplog.clear()
        folder, output = tmp_path / f"{name}-model", tmp_path / name
        model.labels = tuple(labels)
        model.save_pretrained(folder)
        assert run(output, "--model", str(folder), "--pretrained", "true", "--optim.lr", "1e-20") == 0
        before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
        for key in ("head.weight", "head.bias"):
            expected = before[key]
            if name == "turned":
                expected = torch.empty_like(expected).index_copy_(0, torch.tensor(turned), expected)
            torch.testing.assert_close(after[key], expected)
        told = [record.message for record in caplog.records if record.message.startswith(str(folder))]
        assert len(told) == (said is not None)
        assert said is None or said in told[0]


def test_more_stages_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--tune", "stages:5") == 2
    assert "more than the 4 stages of the network; pass stages:4 or less" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- what is clipped


@each("name", ["sgd", "adamw"])
def test_the_figures_name_what_is_clipped(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A threshold that clips every gradient but those that are zero, and one that clips none.

    A warning says that what is not trained is random.
    """
    options = ["--optim.name", name, "--tune", "head", "--optim.lr", "0.01"]
    for clip, fraction in (("1e-7", 1.0), ("1e9", 0.0)):
        output = tmp_path / f"{name}-{clip}"
        assert run(output, *options, "--optim.clip", clip) == 0
        (row,) = rows(output)
        assert {key: row[key] for key in row if key.startswith("clipped")} == dict.fromkeys(
            ("clipped", "clipped_head_bias"), fraction
        )
        assert "tune head leaves the other weights as they were drawn at random" in caplog.text
        caplog.clear()
        assert f"clipped {fraction:.1%} of the bias" in capsys.readouterr().out
    assert run(tmp_path / f"{name}-spared", *options, "--optim.clip", "1e-7", "--optim.clip-head-bias", "false") == 0
    (spared,) = rows(tmp_path / f"{name}-spared")
    assert {key for key in spared if key.startswith("clipped")} == {"clipped"}  # there is nothing left to clip
    bias = {
        f: load_file(tmp_path / f"{name}-{f}" / "model.safetensors")["head.bias"].norm() for f in ("1e-7", "spared")
    }
    assert bias["spared"] > 1.5 * bias["1e-7"] > 0
    assert run(tmp_path / f"{name}-all", "--optim.name", name, "--optim.lr", "0.01") == 0
    (row,) = rows(tmp_path / f"{name}-all")
    kinds = {f"clipped_{kind}" for kind in ("weight", "gain", "bias", "skip_gain", "head_bias")}
    assert {key for key in row if key.startswith("clipped_")} == kinds
    assert row["clipped_head_bias"] == 1.0
    assert min(row[key] for key in kinds) < row["clipped"] < max(row[key] for key in kinds)


# ---------------------------------------------------------------- rates by depth

# One step of SGD without momentum, decay and clipping moves each weight by its rate times the same gradient.
PLAIN = ["--batch-size", "160", "--optim.warmup-epochs", "0", "--optim.clip", "null", "--optim.weight-decay", "0"]
PLAIN += ["--optim.ema-decay", "null", "--optim.lr", "0.5"]


@each("name", ["sgd", "torch.optim.SGD"])
def test_each_depth_moves_at_its_rate(tmp_path: Path, name: str) -> None:
    own = ["--optim.momentum", "0", "--optim.nesterov", "false"] if name == "sgd" else []
    rates = ["--optim.layer-decay", "0.5", "--optim.head-lr-scale", "4"]
    for folder, options in (("plain", []), ("decayed", rates)):
        assert run(tmp_path / f"{name}-{folder}", *PLAIN, "--optim.name", name, *own, *options) == 0
    start = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).state_dict()
    plain, decayed = (load_file(tmp_path / f"{name}-{f}" / "model.safetensors") for f in ("plain", "decayed"))
    # Of nfnet-test's four blocks the last has depth 4, as the final convolution; the others do not move at first, but
    # for their skip gains.
    powers = {"stem.conv0.weight": 5, "stages.0.0.skip_gain": 4, "stages.2.0.skip_gain": 2, "stages.3.0.skip_gain": 1}
    for key, factor in {
        **{key: 0.5**power for key, power in powers.items()},
        "final_conv.weight": 0.5,
        "head.bias": 4.0,
    }.items():
        moved, full = decayed[key] - start[key], plain[key] - start[key]
        assert full.abs().max() > 0, key
        torch.testing.assert_close(moved, factor * full, rtol=1e-2, atol=1e-7)  # differences of float32 weights


# ---------------------------------------------------------------- the best epoch

LONG = ["--epochs", "4", "--optim.lr", "0.5", "--optim.ema-decay", "null", "--keep-best", "loss", "--batch-size", "80"]
LONG += ["--keep-checkpoints", "1"]
LOSSES = [3.0, 2.0, 2.5, 2.25, 2.125]  # of the epochs; the best is the second, after step 4
BEST = 2


@pytest.fixture
def _held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(self: trainer.Trainer) -> dict[str, Any]:
        return {"loss": LOSSES[self.epoch], "accuracy": self.epoch / 8, "f1": 0.5}

    monkeypatch.setattr(trainer.Trainer, "_evaluate", evaluated)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").iterdir())


def same(a: Path, b: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.usefixtures("_held_out")
def test_the_best_epoch_is_kept_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert run(output, *LONG) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith(f"saved to {output}: epoch {BEST}, the best by loss (2.0000")
    )
    assert losses(output) == LOSSES[:4]
    # The record and the weights are those of that epoch, and so is the second checkpoint.
    provenance = nfzoo.from_pretrained(output).provenance or {}
    wanted = {"epochs": BEST, "best_by": "loss", "loss": 2.0, "step": 4, "accuracy": 1 / 8, "weights": "live"}
    assert {key: provenance[key] for key in wanted} == wanted
    assert steps(output) == [4, 8]
    assert nfzoo_command(["convert", str(output / "checkpoints" / "step_00000004"), str(tmp_path / "converted")]) == 0
    assert same(tmp_path / "converted", output)
    newest = load_file(output / "checkpoints" / "step_00000008" / "model.safetensors")
    assert not torch.equal(newest["head.weight"], load_file(output / "model.safetensors")["head.weight"])
    # Both go on: the last with another epoch, the best from where it was.
    shutil.copytree(output, tmp_path / "back")
    assert run(output, *LONG, "--epochs", "5", "--resume", "true") == 0
    assert losses(output) == LOSSES
    assert steps(output) == [4, 10]
    assert same(tmp_path / "converted", output)
    assert run(tmp_path / "back", *LONG, "--resume", "true", "--resume-from", "best") == 0
    assert "step 4's weights" in capsys.readouterr().out
    assert steps(tmp_path / "back") == [4, 8]
    again = load_file(tmp_path / "back" / "checkpoints" / "step_00000008" / "model.safetensors")
    assert all(torch.equal(again[key], newest[key]) for key in newest)


@pytest.mark.usefixtures("_held_out")
def test_patience_ends_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    patient = [*LONG, "--epochs", "5", "--patience"]
    assert run(tmp_path / "run", *patient, "1") == 0
    assert "no better loss for 1 epoch; the run ends" in capsys.readouterr().out
    assert losses(tmp_path / "run") == LOSSES[:3]
    assert run(tmp_path / "run", *patient, "1", "--resume", "true") == 0  # there is nothing left to do
    assert losses(tmp_path / "run") == LOSSES[:3]
    calibrated = nfzoo.from_pretrained(tmp_path / "run")
    calibrated.temperature = 1.25
    calibrated.save_pretrained(tmp_path / "run")
    assert run(tmp_path / "run", *patient, "2", "--resume", "true") == 0
    assert any("the temperature 1.25 in" in message for message in caplog.messages)
    assert nfzoo.from_pretrained(tmp_path / "run").temperature is None
    assert losses(tmp_path / "run") == LOSSES[:4]


@pytest.mark.usefixtures("_held_out")
def test_a_dead_run_keeps_the_same_best_epoch(tmp_path: Path) -> None:
    """Whatever became of the model since: what was best is read from its checkpoint."""
    assert run(tmp_path / "whole", *LONG) == 0
    assert run(tmp_path / "run", *LONG) == 0
    for path in (tmp_path / "run").glob("*.*"):
        path.unlink()
    assert run(tmp_path / "run", *LONG, "--resume", "true") == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.usefixtures("_held_out")
def test_a_damaged_checkpoint_of_the_best_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", *LONG) == 0
    before = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "checkpoints" / f"step_{steps(tmp_path / 'run')[0]:08d}" / "model.safetensors").write_bytes(b"")
    assert run(tmp_path / "run", *LONG, "--resume", "true", "--resume-from", "best") == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert run(tmp_path / "run", *LONG, "--resume", "true") == 0
    assert "keeps the model that it holds" in caplog.text
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


@each(
    ("options", "said"),
    [
        (["--patience", "2"], "patience 2 needs a metric"),
        (["--resume-from", "best"], "resume_from 'best' needs resume true"),
        (["--keep-best", "top5"], "keep_best must be one of accuracy, loss, f1"),
        (["--keep-best", "f1", "--patience", "0"], "patience must be at least 1"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert run(tmp_path / "run", *options) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------- all of it, killed, and in several processes

ALL = ["--epochs", "3", "--tune", "stages:2", "--optim.layer-decay", "0.7", "--optim.head-lr-scale", "3"]
ALL += ["--keep-best", "f1", "--patience", "2", "--optim.ema-decay", "0.9", "--optim.warmup-epochs", "0"]
ALL += ["--drop-rate", "0.2", "--stochastic-depth", "0.2"]
RATES = {"sgd": "0.3", "adamw": "0.001"}
# Fifteen float32 steps with sums in another order; AdamW divides by the gradient's own size, so that a difference in a
# gradient that is nearly zero counts as much as any.
PROCESSES_TOLERANCE = {"sgd": 1e-5, "adamw": 1e-3}


def everything(name: str) -> list[str]:
    return [*ALL, "--optim.name", name, "--optim.lr", RATES[name]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_in_two_processes(tmp_path: Path) -> None:
    for name in RATES:
        whole, killed = tmp_path / f"{name}-whole", tmp_path / f"{name}-killed"
        assert run(whole, *everything(name)) == 0
        # SIGKILL within the second epoch.
        command = [sys.executable, "-m", "nfzoo.train", *QUICK, *everything(name), "--output", str(killed)]
        with subprocess.Popen([*command, "--save-steps", "1"], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while not (killed / "checkpoints" / "step_00000006").exists() and process.poll() is None:
                time.sleep(0.001)
            process.kill()
        assert process.returncode == -signal.SIGKILL, name
        assert run(killed, *everything(name), "--resume", "true") == 0
        assert same(killed, whole), name
        assert figures(killed) == figures(whole), name
    # Two processes, with whole parameters and with shards.
    commands = []
    for name in RATES:
        common = [*QUICK, *everything(name), "--output"]
        commands += [[*common, str(tmp_path / f"{name}-two")]]
        commands += [[*common, str(tmp_path / f"{name}-shards"), "--sharding", "fsdp2"]]
    together(tmp_path, commands)
    start = nfzoo.create("nfnet-test", generator=torch.Generator().manual_seed(0)).state_dict()
    for name, tolerance in PROCESSES_TOLERANCE.items():
        whole, shards = tmp_path / f"{name}-whole", tmp_path / f"{name}-shards"
        wanted = load_file(whole / "model.safetensors")
        assert max(float((wanted[key] - start[key]).abs().max()) for key in wanted) > 10 * tolerance
        for folder in (tmp_path / f"{name}-two", shards):
            found = load_file(folder / "model.safetensors")
            for key, value in wanted.items():
                if key.startswith(("stem.", "stages.0.", "stages.1.")):
                    assert torch.equal(found[key], start[key]), key
                assert (found[key] - value).abs().max() < tolerance, (folder, key)
            for row, other in zip(figures(folder), figures(whole), strict=True):
                assert row == pytest.approx(other, rel=1e-3), folder
        # The best of the shards goes on in one process.
        best = (nfzoo.from_pretrained(shards).provenance or {})["step"]
        assert best in steps(shards)
        assert run(shards, *everything(name), "--resume", "true", "--resume-from", "best") == 0
        found = load_file(shards / "model.safetensors")
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < tolerance


def figures(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows(folder)]
