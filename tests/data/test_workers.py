"""Loader processes that die, hang and lie: the batches are the same, and nothing is left behind."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from nfzoo.data import workers
from nfzoo.errors import LostError
from tests.support.loops import each

BATCHES = [range(k, k + 4) for k in range(0, 48, 4)]
EXPECTED = [[10 * i for i in batch] for batch in BATCHES]


class Squares(Dataset):
    """Ten times each index; in a loader process `fault` is called before, with the index."""

    def __init__(self, fault: Callable[[int], object] = lambda _: None) -> None:
        self.fault = fault

    def __getitem__(self, index: int) -> int:
        if get_worker_info() is not None:
            self.fault(index)
        return 10 * index


def loaded(fault: Callable[[int], object] = lambda _: None, count: int = 2, **options: float) -> Iterator[list[int]]:
    batches = workers.load(Squares(fault), iter(BATCHES), torch.tensor, count, **options)
    return (batch.tolist() for batch in batches)


def at(folder: Path, *indices: int, fault: Callable[[], object], times: int = 1) -> Callable[[int], object]:
    """Call `fault` the first `times` that one of these indices is read, in whichever process that is."""

    def injected(index: int) -> None:
        for k in range(times):
            path = folder / f"{index}.{k}"
            if index in indices and not path.exists():
                path.touch()
                fault()
                return

    return injected


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look at the processes often, and let none outlive a test, nor a handler that raises their deaths."""
    monkeypatch.setattr(workers, "_POLL", 0.1)
    monkeypatch.setattr(workers, "_GOODBYE", 1.0)
    yield
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_the_number_of_processes_changes_nothing() -> None:
    for count in (0, 1, 2):
        assert list(loaded(count=count)) == EXPECTED


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@each(
    ("fault", "said"),
    [
        (kill, "was ended by signal 9"),
        (lambda: os._exit(3), "ended with status 3"),
        (lambda: time.sleep(60), "returned nothing for 1 s"),
        (stop, "returned nothing for 1 s"),
    ],
)
def test_another_process_takes_the_place_of_one_that_gave_out(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, fault: Callable[[], object], said: str
) -> None:
    caplog.clear()
    folder = tmp_path_factory.mktemp("faults")
    assert list(loaded(at(folder, 1, 21, fault=fault), patience=1)) == EXPECTED
    said_twice = [record.message for record in caplog.records]  # one line for each fault
    assert len(said_twice) == 2
    assert all(said in line for line in said_twice), said_twice


def test_a_process_that_lies_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = workers._Batches.__getitem__

    def lying(self: workers._Batches, indices: range) -> tuple[torch.Tensor, object]:
        if indices[0] == 20 and not (tmp_path / "lied").exists():
            (tmp_path / "lied").touch()
            indices = range(1, 5)
        return honest(self, indices)

    monkeypatch.setattr(workers._Batches, "__getitem__", lying)
    assert list(loaded()) == EXPECTED
    assert [record.message for record in caplog.records] == [
        "a loader process returned other images than it was asked for; new ones go on from the same batch"
    ]


def test_what_fails_for_good_ends_in_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LostError, match="ended by signal 9, the 4th time in a row; take fewer --workers"):
        list(loaded(at(tmp_path, 1, fault=kill, times=9)))
    assert len(caplog.records) == 3


def test_deaths_with_batches_between_them_are_not_counted_together(tmp_path: Path) -> None:
    assert list(loaded(at(tmp_path, *range(0, 48, 4), fault=kill), count=1)) == EXPECTED


def test_the_death_of_a_process_raises_nothing_in_the_midst_of_other_work(tmp_path: Path) -> None:
    """Torch's handler of SIGCHLD would raise within the sleep."""
    batches = loaded(at(tmp_path, 9, fault=kill))
    assert next(batches) == EXPECTED[0]
    for _ in range(20):
        time.sleep(0.05)
    assert list(batches) == EXPECTED[1:]


def test_errors_of_the_samples_are_raised_at_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(index: int) -> None:
        if index == 5:
            raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        list(loaded(fail))
    assert not caplog.records


def test_a_process_that_is_stopped_while_batches_of_it_are_under_way(tmp_path: Path) -> None:
    """Their pixels lie in memory that this process has to ask the stopped one for."""
    batches = loaded(at(tmp_path, 17, fault=lambda: (time.sleep(0.3), stop())), patience=1)
    assert next(batches) == EXPECTED[0]
    time.sleep(0.8)
    assert list(batches) == EXPECTED[1:]


def test_a_loader_that_is_not_read_to_its_end_leaves_no_process(tmp_path: Path) -> None:
    batches = workers.load(Squares(at(tmp_path, 21, fault=stop)), BATCHES, torch.tensor, 2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]


def test_in_a_thread_as_well(tmp_path: Path) -> None:
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.extend(loaded(at(tmp_path, 21, fault=kill))))
    thread.start()
    thread.join(60)
    assert found == EXPECTED


def test_the_runs_random_numbers_are_not_touched(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    list(loaded(at(tmp_path, 21, fault=kill)))
    assert torch.equal(torch.get_rng_state(), state)
