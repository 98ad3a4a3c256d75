"""Run functions and training command lines in groups of processes: see `tests/runtime/test_distributed.py`.

A process that is started anew imports torch for seconds. These are forked from one that has imported it, and has done
nothing else: a process that has computed gradients cannot fork one that does.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.support.training_imports"])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def in_processes(
    function: Callable[..., object], arguments: Sequence[Any], world: int, folder: Path, timeout: float
) -> None:
    """Call `function(rank, *arguments)` in as many processes; raise an error with what they printed if one fails."""
    files = [folder / f"printed-{rank}.txt" for rank in range(world)]
    started = [
        FORKSERVER.Process(target=_call, args=(function, rank, tuple(arguments), dict(os.environ), files[rank]))
        for rank in range(world)
    ]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(timeout)
    finally:
        for process in started:
            process.kill()
            process.join()
    printed = "\n".join(file.read_text(errors="replace") for file in files if file.exists())
    assert [process.exitcode for process in started] == [0] * world, printed


def _call(
    function: Callable[..., object], rank: int, arguments: tuple[Any, ...], environment: Mapping[str, str], file: Path
) -> None:
    os.environ.clear()  # the first process has that of its start
    os.environ.update(environment)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        function(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def together(folder: Path, runs: Sequence[Sequence[str]], *, world: int = 2, timeout: float = 400) -> None:
    """Run `nfzoo train` with each of these arguments in `world` processes on the CPU; all must succeed."""
    in_processes(_train, (world, free_ports(len(runs)), [list(run) for run in runs]), world, folder, timeout)


def _train(rank: int, world: int, ports: Sequence[int], runs: Sequence[list[str]]) -> None:
    from accelerate.state import AcceleratorState

    from nfzoo.train import run as train

    os.chdir(ROOT)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for port, argv in zip(ports, runs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        status = train.main(argv)
        assert status == 0, status
        AcceleratorState._reset_state(reset_partial_state=True)
