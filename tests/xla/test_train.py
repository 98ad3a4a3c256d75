"""The training program on XLA: it learns the digits as on the CPU, and stops, resumes and saves as there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nfzoo
from nfzoo.data.source import open_split
from tests.support.helpers import relative

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--model", "nfnet-test", "--data", "digits", "--epochs", "2", "--batch_size", "142", "--workers", "1"]
LOSS = 1e-3  # of losses around 2: twenty steps in float32, summed in another order
PARAMETER = 1e-2  # relative, for the same reason; training from other weights would give 1

pytestmark = pytest.mark.slow


def start(output: Path, *options: str, device: str = "xla") -> subprocess.Popen[str]:
    switches = {"PJRT_DEVICE": "CPU"} if device == "xla" else {"USE_TORCH_XLA": "0", "ACCELERATE_USE_CPU": "true"}
    env = {k: v for k, v in os.environ.items() if k not in ("PJRT_DEVICE", "USE_TORCH_XLA")} | switches
    command = [sys.executable, "-m", "nfzoo.train", *OPTIONS, "--output", str(output), *options]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = process.communicate(timeout=1500)
    assert process.returncode == status, err
    return out


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs without interruption, on XLA."""
    output = tmp_path_factory.mktemp("xla") / "run"
    assert "on xla" in finished(start(output))
    return output


def test_the_losses_of_the_cpu(trained: Path, tmp_path: Path) -> None:
    assert "on cpu" in finished(start(tmp_path / "cpu", device="cpu"))
    for found, expected in zip(rows(trained), rows(tmp_path / "cpu"), strict=True):
        for name in ("train_loss", "loss", "ema_loss"):
            assert found[name] == pytest.approx(expected[name], abs=LOSS), name
        assert found["step"] == expected["step"]
    weights, expected_weights = (load_file(f / "model.safetensors") for f in (trained, tmp_path / "cpu"))
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert weights[name].dtype == torch.float32
        assert relative(weights[name], value) < PARAMETER or value.norm() < LOSS, name


def test_it_is_a_model_like_any(trained: Path) -> None:
    model = nfzoo.from_pretrained(trained)
    assert model.labels == tuple("0123456789")
    held_out = open_split("digits").validation
    with torch.no_grad():
        logits = model(torch.stack([model.preprocess(held_out[i][0]) for i in range(len(held_out))]))
    accuracy = (logits.argmax(1) == torch.tensor(held_out.labels)).float().mean()
    assert accuracy == pytest.approx(rows(trained)[-1]["ema_accuracy"], abs=0.01)  # three images that stand on edge


def test_stopped_and_resumed(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(output, "--save_steps", "3")
    deadline = time.monotonic() + 1200
    while not (output / "checkpoints" / "step_00000003").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    finished(process, 128 + signal.SIGTERM)
    assert not (output / "model.safetensors").exists()
    assert "step" in finished(start(output, "--resume", "true"))
    for found, expected in zip(rows(output), rows(trained), strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=LOSS)
        assert found["ema_loss"] == pytest.approx(expected["ema_loss"], abs=LOSS)
