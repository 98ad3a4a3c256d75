"""Tests of GPU code. Without a GPU: `make test-gpu`, the Triton kernels in Triton's interpreter, compiled for GPUs.

With one: `python -m pytest tests/gpu -o filterwarnings=default`, with any python that has torch for CUDA, pytest and
nfzoo's requirements; nfzoo need not be installed. The kernels' tests then run on the GPU, and those of `test_cuda.py`,
which need one, are collected too. Where Triton is not installed none of them is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
collect_ignore_glob = [] if CUDA else ["test_cuda.py"]
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("nfzoo") is None:
    sys.path.insert(0, str(ROOT))
import nfzoo  # noqa: E402

if str(ROOT) not in nfzoo.__path__:
    nfzoo.__path__.append(str(ROOT))  # hub/ and conversion/ beside nfzoo/ are nfzoo.hub and nfzoo.conversion
