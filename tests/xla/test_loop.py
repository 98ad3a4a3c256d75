"""The training loop on XLA: its step is one program, compiled in the first step and never again."""

from pathlib import Path

import pytest
import torch_xla.debug.metrics as metrics  # pyright: ignore[reportMissingImports]

from nfzoo.train import run as train
from nfzoo.train import trainer

# Accelerate asks torch-xla in a way that torch-xla has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use torch_xla:DeprecationWarning")


def programs() -> int:
    found = metrics.metric_data("CompileTime")
    return found[0] if found else 0


@pytest.mark.parametrize("options", [[], ["--augment.layers", "2", "--augment.mixup", "0.2"]])
def test_one_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    counts: list[int] = []
    take_step = trainer.Trainer.train_step

    def counting(self: trainer.Trainer, parts: list) -> None:
        counts.append(programs())
        take_step(self, parts)
        counts.append(programs())

    monkeypatch.setattr(trainer.Trainer, "train_step", counting)
    common = ["--model", "nfnet-test", "--data", "digits", "--batch_size", "284", "--workers", "0", "--epochs", "1"]
    common += ["--stochastic_depth", "0.2", "--drop_rate", "0.2"]
    assert train.main([*common, "--output", str(tmp_path / "run"), *options]) == 0
    taken = [after - before for before, after in zip(counts[::2], counts[1::2], strict=True)]
    assert taken == [1, 0, 0, 0, 0]
