"""The drill: runs survive every fault, and one that does not is found."""

import json
from pathlib import Path

import pytest

from nfzoo.cli.main import main
from nfzoo.drill import run, trials
from nfzoo.drill.trials import Verdict


def drill(folder: Path, *options: str) -> tuple[int, list[dict]]:
    status = main(["drill", "--folder", str(folder), "--json", str(folder / "out.json"), *options])
    return status, json.loads((folder / "out.json").read_text())["verdicts"]


def test_runs_survive_twenty_faults(tmp_path: Path) -> None:
    status, verdicts = drill(tmp_path, "--trials", "20", "--workers", "1")
    assert [v for v in verdicts if v["problem"] or not v["identical"]] == []
    assert (status, len(verdicts)) == (0, 20)
    assert len({v["fault"] for v in verdicts}) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "options", [[], ["--processes", "2"], ["--processes", "2", "--sharding", "fsdp2"]], ids=["one", "ddp", "fsdp2"]
)
def test_runs_survive_two_hundred_faults(tmp_path: Path, options: list[str]) -> None:
    status, verdicts = drill(tmp_path, "--trials", "200", *options)
    assert [v for v in verdicts if v["problem"] or not v["identical"]] == []
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
    ):
        assert main(["drill", *options]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
