"""`python -m nfzoo.hub.pin` against a Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from nfzoo.hub import pin
from nfzoo.hub.registry import COPIES, PINS, PUBLIC, read_pins
from tests.support.hub_server import HubServer

F0, F3 = "timm/dm_nfnet_f0.dm_in1k", "ethanluoyc/dm-nfnet-f3-in1k"
ROWS = {row.repo_id: row.weights_file for row in (*PUBLIC.values(), *COPIES.values())}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "pins.json"
    path.write_bytes(PINS.read_bytes())
    return path


@pytest.fixture
def commits(hub: HubServer) -> dict[str, str]:
    """All repositories of the table, and their commits."""
    return {repo: hub.add(repo, {file: repo.encode(), "config.json": b"{}"}) for repo, file in ROWS.items()}


def test_every_row_is_pinned(hub, commits, table, capsys):
    before = table.read_bytes()
    assert pin.main(["--check", "--file", str(table)]) == 1
    out, err = capsys.readouterr()
    assert f"of 20 repositories, 20 differ and 0 failed: {table}" in out
    assert err == ""
    assert table.read_bytes() == before
    assert pin.main(["--file", str(table)]) == 0
    out = capsys.readouterr().out
    assert f"{F0}: revision ca8e830961c2ebceffff7affff34acfe7a1da673 -> {commits[F0]}, size unknown -> {len(F0)}" in out
    assert json.loads(table.read_text()) == {
        repo: {"revision": commits[repo], "size": len(repo), "sha256": hashlib.sha256(repo.encode()).hexdigest()}
        for repo in sorted(ROWS)
    }
    written = table.stat()
    for options in (["--check"], []):
        assert pin.main([*options, "--file", str(table)]) == 0
        assert "20 repositories, 0 " in capsys.readouterr().out
    assert table.stat().st_mtime_ns == written.st_mtime_ns
    assert not hub.asked("GET")  # nothing is downloaded


def test_what_fails_keeps_its_row(hub, commits, table, capsys):
    old = read_pins(table)
    names = iter(sorted(PUBLIC[name].repo_id for name in PUBLIC.keys() - {"nfnet-f0"}))
    gone, closed, gated, empty = (next(names) for _ in range(4))
    del hub.repos[gone]
    hub.closed.add(closed)
    hub.gated.add(gated)
    hub.repos[empty].commits.clear()
    hub.add(empty, {"README.md": b""})
    hub.fail(ROWS[F3], "503", times=1000, method="HEAD")  # all of DeepMind's files
    for options in (["--check"], []):
        assert pin.main([*options, "--file", str(table)]) == 1
        out, err = capsys.readouterr()
        told = dict(line.split(": left as it was, as ") for line in err.splitlines())
        assert told.keys() == {gone, closed, gated, empty} | {row.repo_id for row in COPIES.values()}
        why = {gone: "does not exist", closed: "is private", gated: "asks for consent", empty: "it lacks model.safeten"}
        assert all(words in told[repo] for repo, words in why.items())
        assert "overloaded" in told[F3]
        assert f"and {len(told)} failed" in out
    new = read_pins(table)
    assert new[F3] == old[F3]
    assert new.keys() == commits.keys() - told.keys() | old.keys()
    assert all(new[repo] == row for repo, row in old.items() if repo != F0)
    assert new[F0].revision == commits[F0]


def test_a_server_that_states_no_hash_or_does_not_answer(hub, commits, table, capsys, monkeypatch):
    before = table.read_bytes()
    hub.hashless = True
    assert pin.main(["--file", str(table)]) == 1
    err = capsys.readouterr().err
    assert err.count("the server states no sha256 of model.safetensors") == len(PUBLIC)
    hub.requests.clear()
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert pin.main(["--file", str(table)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == len(ROWS)
    assert err.count("the Hub cannot be reached") == len(ROWS)
    assert table.read_bytes() == before


def test_a_table_that_cannot_be_read_or_written(hub, commits, table, tmp_path, capsys, monkeypatch):
    assert pin.main(["--file", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    table.write_text("[]")
    assert pin.main(["--file", str(table)]) == 2
    assert "must hold an object of objects" in capsys.readouterr().err
    assert not hub.requests
    table.write_text("{}")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert pin.main(["--file", str(table)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert table.read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pins.json"]
