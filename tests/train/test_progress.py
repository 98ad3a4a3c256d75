"""Where a run shows its bar."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nfzoo.train.config import TrainConfig
from nfzoo.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminals_and_notebooks_have_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(model="nfnet-test", data="digits", output="x", epochs=3, batch_size=32)
    accelerator: Any = SimpleNamespace(is_main_process=True)
    learner: Any = None
    progress = Progress(config, accelerator, learner, steps_per_epoch=5, classes=())

    def shown() -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with progress.bar(1, 64) as bar:
                assert bar.n == 2
        return stream.getvalue()

    stream: io.StringIO = io.StringIO()
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert shown() == ""
    stream = Terminal()
    assert "epoch 2/3" in shown()
    stream = io.StringIO()
    kernel = SimpleNamespace(kernel=object(), config={})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))  # type: ignore[arg-type]
    assert "epoch 2/3" in shown()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))  # type: ignore[arg-type]
    stream = io.StringIO()
    assert shown() == ""
