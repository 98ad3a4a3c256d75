"""The training step, as a reader and a debugger meet it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import nfzoo
from nfzoo.cli.main import main

MAX_FRAMES = 10
PACKAGE = str(Path(nfzoo.__file__).parent)


class EnoughError(Exception):
    """End a training that has shown its frames."""


def test_ten_frames_lie_between_the_command_line_and_a_convolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convolution = torch.nn.functional.conv2d
    stacks: list[list[str]] = []

    def spy(*args, **kwargs):
        frame, names = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                names.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}")
            frame = frame.f_back
        stacks.append(names[::-1])
        if len(stacks) == 40:
            raise EnoughError
        return convolution(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    options = ["--model", "nfnet-test", "--data", "digits", "--batch-size", "16", "--workers", "0"]
    options += ["--accumulation", "1"]  # which the run would otherwise choose by a pass on the meta device
    with pytest.raises(EnoughError):
        main(["train", *options, "--output", str(tmp_path / "run")])
    assert {len({name for name in stack if name.startswith("trainer.")}) for stack in stacks} == {3}
    for stack in stacks:
        assert stack[0] == "main.main"
        assert len(stack) <= MAX_FRAMES, " > ".join(stack)
