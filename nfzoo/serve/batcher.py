"""Collect what arrives within milliseconds into batches, and compute them in one thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """A thread that computes the answers of items which others submit.

    A batch is computed once it has `size` items, or `wait` seconds after its first item was taken. Items that arrive
    during a computation wait for the next one. The queue has no bound: who submits counts.

    Args:
        compute: returns for each item of a batch its answer, or the exception that its future gets. An exception that
            it raises is that of all items.
        size: the most items of a batch.
        wait: seconds.
        observe: called with the number of items and the seconds of each batch that was computed.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Answer | Exception]],
        *,
        size: int,
        wait: float,
        observe: Callable[[int, float], None] = lambda items, seconds: None,
    ) -> None:
        self._compute, self._size, self._wait, self._observe = compute, size, wait, observe
        self._queue: queue.SimpleQueue[tuple[Item, Future[Answer]] | None] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="nfzoo-batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether items are still computed."""
        return self._thread.is_alive()

    def submit(self, item: Item) -> Future[Answer]:
        """Return the future answer. An item whose future is cancelled before its batch begins is left out."""
        future: Future[Answer] = Future()
        self._queue.put((item, future))
        return future

    def close(self) -> None:
        """Compute what was submitted, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            batch = [(item, future) for item, future in self._collect() if future.set_running_or_notify_cancel()]
            if batch:
                self._answer([item for item, _ in batch], [future for _, future in batch])

    def _collect(self) -> list[tuple[Item, Future[Answer]]]:
        batch: list[tuple[Item, Future[Answer]]] = []
        deadline = None
        while len(batch) < self._size:
            try:
                left = None if deadline is None else deadline - time.monotonic()
                found = self._queue.get() if left is None else self._queue.get(left > 0, max(left, 0))
            except queue.Empty:
                break
            if found is None:
                self._ended = True
                break
            if not found[1].cancelled():
                batch.append(found)
                deadline = deadline or time.monotonic() + self._wait
        return batch

    def _answer(self, items: list[Item], futures: list[Future[Answer]]) -> None:
        begun = time.perf_counter()
        try:
            answers = self._compute(items)
            self._observe(len(items), time.perf_counter() - begun)
            for future, answer in zip(futures, answers, strict=True):
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            for future in futures:
                if not future.done():
                    future.set_exception(error)
