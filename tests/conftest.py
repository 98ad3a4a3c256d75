"""What every test session shares: where compiled code goes, so that a run leaves nothing behind."""

from __future__ import annotations

import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Compiled kernels go into a folder of the session's own, gigabytes over a whole run, that goes with it.

    A cache that is named in the environment is used instead, and stays.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="nfzoo-tests-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)
