"""The memory of a program is that of its weights and maps, without libraries and without what made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nfzoo.benchmark.contenders import CONTENDERS, Contender, Task
from nfzoo.benchmark.memory import clear_peak, peak, prepare, resident
from nfzoo.nn import create

MB = 2**20
LEAST, SLACK = 0.95, 48  # of the weights; MB for maps, and for what libraries allocate when they are first called


def filled(megabytes: int) -> np.ndarray:
    return np.ones(megabytes * MB, np.uint8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no peak that can be cleared")
def test_the_peak_forgets_what_was_before() -> None:
    clear_peak()
    before = peak()
    array = filled(96)
    assert 95 < (peak() - before) / MB < 110
    del array
    assert 95 < (peak() - before) / MB < 110
    clear_peak()
    assert (peak() - before) / MB < 20
    array = filled(32)
    assert 31 < (peak() - before) / MB < 52
    assert array[-1] == 1


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
