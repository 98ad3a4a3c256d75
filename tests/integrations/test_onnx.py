"""onnxruntime and OpenVINO compute a folder's logits from `onnx/model.onnx`, without nfzoo."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import openvino  # pyright: ignore[reportMissingImports]
import pytest
import torch
from PIL import Image

from nfzoo import NFNet
from nfzoo.variants import VARIANTS
from tests.support.helpers import images, random_params, relative

CLOSE = 1e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def model() -> NFNet:
    row = VARIANTS["nfnet-test"]
    made = NFNet(row.config, preprocessing=row.preprocessing, labels=tuple("abcdefghij"), name=row.name)
    made.load_state_dict(random_params(row.config))
    return made.eval()


@pytest.fixture(scope="module")
def program(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("onnx") / "m", with_onnx=True) / "onnx/model.onnx"


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5])
def test_onnxruntime(model: NFNet, program: Path, count: int) -> None:
    x = images(model.config, count, 32)
    session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": x.numpy()})
    assert relative(np.asarray(logits), model(x)) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5])
def test_openvino(model: NFNet, program: Path, count: int) -> None:
    x = images(model.config, count, 32)
    # Without the hint a processor that has bfloat16 computes in it.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(str(program), "CPU", exact)
    assert relative(compiled({"pixel_values": x.numpy()})["logits"], model(x)) < CLOSE


def test_the_code_of_the_documentation(model: NFNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/onnx.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 2
    model.save_pretrained(tmp_path / "published", with_onnx=True)
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
