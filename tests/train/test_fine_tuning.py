"""Fine-tuning runs: what is frozen, rates by depth, the best epoch, and that all of it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nfzoo
from nfzoo.train import run as train
from tests.support.loops import each
from tests.support.pictures import few_digits

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


def test_more_stages_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--tune", "stages:5") == 2
    assert "more than the 4 stages of the network; pass stages:4 or less" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
