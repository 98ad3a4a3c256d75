"""Items become batches, and each gets its own answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from nfzoo.serve.batcher import Batcher

SOON = 20.0  # seconds, after which a test has failed


class Slow:
    """Squares numbers once it may; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.begun.release()
        assert self.go.wait(SOON)
        if 13 in items:
            raise MemoryError("thirteen")
        return [ValueError("negative") if i < 0 else i * i for i in items]


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.go.set()


def test_what_arrives_during_a_computation_is_the_next_batch(slow: Slow) -> None:
    seen: list[int] = []
    batcher = Batcher(slow, size=3, wait=0, observe=lambda n, seconds: seen.append(n))
    first = batcher.submit(1)
    assert slow.begun.acquire(timeout=SOON)
    others = [batcher.submit(i) for i in (2, -3, 4, 5, 6)]
    others[3].cancel()
    slow.go.set()
    assert first.result(SOON) == 1
    assert [others[i].result(SOON) for i in (0, 2, 4)] == [4, 16, 36]
    with pytest.raises(ValueError, match="negative"):
        others[1].result(SOON)
    batcher.close()
    assert slow.batches == [[1], [2, -3, 4], [6]]
    assert seen == [1, 3, 1]
    assert not batcher.alive


def test_a_batch_waits_for_others(slow: Slow) -> None:
    slow.go.set()
    batcher = Batcher(slow, size=2, wait=SOON)
    first = batcher.submit(1)
    assert not slow.begun.acquire(timeout=0.05)
    second = batcher.submit(2)
    assert (first.result(SOON), second.result(SOON)) == (1, 4)
    last = batcher.submit(3)
    batcher.close()  # waits for no more
    assert last.result(0) == 9
    assert slow.batches == [[1, 2], [3]]


def test_a_failure_is_that_of_its_batch_alone(slow: Slow) -> None:
    slow.go.set()
    batcher = Batcher(slow, size=2, wait=SOON)
    failed = [batcher.submit(13), batcher.submit(1)]
    for future in failed:
        with pytest.raises(MemoryError, match="thirteen"):
            future.result(SOON)
    assert [f.result(SOON) for f in (batcher.submit(2), batcher.submit(3))] == [4, 9]
    batcher.close()
