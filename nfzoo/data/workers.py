"""Load batches in worker processes that may die, hang or answer wrongly.

New processes then take their place and begin with the batch that is due. What a batch holds depends on its indices
alone, so that nothing changes but the time.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.connection
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nfzoo.errors import LostError

logger = logging.getLogger("nfzoo")

PATIENCE = 300.0
"""Seconds to wait for a batch before its process counts as stuck."""

_RESTARTS = 3  # in a row, without a batch between them
_POLL = 1.0  # seconds between two looks at processes that return nothing
_GOODBYE = 5.0  # seconds that they have to end by themselves


def load(
    samples: Dataset,
    batches: Iterable[Sequence[int]],
    collate: Callable[[list], Any],
    workers: int,
    *,
    patience: float = PATIENCE,
) -> Iterator[Any]:
    """Load batches of the given indices, in `workers` processes, or in this one without.

    Args:
        samples: what an index stands for, always the same.
        batches: the indices of each batch; may be endless.
        collate: makes a batch of a list of samples.
        workers: number of processes.
        patience: seconds after which a process that owes a batch is replaced.

    Raises:
        LostError: if new processes do not help either.
    """
    due: deque[Sequence[int]] = deque()  # batches that were asked for and have not come
    rest = iter(batches)

    def asked() -> Iterator[Sequence[int]]:
        yield from list(due)
        for indices in rest:
            due.append(indices)
            yield indices

    failures = 0
    while True:
        loader = DataLoader(
            _Batches(samples, collate),
            batch_size=None,
            sampler=asked(),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start,
            timeout=_POLL if workers else 0,
            generator=torch.Generator(),  # it draws a seed for each start, and not from the run's generator
        )
        with contextlib.closing(_answers(loader, patience)) as answers:
            try:
                for indices, batch in answers:
                    if indices.tolist() != list(due[0]):
                        raise _FailedError("a loader process returned other images than it was asked for")
                    due.popleft()
                    failures = 0
                    yield batch
                return
            except _FailedError as error:
                reason = str(error)
        failures += 1
        if failures > _RESTARTS:
            raise LostError(f"{reason}, the {failures}th time in a row; take fewer --workers, or 0 to do without")
        logger.warning("%s; new ones go on from the same batch", reason)


class _FailedError(Exception):
    """Says what is wrong with the processes of a loader."""


@dataclass
class _Batches(Dataset[tuple[Tensor, Any]]):
    """Batches, each with the indices that it was made of."""

    samples: Dataset
    collate: Callable[[list], Any]

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Any]:  # type: ignore[override]
        together = getattr(self.samples, "__getitems__", None)  # torch's name for samples that are loaded at once
        samples = [self.samples[i] for i in indices] if together is None else together(indices)
        return torch.tensor(indices, dtype=torch.int64), self.collate(samples)


def _as_it_is(batch: Any) -> Any:
    return batch


def _start(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the main one ends the others


def _answers(loader: DataLoader, patience: float) -> Generator[Any, None, None]:
    """Yield what a loader yields, and leave none of its processes behind.

    Raises:
        _FailedError: if one of them ended, or returned nothing for too long.
    """
    before = set(multiprocessing.active_children())
    held: list[Iterator[Any]] = []  # the one reference to torch's iterator
    watch = _Watch(patience)
    try:
        while True:
            try:
                with watch:
                    if not held:
                        with _no_errors_from_signals():
                            held.append(iter(loader))
                        watch.begin(set(multiprocessing.active_children()) - before)
                    answer = next(held[0])
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the last two as a process ends in the midst of a batch
                text = str(error)
                if not loader.num_workers or text.startswith("Caught "):  # an error of the samples
                    raise
            else:
                yield answer
                continue
            if "timed out" not in text:  # one that ended may still be ending
                gone = multiprocessing.connection.wait([process.sentinel for process in watch.processes], _GOODBYE)
                for process in watch.processes:
                    process.join(_GOODBYE if process.sentinel in gone else 0)
            ended = [process.exitcode for process in watch.processes if not process.is_alive()]
            if watch.killed.is_set():
                raise _FailedError(f"the loader processes returned nothing for {patience:g} s")
            if ended or "timed out" not in text:
                raise _FailedError(f"a loader process {_ending(ended[0]) if ended else f'failed ({text})'}")
    finally:
        watch.over.set()
        _dismiss(held, watch.processes)


class _Watch:
    """Kill processes that owe something for longer than `patience` seconds, from a thread.

    The main thread may itself wait without end for a process that is stopped, in the midst of a batch.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.processes: set[Any] = set()
        self.killed, self.over = threading.Event(), threading.Event()
        self._since: float | None = None  # something is owed

    def begin(self, processes: set[Any]) -> None:
        self.processes = processes
        if processes:
            threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> None:
        self._since = self._since or time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._since = None

    def _run(self) -> None:
        while not self.over.wait(_POLL):
            since = self._since
            if since is not None and time.monotonic() - since > self.patience:
                self.killed.set()
                for process in self.processes:
                    process.kill()
                return


def _ending(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


@contextlib.contextmanager
def _no_errors_from_signals() -> Iterator[None]:
    """Take back the handler of SIGCHLD that a loader installs in the block.

    It raises an error wherever the main thread is when a process of a loader dies, such as within an update.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if before is None or getattr(before, "__module__", "").startswith("torch.utils.data"):
        before = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _dismiss(held: list[Iterator[Any]], processes: Iterable[Any]) -> None:
    """Let a loader's processes end, and kill those that do not.

    Torch's iterator ends them when it is dropped. A process that was killed may hold a lock that this waits for, so
    that it is done in a thread, for which nothing waits in the end.
    """
    with contextlib.suppress(RuntimeError):  # no thread starts while the interpreter ends
        farewell = threading.Thread(target=held.clear, daemon=True)
        farewell.start()
        farewell.join(_GOODBYE)
        for process in processes:
            process.kill()
            process.join(_GOODBYE)
        farewell.join(_GOODBYE)
