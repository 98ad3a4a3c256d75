"""A batch is divided into the fewest parts that fit into the free memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import nfzoo
from benchmarks.timing import saved_bytes
from nfzoo.model import apply
from nfzoo.optim.fine_tuning import freeze_
from nfzoo.train import memory
from nfzoo.train.config import OptimConfig, TrainConfig
from nfzoo.train.run import main
from tests.support.pictures import few_digits

CPU = torch.device("cpu")
CFG = nfzoo.variant("nfnet-test").config


def run(**options: object) -> TrainConfig:
    return TrainConfig(model="nfnet-test", data="digits", output="out", batch_size=24, **options)  # type: ignore[arg-type]


def kept_on_a_cpu(model: nfzoo.NFNet, images: int) -> int:
    """Bytes of all tensors that autograd packs in a real pass."""
    params = dict(model.named_parameters())
    return saved_bytes(lambda: apply(model.config, params, torch.randn(images, 3, 32, 32)), list(params.values()))


@pytest.mark.parametrize("tune", ["all", "stages:1", "head"])
def test_an_image_keeps_what_autograd_keeps_on_a_cpu(tune: str) -> None:
    model = nfzoo.create("nfnet-test")
    freeze_(model, tune)
    real = (kept_on_a_cpu(model, 5) - kept_on_a_cpu(model, 1)) / 4
    assert memory.kept_bytes(CFG, 32, tune) == pytest.approx(real, rel=0.05)


def test_larger_images_keep_more_and_frozen_parts_nothing() -> None:
    assert 3.5 < memory.kept_bytes(CFG, 64) / memory.kept_bytes(CFG, 32) < 4.5
    parts = [memory.kept_bytes(CFG, 32, tune) for tune in ("head", "stages:1", "stages:2", "all")]
    assert parts == sorted(parts)
    assert parts[0] < parts[-1] / 100


@pytest.mark.parametrize(
    ("images", "options", "processes", "parts"),
    [
        (24, {}, 1, 1),
        (23, {}, 1, 2),
        (11, {}, 1, 3),
        (1, {}, 1, 24),
        (11, {}, 2, 2),
        (0, {}, 1, 24),  # not even one: the run may still go well
        (0, {"accumulation": 3}, 1, 3),
        (0, {"activation_checkpointing": True}, 1, 1),
        (1, {"augment": {"mixup": 0.2}}, 1, 12),
    ],
)
def test_as_few_parts_as_fit(
    monkeypatch: pytest.MonkeyPatch, images: int, options: dict[str, object], processes: int, parts: int
) -> None:
    config = run(**options)
    each, fixed = memory.step_bytes(CFG, config, 32)
    monkeypatch.setattr(memory, "free_bytes", lambda _: round((images * each + fixed + 1) / memory.USABLE))
    found, line = memory.divided(config, CFG, 32, processes=processes, device=CPU)
    assert found.accumulation == parts
    assert (line is not None) == (parts > 1 and "accumulation" not in options)


def test_half_precision_and_optimizers_count() -> None:
    each, fixed = memory.step_bytes(CFG, run(mixed_precision="no"), 32)
    assert memory.step_bytes(CFG, run(mixed_precision="bf16"), 32) == (each // 2, fixed)
    parameters = 4 * sum(p.numel() for p in nfzoo.create("nfnet-test").parameters())
    without = run(mixed_precision="no", optim=OptimConfig(ema_decay=None))
    assert memory.step_bytes(CFG, without, 32) == (each, fixed - parameters)
    adamw = run(mixed_precision="no", optim=OptimConfig(name="adamw"))
    assert memory.step_bytes(CFG, adamw, 32) == (each, fixed + parameters)


def test_a_control_group_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("3000\n")
    (tmp_path / "now").write_text("1000\n")
    monkeypatch.setattr(memory, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "now")),))
    assert memory.free_bytes(CPU) == 2000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_bytes(CPU) == 1000
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    (tmp_path / "max").write_text("max\n")
    assert (memory.free_bytes(CPU) or 0) > 2000
    assert memory.free_bytes(torch.device("meta")) is None


def test_a_run_says_its_parts_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "nfnet-test", "--data", few_digits(), "--batch-size", "24", "--train-size", "16"]
    options += ["--test-size", "16", "--workers", "0", "--epochs", "1", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 20)
    assert main(options) == 0
    assert "accumulation 24, as 24 images at once need about 0.0 GiB" in capsys.readouterr().out
    state = next((tmp_path / "run" / "checkpoints").glob("*/state.json"))
    assert json.loads(state.read_text())["config"]["accumulation"] == 24
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 40)
    assert main([*options, "--epochs", "2", "--resume", "true"]) == 0  # to the same bits as without an interruption
    newest = max((tmp_path / "run" / "checkpoints").glob("*/state.json"))
    assert json.loads(newest.read_text())["config"]["accumulation"] == 24


def test_the_estimate_does_not_need_the_memory() -> None:
    assert memory.step_bytes(nfzoo.variant("nfnet-f0").config, run(mixed_precision="no"), 256)[0] > 1 << 27
