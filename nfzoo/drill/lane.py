"""Run trainings in forked processes: `python -m nfzoo.drill.lane PARENT`, which reads jobs from standard input.

Forking spares each run the imports: what one run has imported, this process imports before it forks the next. It must
start no thread, as threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from nfzoo.drill.shim import Fault, arm, preloaded

CRASHED = 70
"""Exit status of a run that ended in an error which it does not know."""


@dataclass(frozen=True)
class Job:
    """A training, and what happens to it.

    Args:
        arguments: of `nfzoo train`.
        watched: the folder below which calls are counted, and fail.
        output: a path without suffix for what the first process prints: `.out`, `.err`.
        processes: how many train together.
        fault: what happens in one process, and at which of its calls.
        struck: the number of that process.
        log: a file for the calls of all processes.
        kill_after: seconds until SIGKILL to all processes.
        pause_after: seconds until SIGSTOP to the last process, which goes on a second later.
        timeout: seconds until the run counts as hung. Shortly before, each process prints what its threads are doing.
    """

    arguments: Sequence[str]
    watched: str
    output: str
    processes: int = 1
    fault: Fault = field(default_factory=Fault)
    struck: int = 0
    log: str | None = None
    kill_after: float | None = None
    pause_after: float | None = None
    timeout: float = 120


@dataclass(frozen=True)
class Ended:
    """Tell how a run ended.

    Attributes:
        status: exit status of the first process, negative after a signal; `None` if the run hung.
        seconds: how long it took.
        printed: what the first process printed.
        errors: what all processes printed as errors, the first process last.
    """

    status: int | None
    seconds: float
    printed: str
    errors: str


class Lane:
    """A process that runs one job after another.

    Args:
        library: the library of `shim.build`, or `None` for runs without faults in system calls.
    """

    def __init__(self, library: Path | None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        if library is not None:
            environment |= preloaded(library)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nfzoo.drill.lane", str(os.getpid())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that Ctrl-C ends the drill, which ends this process and its runs
        )

    def run(self, job: Job) -> Ended:
        """Run a job to its end.

        Raises:
            ChildProcessError: if this process ends before, as one may that the system kills to free memory.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(asdict(job)), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise ChildProcessError(f"the process that starts the trainings {how}; try fewer --workers")
        answer = json.loads(line)
        errors = [_printed(job, rank, ".err").read_text(errors="replace") for rank in range(job.processes)]
        return Ended(
            answer["status"],
            answer["seconds"],
            _printed(job, 0, ".out").read_text(errors="replace"),
            "".join(reversed(errors)),
        )

    def end(self) -> None:
        """End the process and its runs; a `run` of another thread then raises an error."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the process, and close what leads to it."""
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a job that it did not read
                pipe.close()


def _printed(job: Job, rank: int, suffix: str) -> Path:
    return Path(f"{job.output}-{rank}{suffix}" if rank else job.output + suffix)


def main() -> None:
    """Run the jobs of standard input, one in each line; answer each with a line."""
    drill = int(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        job["fault"] = Fault(*job["fault"])
        print(json.dumps(_run(Job(**job), drill)), flush=True)


def _run(job: Job, drill: int) -> dict[str, Any]:
    if job.log is not None:
        Path(job.log).write_bytes(b"")
    with tempfile.TemporaryFile("w+") as imported:
        ended = _watch(job, imported, drill)
        imported.seek(0)
        for name in imported.read().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return ended


def _watch(job: Job, imported: IO[str], drill: int) -> dict[str, Any]:
    start, port = time.monotonic(), _free_port()
    children = [_fork(job, rank, port, imported) for rank in range(job.processes)]
    running, status, paused = set(children), None, False
    while running:
        pid, how = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            code = os.waitstatus_to_exitcode(how)
            if pid == children[0]:
                status = code
            if code == -signal.SIGKILL:  # as a machine that is lost takes all its processes with it
                _send(running, signal.SIGKILL)
            continue
        if os.getppid() != drill:  # which was killed, and waits for no answer
            os.killpg(0, signal.SIGKILL)
        elapsed = time.monotonic() - start
        if elapsed > job.timeout or (job.kill_after is not None and elapsed > job.kill_after):
            _send(running, signal.SIGKILL)
            for pid in running:
                os.waitpid(pid, 0)
            status = None if elapsed > job.timeout else -signal.SIGKILL
            break
        if job.pause_after is not None and elapsed > job.pause_after and not paused:
            paused = True
            _send({children[-1]} & running, signal.SIGSTOP)
            time.sleep(1)
            _send({children[-1]} & running, signal.SIGCONT)
        time.sleep(0.002)
    return {"status": status, "seconds": time.monotonic() - start}


def _send(processes: set[int], number: int) -> None:
    for process in processes:
        os.kill(process, number)


def _fork(job: Job, rank: int, port: int, imported: IO[str]) -> int:
    """Start a process of a job; the first writes the names of the modules that it has imported."""
    pid = os.fork()
    if pid:
        return pid
    status, known = CRASHED, set(sys.modules)
    try:
        for descriptor, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(_printed(job, rank, suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.dump_traceback_later(0.95 * job.timeout, file=2)  # of a run that hangs
        if job.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(job.processes), "LOCAL_WORLD_SIZE": str(job.processes)}
            os.environ |= {"MASTER_PORT": str(port)}
        fault = job.fault if rank == job.struck else Fault()
        if job.log is not None or fault != Fault():
            log = -1 if job.log is None else os.open(job.log, os.O_WRONLY | os.O_APPEND)
            arm(Path(job.watched), fault, log, rank)
        from nfzoo.train.run import main as train

        status = train(list(job.arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        if rank == 0:
            imported.write("\n".join(name for name in sys.modules if name not in known))
            imported.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
