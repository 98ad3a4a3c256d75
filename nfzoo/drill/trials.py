"""The faults of a drill, and what holds after each: the run goes on from the newest checkpoint to the same bits."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nfzoo.checkpoint.model_folder import WEIGHTS_FILE
from nfzoo.checkpoint.run_state import step_folder
from nfzoo.drill.lane import Ended, Job, Lane
from nfzoo.drill.power_cut import SHARES, Journal
from nfzoo.drill.shim import Action, Call, Fault, Operation, read_log
from nfzoo.train.run_folder import METRICS_FILE, STATES

PROCESSES = (1, 2, 4, 8)
"""Numbers of processes among which the batch divides."""

_STEP = re.compile(r"step_(\d+)")
_DAY = 86400


class Reference(NamedTuple):
    """The run that nothing disturbs, to which all others are compared."""

    watched: Path
    """Folder below which its calls were recorded."""
    ended: Ended
    outcome: str
    calls: Sequence[Call]
    """Empty without the library of `shim.build`."""
    journal: Journal

    def saves(self) -> tuple[int, int]:
        """Return the numbers of the first and the last call that save a model, then a checkpoint, and remove one."""
        steps = [call.number for call in self.calls if call.operation is Operation.RENAME and step_of(call.target)]
        return steps[1] + 1, next(
            c.number for c in self.calls if c.number > steps[2] and c.operation is Operation.RMDIR
        )


@dataclass(frozen=True)
class Trial:
    """One fault, named as in the table, and how it comes about.

    Args:
        break_: leaves a folder `run` in this empty folder, as the fault does; returns how the run ended, if one ran.
        expected: least step that the resumed run begins with.
    """

    fault: str
    break_: Callable[[Lane, Path], Ended | None]
    expected: int = 0
    clock_offset: int = 0


class Verdict(NamedTuple):
    """What became of a trial: `problem` is empty if the run survived."""

    fault: str
    problem: str
    identical: bool


class Drill:
    """Trials of one kind of run: its processes and their sharding.

    Args:
        folder: an empty folder on the disk that is tried.
        data: a folder of images.
        processes: how many train together.
        sharding: as of `nfzoo train`.
    """

    def __init__(self, folder: Path, data: Path, *, processes: int = 1, sharding: str | None = None) -> None:
        self.folder, self.processes = folder, processes
        # Everything that draws random numbers or has a state of its own.
        self.options = ["--model", "nfnet-test", "--data", str(data), "--train-size", "16", "--test-size", "16"]
        self.options += ["--batch-size", "16", "--epochs", "2", "--save-steps", "2", "--workers", "0"]
        self.options += ["--drop-rate", "0.2", "--stochastic-depth", "0.2", "--augment.mixup", "0.2"]
        self.options += ["--optim.ema-decay", "0.9", "--optim.warmup-epochs", "0", "--optim.lr", "0.4"]
        self.options += ["--resume", "true"]
        if sharding is not None:
            self.options += ["--sharding", sharding]

    def job(self, watched: Path, **how: object) -> Job:
        """Return a run into `watched / "run"`, or its resumption."""
        arguments = [*self.options, "--output", str(watched / "run")]
        output = str(watched.with_name(f"{watched.name}.printed"))
        return replace(Job(arguments, str(watched), output, self.processes), **how)  # type: ignore[arg-type]

    def reference(self, lane: Lane, *, record: bool) -> Reference:
        """Run once without a fault, and record the calls.

        Raises:
            RuntimeError: if the run fails, or its record does not account for every byte of its folder.
        """
        watched, log = self._new("reference"), self.folder / "calls"
        ended = lane.run(self.job(watched, log=str(log) if record else None))
        if ended.status != 0:
            raise RuntimeError(f"the undisturbed run {_how(ended)}")
        calls = read_log(log) if record else []
        journal = Journal(watched, calls)
        if record:
            copy = self._new("replayed")
            journal.write(copy, calls[-1].number + 1, lambda change: 1.0)
            if contents(copy) != contents(watched):
                raise RuntimeError("the recorded calls do not account for every file of the run")
        return Reference(watched, ended, outcome(watched / "run"), calls, journal)

    def run(self, lane: Lane, trial: Trial, name: str, reference: Reference) -> Verdict:
        """Try one fault. The folder stays if the run did not survive it."""
        watched = self._new(name)
        broken = trial.break_(lane, watched)
        problem = "" if broken is None else _problem(broken)
        resumed = lane.run(self.job(watched, fault=Fault(clock_offset=trial.clock_offset)))
        begun = int(found[1]) if (found := re.search(r"step (\d+)'s weights", resumed.printed)) else 0
        identical = False
        if resumed.status != 0:
            problem = problem or f"resumed, it {_how(resumed)}"
        else:
            identical = outcome(watched / "run") == reference.outcome
            if begun < trial.expected:
                problem = problem or f"it went on from step {begun}, and step {trial.expected} had been saved"
            if litter := [path.name for path in watched.rglob(".*") if path.is_file()]:
                problem = problem or f"it left {', '.join(litter)}"
        if not problem and identical:
            shutil.rmtree(watched)
        return Verdict(trial.fault, problem, identical)

    def _new(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    # ------------------------------------------------------------ the trials

    def trials(self, reference: Reference, count: int, rng: random.Random) -> list[Trial]:
        """Return so many trials, of all kinds in turn, weighted by how many places each kind has."""
        kinds = [
            (35, self._kills(reference, rng)),
            (5, self._torn(reference, rng)),
            (10, self._moments(reference, rng)),
            (10, self._errors("full disk", Action.FAIL_ON, errno.ENOSPC, reference, rng)),
            (6, self._errors("read-only file system", Action.FAIL_ON, errno.EROFS, reference, rng)),
            (6, self._errors("one I/O error", Action.FAIL_ONCE, errno.EIO, reference, rng)),
            (2, self._errors("short writes", Action.SHORTEN, 0, reference, rng)),
            (15, self._power_cuts(reference, rng)),
            (7, self._damage(reference, rng)),
            (2, self._clock(reference, rng)),
            (2, self._pauses(reference, rng)),
        ]
        if not reference.calls:
            kinds = [kinds[2], kinds[8], kinds[10]]
        total = sum(weight for weight, _ in kinds)
        shares = [max(1, round(count * weight / total)) for weight, _ in kinds]
        shares[0] += max(0, count - sum(shares))
        while sum(shares) > count:  # few trials: none of the last kinds rather than none of the first
            most = max(shares)
            shares[len(shares) - 1 - shares[::-1].index(most)] -= 1
        return [next(made) for share, (_, made) in zip(shares, kinds, strict=True) for _ in range(share)]

    def _calls(self, reference: Reference, rng: random.Random) -> Iterator[Call]:
        """Yield every call of one save in a random order, then any calls of the run."""
        first, last = reference.saves()
        calls = list({call.number: call for call in reference.calls}.values())
        saving = [call for call in calls if first <= call.number <= last]
        rng.shuffle(saving)
        yield from saving
        while True:
            yield rng.choice(calls)

    def _at(
        self,
        name: str,
        call: Call,
        reference: Reference,
        *,
        action: Action = Action.KILL,
        error: int = 0,
        clock_offset: int = 0,
    ) -> Trial:
        def break_(lane: Lane, watched: Path) -> Ended:
            return lane.run(self.job(watched, fault=Fault(action, call.own, error), struck=call.process))

        return Trial(name, break_, newest(reference.journal.renamed(call.number, flushed=False)), clock_offset)

    def _kills(self, reference: Reference, rng: random.Random) -> Iterator[Trial]:
        for call in self._calls(reference, rng):
            yield self._at("SIGKILL at a call", call, reference)

    def _torn(self, reference: Reference, rng: random.Random) -> Iterator[Trial]:
        writes = [call for call in reference.calls if call.operation is Operation.WRITE and len(call.data) > 1]
        while True:
            yield self._at("SIGKILL in a write", rng.choice(writes), reference, action=Action.TEAR)

    def _errors(
        self, name: str, action: Action, error: int, reference: Reference, rng: random.Random
    ) -> Iterator[Trial]:
        for call in self._calls(reference, rng):
            yield self._at(name, call, reference, action=action, error=error)

    def _clock(self, reference: Reference, rng: random.Random) -> Iterator[Trial]:
        for call in self._calls(reference, rng):
            back = -rng.randint(1, 3650) * _DAY
            yield self._at("clock set back", call, reference, clock_offset=back)

    def _moments(self, reference: Reference, rng: random.Random) -> Iterator[Trial]:
        while True:
            after = rng.uniform(0, reference.ended.seconds)
            yield Trial("SIGKILL at a random moment", self._runs(kill_after=after))

    def _pauses(self, reference: Reference, rng: random.Random) -> Iterator[Trial]:
        while True:
            after = rng.uniform(0, reference.ended.seconds)
            yield Trial("SIGSTOP for a second", self._runs(pause_after=after))

    def _runs(self, **how: object) -> Callable[[Lane, Path], Ended]:
        return lambda lane, watched: lane.run(self.job(watched, **how))

    def _power_cuts(self, reference: Reference, rng: random.Random) -> Iterator[Trial]:
        kinds = list(SHARES)
        for i, call in enumerate(self._calls(reference, rng)):
            seed = rng.randrange(1 << 32)

            def break_(
                lane: Lane, watched: Path, call: int = call.number, kind: str = kinds[i % len(kinds)], seed: int = seed
            ) -> None:
                reference.journal.write(watched, call, SHARES[kind](random.Random(seed)))

            yield Trial("power cut", break_, newest(reference.journal.renamed(call.number, flushed=True)))

    def _damage(self, reference: Reference, rng: random.Random) -> Iterator[Trial]:
        """Damage a file of the last checkpoint, or of the model."""
        states = Path("run") / STATES
        older, newer = sorted(step_of(path) for path in (reference.watched / states).iterdir())[-2:]
        damaged = reference.watched / states / step_folder(newer)
        names = [
            path.relative_to(reference.watched)
            for path in (*sorted(damaged.iterdir()), damaged.parents[1] / WEIGHTS_FILE)
        ]
        while True:
            for how in (_flip, _truncate, _remove):
                name, seed = rng.choice(names), rng.randrange(1 << 32)

                def break_(lane: Lane, watched: Path, how: Damage = how, name: Path = name, seed: int = seed) -> None:
                    shutil.copytree(reference.watched, watched, dirs_exist_ok=True)
                    how(watched / name, random.Random(seed))

                yield Trial("damaged or missing file", break_, older)


# ---------------------------------------------------------------- damage


Damage = Callable[[Path, random.Random], None]


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _remove(path: Path, rng: random.Random) -> None:
    path.unlink()


# ---------------------------------------------------------------- what is compared


def outcome(run: Path) -> str:
    """Return a text that tells runs apart: the digest of the model's file, and all figures but those of time."""
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    figures = [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]
    with (run / WEIGHTS_FILE).open("rb") as file:
        return json.dumps([hashlib.file_digest(file, "sha256").hexdigest(), figures])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return what each file below a folder holds, and `None` for each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def step_of(path: str | Path) -> int:
    """Return the step of a checkpoint's folder, or 0 for other paths."""
    found = _STEP.fullmatch(Path(path).name)
    return int(found[1]) if found else 0


def newest(paths: Iterable[str | Path]) -> int:
    """Return the largest step of which a checkpoint is among the paths, or 0."""
    return max(map(step_of, paths), default=0)


def _problem(ended: Ended) -> str:
    """Return what was wrong with the end of a run to which something happened, or nothing."""
    known = ended.status in (0, 1, 2, -signal.SIGKILL) and "Traceback" not in ended.errors
    return "" if known else f"it {_how(ended)}"


def _how(ended: Ended) -> str:
    if ended.status is None:
        return "hung"
    return f"ended with status {ended.status}: {_last_line(ended.errors)}"


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "no message")
