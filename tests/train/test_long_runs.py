"""Two thousand steps under faults: the same weights, and neither memory nor open files grow."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nfzoo.data import workers
from nfzoo.train import run as train
from nfzoo.train import trainer

OPTIONS = ["--model", "nfnet-test", "--data", "digits", "--epochs", "6", "--batch-size", "4"]
OPTIONS += ["--train-size", "16", "--test-size", "16", "--optim.ema-decay", "null", "--worker-timeout", "2"]
STEPS = 6 * 359
# What the allocators of torch and Python keep differs from step to step by some megabytes.
MEGABYTES = 100
HANDLES = 10
FAULTS = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is stuck": lambda: time.sleep(600),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "is slow": lambda: time.sleep(0.2),
    "lies": lambda: None,
}


@pytest.mark.long
def test_two_thousand_steps_under_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, step = workers._Batches.__getitem__, trainer.Trainer.train_step
    main, flags = os.getpid(), tmp_path / "faults"
    flags.mkdir()
    process, seen = psutil.Process(), []

    def faulty(self: workers._Batches, indices: list[int]) -> tuple[torch.Tensor, object]:
        """Read a batch; one in 100 of them meets one of the faults, once."""
        key = sum(indices)
        flag, names = flags / str(key), list(FAULTS)
        if os.getpid() != main and key % 100 == 0 and not flag.exists():
            name = names[key // 100 % len(names)]
            flag.write_text(name)
            FAULTS[name]()
            if name == "lies":
                indices = indices[::-1]
        return read(self, indices)

    def watched(self: trainer.Trainer, parts: list) -> None:
        step(self, parts)
        if self.step % 20 == 0:
            seen.append((process.memory_info().rss >> 20, process.num_fds(), threading.active_count()))

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_POLL", 0.2)
        patch.setattr(workers, "_GOODBYE", 1.0)
        patch.setattr(workers._Batches, "__getitem__", faulty)
        patch.setattr(trainer.Trainer, "train_step", watched)
        assert train.main([*OPTIONS, "--output", str(tmp_path / "disturbed"), "--workers", "2"]) == 0
    assert len(seen) == STEPS // 20
    early, late = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for k, (name, bound) in enumerate({"megabytes": MEGABYTES, "handles": HANDLES, "threads": HANDLES}.items()):
        before, after = (max(row[k] for row in rows) for rows in (early, late))
        assert after <= before + bound, f"{name}: {before}, then {after}"
    met = [flag.read_text() for flag in flags.iterdir()]
    assert set(met) == set(FAULTS)
    assert len([r for r in caplog.records if "new ones go on" in r.message]) >= len(met) - met.count("is slow") - 5

    assert train.main([*OPTIONS, "--output", str(tmp_path / "whole"), "--workers", "0"]) == 0
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("disturbed", "whole"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
