"""The drill: runs survive every fault, and one that does not is found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nfzoo.cli.main import main
from nfzoo.drill import lane, run, trials
from nfzoo.drill.trials import Verdict


def drill(folder: Path, *options: str) -> tuple[int, list[dict]]:
    status = main(["drill", "--folder", str(folder), "--json", str(folder / "out.json"), *options])
    return status, json.loads((folder / "out.json").read_text())["verdicts"]


def errors(folder: Path) -> str:
    """Return what the runs that did not survive have printed as errors, the stacks of hung ones among it."""
    kept = {path.name for path in folder.glob("*/trial-*") if path.is_dir()}
    files = [path for path in sorted(folder.glob("*/*.err")) if path.name.partition(".")[0] in kept]
    return "\n".join(f"{path.name}: {path.read_text()[-5000:]}" for path in files)


def test_runs_survive_twenty_faults(tmp_path: Path) -> None:
    status, verdicts = drill(tmp_path, "--trials", "20", "--workers", "1")
    assert [v for v in verdicts if v["problem"] or not v["identical"]] == []
    assert (status, len(verdicts)) == (0, 20)
    assert len({v["fault"] for v in verdicts}) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--sharding", "fsdp2"]], ids=["ddp", "fsdp2"])
def test_two_processes_survive_each_fault(tmp_path: Path, options: list[str]) -> None:
    status, verdicts = drill(tmp_path, "--trials", "11", "--workers", "1", "--processes", "2", *options)
    assert [v for v in verdicts if v["problem"] or not v["identical"]] == [], errors(tmp_path)
    assert (status, len({v["fault"] for v in verdicts})) == (0, 11)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "options", [[], ["--processes", "2"], ["--processes", "2", "--sharding", "fsdp2"]], ids=["one", "ddp", "fsdp2"]
)
def test_runs_survive_two_hundred_faults(tmp_path: Path, options: list[str]) -> None:
    status, verdicts = drill(tmp_path, "--trials", "200", *options)
    assert [v for v in verdicts if v["problem"] or not v["identical"]] == [], errors(tmp_path)
    assert (status, len(verdicts)) == (0, 200)


def test_a_run_that_does_not_survive_is_found_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "newest", lambda paths: 99)  # what no run has saved
    status, verdicts = drill(tmp_path, "--trials", "2", "--workers", "1")
    assert status == 1
    assert {v["fault"] for v in verdicts if v["problem"]} == {"SIGKILL at a call", "SIGKILL in a write"}
    assert "went on from step" in capsys.readouterr().out
    (kept,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert list(kept.glob("trial-*/run"))


def test_the_table_names_what_went_wrong() -> None:
    lines = run.table([Verdict("a", "", True), Verdict("a", "it hung", False), Verdict("b", "", False)]).splitlines()
    assert [line.split() for line in lines[1:4]] == [["a", "2", "1", "1"], ["b", "1", "1", "0"], ["all", "3", "2", "1"]]
    assert lines[4:] == ["1 x a: it hung", "1 x b: it ended with other weights or figures"]


def test_bad_options_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for options, said in (
        (["--sharding", "fsdp2"], "--processes 2"),
        (["--trials", "0"], "from 1 to"),
        (["--folder", str(tmp_path / "file")], "is a file"),
        (["--processes", "3"], "there is no 3 but 1, 2, 4, 8"),
        (["--json", str(tmp_path / "file" / "a")], "no folder that takes files"),
    ):
        assert main(["drill", *options]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_drill_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()  # with a space, at which LD_PRELOAD is divided
    cases = (
        (signal.SIGTERM, False, "reference"),
        (signal.SIGINT, True, "trial-*"),
        (signal.SIGKILL, False, "reference"),
    )
    for number, to_group, when in cases:
        with (tmp_path / "printed").open("w+") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", "nfzoo", "drill", "--workers", "1", "--folder", str(tmp_path / "runs")],
                env={**os.environ, "TMPDIR": str(tmp_path / "a b")},
                stderr=printed,
                start_new_session=True,
            )
            while not list((tmp_path / "runs").glob(f"*/{when}")):
                assert process.poll() is None
                time.sleep(0.05)
            lanes = _children(process.pid)
            assert lanes
            (os.killpg if to_group else os.kill)(process.pid, number)
            status = process.wait(20)
            printed.seek(0)
            said = printed.read().splitlines()
        until = time.monotonic() + 10
        while any(Path(f"/proc/{lane}/cmdline").exists() for lane in lanes) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{lane}/cmdline").exists() for lane in lanes)
        if number == signal.SIGKILL:
            shutil.rmtree(tmp_path / "runs")
            continue
        assert status == 128 + number
        assert len(said) == 1
        assert said[0].startswith(f"nfzoo drill: stopped by {number.name} after ")
        assert list((tmp_path / "runs").iterdir()) == []
        assert list((tmp_path / "a b").glob("nfzoo-drill-*")) == []


def _children(process: int) -> list[int]:
    """Return the processes that this one started, and those that they started."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return children + [deeper for child in children for deeper in _children(child)]


def test_what_cannot_be_tried_is_said_and_a_lane_that_dies_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def die(self: lane.Lane, job: lane.Job) -> lane.Ended:
        self._process.kill()
        return whole(self, job)

    whole = lane.Lane.run
    monkeypatch.setattr(lane.Lane, "run", die)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["drill", "--folder", str(tmp_path), "--workers", "1"]) == 1
    assert "no faults in system calls are tried, and no losses of power: they need a C compiler" in caplog.text
    said = "nfzoo drill: error: the process that starts the trainings was ended by signal 9; try fewer --workers\n"
    assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []
