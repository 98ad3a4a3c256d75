"""Runs training command lines one after the other in every process of a group: see `tests/test_parallel.py`.

Starting a process takes seconds, so one start serves several runs. Each run has a port of its own to meet at.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def together(folder: Path, runs: Sequence[Sequence[str]], *, world: int = 2, timeout: float = 400) -> None:
    """Run `nfzoo train` with each of these arguments in `world` processes on the CPU; all must succeed."""
    plan = folder / "runs.json"
    plan.write_text(json.dumps([free_ports(len(runs)), [list(run) for run in runs]]))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(world)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes", str(plan)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, "\n".join(printed)


def main() -> int:
    from accelerate.state import AcceleratorState

    from nfzoo.train import run as train

    for port, argv in zip(*json.loads(Path(sys.argv[1]).read_text()), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        status = train.main(argv)
        if status:
            return status
        AcceleratorState._reset_state(reset_partial_state=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
