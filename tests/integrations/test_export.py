"""Load what `nfzoo export` writes for runtimes that are large: OpenVINO, LiteRT and ExecuTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfzoo.cli.main import main
from nfzoo.config import Preprocessing
from nfzoo.export.run import SHEET, export
from nfzoo.export.runtimes import LOADERS
from nfzoo.nn import NFNet, create
from tests.support.helpers import images, random_params, relative

CLOSE = 1e-5  # float32 sums in another order
INT8 = 0.3  # of the logits of random weights, as in tests/benchmark


@pytest.fixture(scope="module")
def model() -> NFNet:
    made = create("nfnet-test", labels=[str(i) for i in range(10)])
    made.load_state_dict(random_params(made.config))
    return made.eval()


def sheet(path: Path) -> dict[str, Any]:
    fields = json.loads((path.parent / SHEET).read_text())
    assert fields["labels"] == [str(i) for i in range(10)]
    assert Preprocessing.from_dict(fields["preprocessing"]).test_size == 32
    return fields


@torch.no_grad()
def test_openvino(model: NFNet, tmp_path: Path) -> None:
    import openvino  # pyright: ignore[reportMissingImports]

    path = export(model, tmp_path / "out", format="openvino")
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.bin", "model.xml", SHEET]
    assert sheet(path)["input"] == {"name": "images", "shape": ["batch", 3, 32, 32], "dtype": "float32"}
    program = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 5):
        x = images(model.config, count, 32)
        assert relative(program({"images": x.numpy()})["logits"], model(x)) < CLOSE
        assert relative(LOADERS["openvino"](path, 1)(x), model(x)) < CLOSE
    assert path.with_name("model.bin").stat().st_size > 4 * 0.95 * sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_openvino_in_eight_bits(model: NFNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        command = ["export", str(tmp_path / "model"), "--format", "openvino", "--output", str(out), "--int8", "digits"]
        assert main(command) == 0
    written = capsys.readouterr().out
    assert f"wrote {out / 'model.xml'}\nwrote {out / 'model.bin'}\nwrote {out / SHEET}\n" in written
    assert "accuracy on 359 held-out images: " in written
    assert sheet(out / "model.xml")["arithmetic"] == "int8"
    assert (out / "model.bin").stat().st_size < 2 * sum(p.numel() for p in model.parameters())
    x = images(model.config, 3, 32)
    assert 1e-4 < relative(LOADERS["openvino"](out / "model.xml", 1)(x), model(x)) < INT8


@torch.no_grad()
def on_device(model: NFNet, folder: Path, format: str) -> Path:
    """Check the programs of a format for small devices; return that of two images."""
    x = images(model.config, 2, 32)
    path = export(model, folder / "float", format=format, batch=2)
    assert sheet(path)["input"]["shape"] == [2, 3, 32, 32]
    found = LOADERS[format](path, 1)(x)
    assert relative(found, model(x)) < CLOSE
    eight = export(model, folder / "int8", format=format, batch=2, int8=[x, x.flip(0)])
    assert sorted(p.name for p in eight.parent.iterdir()) == [path.name, SHEET]
    assert eight.stat().st_size < path.stat().st_size / 2
    assert 1e-4 < relative(LOADERS[format](eight, 1)(x), model(x)) < INT8
    return path


def test_litert(model: NFNet, tmp_path: Path) -> None:
    path = on_device(model, tmp_path, "litert")
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    program = Interpreter(model_path=str(path))
    assert program.get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["logits"]}}
    found = program.get_signature_runner()(images=np.zeros((2, 3, 32, 32), np.float32))
    assert found["logits"].shape == (2, 10)


def test_executorch(model: NFNet, tmp_path: Path) -> None:
    path = on_device(model, tmp_path, "executorch")
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    program = Runtime.get().load_program(path)
    assert program.method_names == {"forward"}
    (logits,) = program.load_method("forward").execute([torch.zeros(2, 3, 32, 32)])
    assert logits.shape == (2, 10)
