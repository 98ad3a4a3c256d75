"""Set up every test session: one thread a process, and a folder for compiled code that goes with the session."""

from __future__ import annotations

import os
import tempfile

import pytest

# Before torch is imported, and for the processes that tests start. Several processes of several threads on two cores
# wait for each other in busy loops.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Put compiled kernels, gigabytes over a whole run, into a folder that all workers share and that goes at the end.

    A cache that is named in the environment is used instead, and stays.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="nfzoo-tests-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)
