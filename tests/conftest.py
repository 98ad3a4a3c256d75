"""Set one thread a process and one folder for what tests share, for every process of a test session."""

from __future__ import annotations

import os
import tempfile

import pytest

# Torch reads this when it is imported, here and in the processes that tests start. The models are too small to share
# out, and threads that wait for each other take the cores from the other worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Make a folder for what tests share, and put compiled kernels, gigabytes over a whole run, there as well.

    The workers of pytest-xdist inherit it from the process that starts them. It is removed at the session's end. A
    cache of kernels that is named in the environment is used instead, and stays.
    """
    if "NFZOO_TESTS" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="nfzoo-tests-")
        os.environ["NFZOO_TESTS"] = folder.name
        config.add_cleanup(folder.cleanup)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder.name, "kernels"))
