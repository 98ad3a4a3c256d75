"""Tests under torch-xla, on its CPU: `make test-xla`, in an environment of their own, as torch-xla pins another torch.

Where torch-xla is not installed none of them is collected.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HERE = importlib.util.find_spec("torch_xla") is not None
collect_ignore_glob = [] if HERE else ["test_*.py"]

os.environ.setdefault("PJRT_DEVICE", "CPU")
# Compile in half the time and run slower: the programs here are small.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture
def device() -> torch.device:
    from nfzoo.runtime.device import backend

    chosen = backend("xla")
    chosen.start()
    return chosen.device
