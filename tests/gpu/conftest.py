"""Tests of the Triton kernels, in Triton's interpreter: `make test-triton`, in an environment of their own.

Where Triton is not installed none of them is collected.
"""

from __future__ import annotations

import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
