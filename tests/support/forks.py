"""Runs a command line in a group of forked processes: cheaper than starting them, which imports everything anew."""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from tests.support.processes import free_ports

FORK = multiprocessing.get_context("fork")


def run_in_group(
    main: Callable[[list[str]], int],
    arguments: Sequence[str],
    folder: Path,
    *,
    world: int = 2,
    use_cpu: str = "true",
    timeout: float = 300,
) -> list[tuple[int | None, str, str]]:
    """Return status, output and errors of each process; `folder` takes the files of the latter."""
    group = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": use_cpu}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "CUDA_VISIBLE_DEVICES": ""}
    files = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(world)]
    started = []
    for rank in range(world):
        variables = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(FORK.Process(target=_run, args=(main, list(arguments), variables, *files[rank])))
        started[-1].start()
    try:
        for process in started:
            process.join(timeout)
    finally:
        for process in started:
            process.kill()
    texts = [(out.read_text(), err.read_text()) for out, err in files]
    return [(process.exitcode, *text) for process, text in zip(started, texts, strict=True)]


def _run(
    main: Callable[[list[str]], int], arguments: list[str], variables: dict[str, str], out: Path, err: Path
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # a CUDA context does not survive the fork
    AcceleratorState._reset_state(reset_partial_state=True)
    with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
        logging.basicConfig(force=True)  # to that file, and not into pytest's records
        sys.exit(main(arguments))
