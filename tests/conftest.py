"""Set one thread a process and one folder for compiled code, for every process of a test session."""

from __future__ import annotations

import os
import tempfile

import pytest

# Torch reads this when it is imported, here and in the processes that tests start. The models are too small to share
# out, and threads that wait for each other take the cores from the other worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Put compiled kernels, gigabytes over a whole run, into a folder that is removed at the session's end.

    The workers of pytest-xdist inherit it from the process that starts them, and share it. A cache that is named in
    the environment is used instead, and stays.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="nfzoo-tests-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)
