"""Checkpoints to resume from: whole or absent, rotated, found again, whatever the disk and the process do."""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfzoo.checkpoint import weight_files
from nfzoo.checkpoint.run_state import Saved, latest_state, remove_later, rng_state, save_state, set_rng_state
from nfzoo.errors import CheckpointError


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3,), value), "b.c": torch.tensor(value)}, "optimizer": {}}


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "deep" / "states", 7, tensors(1.5), {"epoch": 2, "loss": float("nan")})
    saved = latest_state(tmp_path / "deep" / "states")
    assert saved is not None
    assert saved.folder == folder
    assert (saved.step, saved.facts["epoch"]) == (7, 2)
    assert saved.facts["loss"] != saved.facts["loss"]
    assert torch.equal(saved.tensors("model")["a"], torch.full((3,), 1.5))
    assert saved.tensors("model")["b.c"].shape == ()
    assert saved.tensors("optimizer") == {}
    mode = (folder / "state.json").stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9, 123456789):
        save_state(tmp_path, step, tensors(step), {}, keep=2)
    assert names(tmp_path) == ["step_00000010", "step_123456789"]
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.step == 123456789


def test_others_are_kept_beside_the_newest_when_asked(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step, tensors(step), {}, keep=1, also=[2])
    assert names(tmp_path) == ["step_00000002", "step_00000004"]
    remove_later(tmp_path, 2)
    assert names(tmp_path) == ["step_00000002"]


def test_there_is_none(tmp_path: Path) -> None:
    assert latest_state(tmp_path) is None
    assert latest_state(tmp_path / "absent") is None
    (tmp_path / "step_abc").mkdir()
    (tmp_path / "step_00000001").touch()
    assert latest_state(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "gone", "no manifest", "half a manifest", "manifest of another kind"])
def test_an_incomplete_one_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_state(tmp_path, 1, tensors(1), {})
    newest = save_state(tmp_path, 2, tensors(2), {})
    weights, manifest = newest / "model.safetensors", newest / "state.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "gone":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:20])
    else:
        manifest.write_text("[]")
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert str(newest) in caplog.text
    save_state(tmp_path, 2, tensors(3), {})  # and is written anew
    saved = latest_state(tmp_path)
    assert saved is not None
    assert torch.equal(saved.tensors("model")["a"], torch.full((3,), 3.0))


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, tensors(1), {})
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    saved = Saved(folder, {"step": 1, "files": {"model.safetensors": 0}})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        saved.tensors("model")


def test_one_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_state(tmp_path, 1, tensors(1), {})
    weights = save_state(tmp_path, 2, tensors(2), {}) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert "step_00000002 is skipped: model.safetensors is damaged" in caplog.text
    save_state(tmp_path, 2, tensors(3), {})  # the same step again, of the same size
    saved = latest_state(tmp_path)
    assert saved is not None
    assert torch.equal(saved.tensors("model")["a"], torch.full((3,), 3.0))


RUN = {
    "epoch": 1,
    "consumed": 64,
    "skipped": 0,
    "seconds": 1.5,
    "meters": [0.1, 2.0, 3.0, 0.5],
    "rows": [{"epoch": 1, "loss": float("nan")}],
    "broken": [],
    "rng": [{}],
    "pretrained": False,
    "data": {},
    "config": {},
    "description": {},
}


def without_digest(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint's `state.json` as format 1 had it."""
    return {**{k: v for k, v in facts.items() if k != "sha256"}, "format": 1}


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "one image more": lambda f: {**f, "consumed": 65},
    "one step more": lambda f: {**f, "step": 41},
    "another number of an epoch": lambda f: {**f, "rows": [{"epoch": 2, "loss": float("nan")}]},
    "no digest": lambda f: {k: v for k, v in f.items() if k != "sha256"},
    "no checksums": lambda f: {k: v for k, v in f.items() if k != "crc32"},
    "another format": lambda f: {**f, "format": 99},
    "a format of another type": lambda f: {**f, "format": [2]},
    "no fields": lambda f: {},
    "a list": lambda f: [f],
    "a number": lambda f: 7,
    "before: no checksums": lambda f: {k: v for k, v in without_digest(f).items() if k != "crc32"},
    "before: a checksum missing": lambda f: {**without_digest(f), "crc32": {}},
    "before: one step more": lambda f: {**without_digest(f), "step": 41},
    "before: a step of text": lambda f: {**without_digest(f), "step": "40"},
    "before: no epoch": lambda f: {k: v for k, v in without_digest(f).items() if k != "epoch"},
    "before: an epoch of text": lambda f: {**without_digest(f), "epoch": "1"},
    "before: files in a list": lambda f: {**without_digest(f), "files": ["model.safetensors"]},
    "before: a size of text": lambda f: {**without_digest(f), "files": {"model.safetensors": "8"}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_is_passed_over(tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    save_state(tmp_path, 30, tensors(1), RUN)
    manifest = save_state(tmp_path, 40, tensors(2), RUN) / "state.json"
    manifest.write_text(json.dumps(CHANGES[change](json.loads(manifest.read_text()))))
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.step == 30
    assert len(caplog.messages) == 1
    assert "step_00000040 is skipped: " in caplog.text


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 2, "a": ' + "9" * 5000 + "}", "\xff", '{"format": 2} more', ""], ids=range(5)
)
def test_a_manifest_that_is_no_json_is_passed_over(tmp_path: Path, text: str) -> None:
    save_state(tmp_path, 1, tensors(1), {})
    (save_state(tmp_path, 2, tensors(2), {}) / "state.json").write_bytes(text.encode("latin-1"))
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.step == 1


def test_a_manifest_without_a_digest_is_read(tmp_path: Path) -> None:
    manifest = save_state(tmp_path, 40, tensors(2), RUN) / "state.json"
    manifest.write_text(json.dumps(without_digest(json.loads(manifest.read_text()))))
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.facts["consumed"] == 64


def test_checkpoints_that_the_run_went_back_behind_do_not_count(tmp_path: Path) -> None:
    for step in (20, 30, 40):
        save_state(tmp_path, step, tensors(step), {}, keep=3)
    (tmp_path / "step_00000040" / "state.json").write_text("")
    save_state(tmp_path, 35, tensors(35), {}, keep=1)
    assert names(tmp_path) == ["step_00000035", "step_00000040"]


@pytest.mark.parametrize("call", ["save_file", "fsync", "replace", "dumps"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 1, tensors(1), {})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = {"save_file": weight_files, "fsync": os, "replace": os, "dumps": json}[call]
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, 2, tensors(2), {})
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000001"]
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.step == 1


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from nfzoo.checkpoint.run_state import save_state

os.fsync = lambda descriptor: None  # what SIGKILL ends was written to the cache of the system, and stays

def writes(root, last):
    # A process may die between any two lines of the writing. Returns how many there are.
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.endswith(("checkpoint/run_state.py", "checkpoint/atomic.py")):
            return None
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    for step in (1, 2, 3):
        save_state(root, step, {"model": {"a": torch.full((3,), float(step))}}, {}, keep=1)
    sys.settrace(None)
    return count

folder = Path(sys.argv[1])
lines = writes(folder / "all", 0)
for last in range(1, lines + 1, 3):
    child = os.fork()  # a process of its own would take seconds to start
    if not child:
        writes(folder / str(last), last)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(lines)
"""


def test_killed_at_any_line_the_newest_complete_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = int(done.stdout)
    assert lines > 100
    seen = set()
    for last in range(1, lines + 1, 3):
        root = tmp_path / str(last)
        saved = latest_state(root)
        complete = [path for path in root.glob("step_*") if (path / "state.json").exists()] if root.exists() else []
        seen.add(None if saved is None else saved.step)
        if saved is None:
            assert not complete
            continue
        assert torch.equal(saved.tensors("model")["a"], torch.full((3,), float(saved.step)))
        save_state(root, 9, {"model": {"a": torch.zeros(3)}}, {}, keep=1)
        assert names(root) == ["step_00000009"]
    assert seen == {None, 1, 2, 3}


def test_the_whole_file_is_checked(tmp_path: Path) -> None:
    """The checksum covers a file of several read blocks, its first bytes of data included."""
    large = {"model": {"a": torch.zeros((9 << 20) // 4)}}
    weights = save_state(tmp_path, 1, large, {}) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for position in (200, 5 << 20, len(content) - 1):
        content[position] ^= 1
        weights.write_bytes(content)
        assert latest_state(tmp_path) is None, position
        content[position] ^= 1
    weights.write_bytes(content)
    assert latest_state(tmp_path) is not None


def test_the_new_checkpoint_stays_beside_newer_damaged_ones(tmp_path: Path) -> None:
    """A run that resumed from before the damaged checkpoints saves with smaller step numbers than theirs."""
    for step in (5, 6, 7):
        weights = save_state(tmp_path, step, tensors(step), {}, keep=3) / "model.safetensors"
        weights.write_bytes(b"\xff" * weights.stat().st_size)
    folder = save_state(tmp_path, 2, tensors(2), {}, keep=2)
    saved = latest_state(tmp_path)
    assert saved is not None
    assert saved.folder == folder


def test_random_numbers_go_on(tmp_path: Path) -> None:
    before = json.loads(json.dumps(rng_state()))
    first = random.random(), np.random.rand(), torch.rand(3).tolist()
    set_rng_state(before)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first
