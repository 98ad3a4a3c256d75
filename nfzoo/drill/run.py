"""Drill: train on the digits under faults, and tell whether each run ended with the very same weights.

`nfzoo drill` kills trainings at system calls of a save and at random moments, fills the disk, makes it read-only, cuts
the power, damages files, stops processes and sets the clock back, on the disk that is named. After each fault the run
is resumed. It survived if it went on from the newest checkpoint that had been saved. Exit status: 0 if all survived
with the same bits, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import random
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nfzoo.data.digits import DIGITS
from nfzoo.data.source import open_all
from nfzoo.drill.lane import Lane
from nfzoo.drill.shim import NoLibraryError, build
from nfzoo.drill.trials import PROCESSES, Drill, Trial, Verdict
from nfzoo.errors import ConfigError, Stopped, TrainingError
from nfzoo.runtime import program

logger = logging.getLogger("nfzoo")

TRIALS = 200
_IMAGES_OF_EACH_CLASS = 8


def drill(
    folder: Path,
    *,
    trials: int = TRIALS,
    processes: int = 1,
    sharding: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    report: Callable[[Verdict], object] = lambda verdict: None,
) -> list[Verdict]:
    """Try faults on runs in `folder`, and return what became of each.

    Args:
        folder: an empty folder on the disk that is tried. Runs that did not survive stay in it.
        trials: number of faults.
        processes: how many train together.
        sharding: as of `nfzoo train`.
        seed: of the choice of faults.
        workers: runs at a time; by default the number of processors divided by `processes`.
        report: is called with each verdict at once, by several threads.

    Raises:
        TrainingError: if training fails without a fault.
    """
    folder = folder.resolve()
    with ExitStack() as stack:
        tools = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nfzoo-drill-")))
        _write_digits(tools / "digits")
        library = _library(tools)
        kind = Drill(folder, tools / "digits", processes=processes, sharding=sharding)
        count = workers or max(1, (os.cpu_count() or 1) // processes)
        lanes: queue.Queue[Lane] = queue.Queue()
        started = []
        for _ in range(min(count, trials)):
            started.append(lane := Lane(library))
            stack.callback(lane.close)
            lanes.put(lane)
        first = lanes.get()
        try:
            reference = kind.reference(first, record=library is not None)
        except RuntimeError as error:
            raise TrainingError(f"{error}; {folder} holds the run") from error
        lanes.put(first)
        plan = kind.trials(reference, trials, random.Random(seed))
        with (
            ThreadPoolExecutor(count) as pool,
            tqdm(total=len(plan), desc="drill", unit=" faults", disable=None) as bar,
        ):

            def run(job: tuple[int, Trial]) -> Verdict:
                lane = lanes.get()
                try:
                    verdict = kind.run(lane, job[1], f"trial-{job[0]:03}", reference)
                    report(verdict)
                    return verdict
                finally:
                    lanes.put(lane)
                    bar.update()

            try:
                return list(pool.map(run, enumerate(plan)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for lane in started:  # for whose runs the pool would wait
                    lane.end()
                raise


def _library(folder: Path) -> Path | None:
    try:
        return build(folder)
    except NoLibraryError as error:
        logger.warning("no faults in system calls are tried, and no losses of power: %s", error)
        return None


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the counts of each fault as lines of text, and what went wrong below them."""
    rows = [("fault", "tried", "survived", "bit-identical")]
    for fault in dict.fromkeys(verdict.fault for verdict in verdicts):
        rows.append(_row(fault, [verdict for verdict in verdicts if verdict.fault == fault]))
    rows.append(_row("all", verdicts))
    wide = max(len(row[0]) for row in rows)
    lines = [f"{name:<{wide}}  {tried:>5}  {survived:>8}  {same:>13}" for name, tried, survived, same in rows]
    bad = Counter(
        f"{verdict.fault}: {verdict.problem or 'it ended with other weights or figures'}"
        for verdict in verdicts
        if verdict.problem or not verdict.identical
    )
    return "\n".join([*lines, *(f"{times} x {what}" for what, times in bad.items())])


def _row(name: str, verdicts: Sequence[Verdict]) -> tuple[str, str, str, str]:
    survived, same = sum(not v.problem for v in verdicts), sum(v.identical for v in verdicts)
    return name, str(len(verdicts)), str(survived), str(same)


def _write_digits(folder: Path) -> None:
    digits = open_all(DIGITS)
    for label, name in enumerate(digits.classes):
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(digits.labels == label)[:_IMAGES_OF_EACH_CLASS]:
            digits[int(i)][0].save(folder / name / f"{i:04}.png")


def main(argv: list[str] | None = None) -> int:
    """Run the `nfzoo drill` command and return its exit status."""
    return program.run_parsed(_parser(), argv, _main)


def _parser() -> program.Parser:
    parser = program.Parser(prog="nfzoo drill", description=__doc__)
    parser.add_argument(
        "--trials", type=program.positive_int, default=TRIALS, help="number of faults (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, choices=PROCESSES, default=1, help="how many train together (default: 1)"
    )
    parser.add_argument("--sharding", choices=["fsdp2"], help="how they share the parameters; needs --processes")
    parser.add_argument("--folder", default=".", help="where to train, on the disk to be tried (default: here)")
    parser.add_argument("--seed", type=program.nonnegative_int, default=0, help="of the choice of faults (default: 0)")
    parser.add_argument("--workers", type=program.positive_int, help="runs at a time (default: one for each processor)")
    program.add_output_options(parser, word_is_file=True)
    return parser


def _main(options: argparse.Namespace) -> int:
    if options.sharding is not None and options.processes < 2:
        raise ConfigError("--sharding fsdp2 needs several processes: pass --processes 2")
    parent = Path(options.folder)
    program.check_writable(parent, folder=True)
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="nfzoo-drill-", dir=parent))
    so_far: list[Verdict] = []
    try:
        with _ended_by_signals():
            verdicts = drill(
                folder,
                trials=options.trials,
                processes=options.processes,
                sharding=options.sharding,
                seed=options.seed,
                workers=options.workers,
                report=so_far.append,
            )
    except Stopped as error:
        raise Stopped(f"{error} after {len(so_far)} faults{_kept(folder, so_far)}", error.number) from None
    except OSError:
        _kept(folder, so_far)
        raise
    text = table(verdicts)
    kept = _kept(folder, verdicts).removeprefix("; ")
    if kept:
        text += f"\n{kept}"
    program.write_result(options, {"verdicts": [verdict._asdict() for verdict in verdicts]}, text)
    return 1 if kept else 0


def _kept(folder: Path, verdicts: Sequence[Verdict]) -> str:
    """Remove the folder if all runs survived, or else return the end of a sentence that names it."""
    if any(verdict.problem or not verdict.identical for verdict in verdicts):
        return f"; {folder} holds the runs that did not survive"
    while folder.exists():  # the last of the runs may be still about to end
        shutil.rmtree(folder, ignore_errors=True)
    return ""


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block at SIGTERM, SIGHUP or Ctrl-C, so that its processes and folders are removed."""

    def stop(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(f"stopped by {signal.Signals(number).name}", number)

    main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if main_thread else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
