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
