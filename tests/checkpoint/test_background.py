"""Writes in a thread: in order, none lost, and the first error told."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nfzoo.checkpoint.background import BackgroundWriter


def test_writes_run_in_order_while_the_caller_goes_on() -> None:
    writer, free, done = BackgroundWriter(), threading.Event(), []
    writer.submit(lambda: (free.wait(60), done.append(1)))
    writer.submit(lambda: done.append(2))
    assert done == []
    free.set()
    writer.result()
    assert done == [1, 2]


def test_an_error_leaves_out_the_later_ones_and_is_raised_once() -> None:
    writer, done = BackgroundWriter(), []

    def full() -> None:
        raise OSError("no space")

    writer.submit(full)
    writer.submit(lambda: done.append(1))
    writer.join()
    assert writer.failed()
    with pytest.raises(OSError, match="no space"):
        writer.result()
    assert not writer.failed()
    assert done == []
    writer.submit(lambda: done.append(2))
    writer.result()
    assert done == [2]


def test_a_process_that_ends_waits_for_its_writes(tmp_path: Path) -> None:
    text = (
        "import sys, time; from pathlib import Path; from nfzoo.checkpoint.background import BackgroundWriter\n"
        "BackgroundWriter().submit(lambda: (time.sleep(0.5), Path(sys.argv[1]).write_text('whole')))\n"
        "raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", text, tmp_path / "file"], check=False).returncode == 3
    assert (tmp_path / "file").read_text() == "whole"
