"""The memory of a program is that of its weights and maps, without libraries and without what made it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nfzoo.benchmark.contenders import CONTENDERS, Contender, Task
from nfzoo.benchmark.memory import prepare, resident
from nfzoo.nn import create

MB = 2**20
LEAST, SLACK = 0.95, 48  # of the weights; MB for maps, and for what libraries allocate when they are first called


# In a process of its own, since another test's memory may be given back meanwhile.
PEAKS = """
import numpy as np
from nfzoo.benchmark.memory import clear_peak, peak

def megabytes():
    return (peak() - before) / 2**20

clear_peak()
before = peak()
array = np.ones(96 << 20, np.uint8)
print(megabytes())
del array
print(megabytes())
clear_peak()
print(megabytes())
array = np.ones(32 << 20, np.uint8)
print(megabytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no peak that can be cleared")
def test_the_peak_forgets_what_was_before() -> None:
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, timeout=120)
    allocated, freed, cleared, again = map(float, done.stdout.split())
    assert 95 < allocated < 110
    assert 95 < freed < 110
    assert cleared < 20
    assert 31 < again < 52


@pytest.mark.slow
def test_a_process_of_its_own_tells_what_a_program_keeps(tmp_path: Path) -> None:
    model = create("nfnet-test", num_classes=100_000).eval()
    weights = sum(p.numel() for p in model.parameters()) * 4 / MB
    assert weights > 90
    task = Task(model, model.for_inference().eval(), 1, 32, 1, [], tmp_path)
    prepare(task)
    ways = {(c.format, c.precision): c for c in CONTENDERS}
    for name, expected in ((("eager", "float32"), weights), (("folded", "bf16"), weights / 2)):
        assert expected * LEAST < resident(ways[name], task) < expected + SLACK, name
    absent = Contender("absent", "float32", ways["eager", "float32"].build)
    with pytest.raises(RuntimeError, match="its memory: ValueError"):
        resident(absent, task)
