"""Files of every kind that strangers may have made end in the project's error, in bounded memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.strangers import READERS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("NFZOO_FUZZ_SECONDS", "300"))
"""How long the long test mutates files of each kind."""


def run(*arguments: object, timeout: float) -> dict[str, Any]:
    """What a process of little memory found; its death is a failure, whose file lies in the folder."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.strangers", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_hostile_files_end_in_the_projects_error(tmp_path: Path) -> None:
    found = run("corpus", tmp_path, timeout=400)
    assert found["bad"] == []
    assert found["count"] > 150


@pytest.mark.slow
def test_mutated_files_for_ten_seconds(tmp_path: Path) -> None:
    found = run("fuzz", tmp_path, 1, 10, *READERS, timeout=200)
    assert found["bad"] == []
    assert found["count"] > 100


@pytest.mark.long
@pytest.mark.timeout(600 + 2 * SECONDS)
@pytest.mark.parametrize("kind", READERS)
def test_mutated_files_of_each_kind(tmp_path: Path, kind: str) -> None:
    assert run("fuzz", tmp_path, 2, SECONDS, kind, timeout=300 + 2 * SECONDS)["bad"] == []
