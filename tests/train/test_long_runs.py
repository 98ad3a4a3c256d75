"""Runs of minutes: two thousand steps under faults, and a machine that is lost and comes back."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nfzoo.data import workers
from nfzoo.train import run as train
from nfzoo.train import trainer
from tests.support.processes import ROOT, free_ports

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


@pytest.mark.long
def test_a_machine_is_lost_and_comes_back(tmp_path: Path) -> None:
    """Two launchers stand for two machines. The run ends with the weights of one that nothing disturbed."""
    output, printed, port = tmp_path / "run", tmp_path / "printed", free_ports(1)[0]
    options = ["--model", "nfnet-test", "--data", "digits", "--epochs", "8", "--batch-size", "32", "--workers", "0"]
    options += ["--train-size", "16", "--test-size", "16", "--save-steps", "10", "--drop-rate", "0.2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    command += ["--rdzv-conf", "last_call_timeout=20,keep_alive_interval=1", "--max-restarts", "3"]
    command += ["-m", "nfzoo.train", *options, "--output", str(output)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else torch does not tell the second machine where to meet

    def wait_for(condition: Callable[[], object]) -> None:
        start = time.monotonic()
        while not condition():
            assert time.monotonic() < start + 200, printed.read_text()
            time.sleep(0.1)

    with ExitStack() as stack:
        file = stack.enter_context(printed.open("w"))

        def machine() -> psutil.Popen:
            process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            stack.callback(lose, process)
            return process

        def lose(process: psutil.Popen) -> None:
            with suppress(psutil.NoSuchProcess):
                for each in (*process.children(recursive=True), process):
                    each.kill()
            process.wait()

        def holds_the_store() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        def trained_by(processes: int) -> int:
            return printed.read_text().count(f"; {processes} process(es)")

        first = machine()
        wait_for(holds_the_store)
        second = machine()
        wait_for(lambda: trained_by(2) == 1)
        saved = {*output.glob("checkpoints/step_*")}
        wait_for(lambda: {*output.glob("checkpoints/step_*")} - saved)
        alone = trained_by(1)
        lose(second)
        wait_for(lambda: trained_by(1) > alone)
        machine()
        wait_for(lambda: trained_by(2) == 2)
        assert first.wait(timeout=300) == 0, printed.read_text()
    assert train.main([*options, "--output", str(tmp_path / "whole")]) == 0
    found, wanted = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "whole"))
    # 360 float32 steps whose sums over two processes are added in another order.
    assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-3
