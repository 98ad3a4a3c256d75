"""Write files in a thread, so that training goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

Write = Callable[[], object]


class BackgroundWriter:
    """Run writes one after another in one thread.

    A process that ends waits for them. After one has failed, the later ones are left out.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nfzoo-writer")
        self._writes: list[Future[object]] = []
        self._failed = threading.Event()

    def submit(self, write: Write) -> None:
        """Let the thread call `write` after all that were submitted before."""
        self._writes.append(self._pool.submit(self._run, write))

    def failed(self) -> bool:
        """Return whether a write has failed so far, without waiting for any."""
        return self._failed.is_set()

    def join(self) -> None:
        """Wait until every write has ended, well or not."""
        for write in self._writes:
            write.exception()

    def result(self) -> None:
        """Wait as `join` does, forget the writes, and raise the error of the first that failed."""
        self.join()
        writes, self._writes = self._writes, []
        self._failed.clear()
        for write in writes:
            write.result()

    def _run(self, write: Write) -> None:
        if self._failed.is_set():
            return
        try:
            write()
        except BaseException:
            self._failed.set()
            raise
