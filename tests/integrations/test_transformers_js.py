"""transformers.js computes a folder's logits from its `onnx/model.onnx`, in node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nfzoo import NFNet
from nfzoo.variants import VARIANTS
from tests.support.helpers import images, random_params, relative

CLOSE = 1e-5  # float32 sums in another order
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NODE = Path(sys.prefix) / "node/node_modules"
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def node(script: Path, *arguments: str) -> str:
    """Run a script beside the packages of the environment."""
    (script.parent / "node_modules").symlink_to(NODE)
    done = subprocess.run(
        ["node", script.name, *arguments], cwd=script.parent, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_digits(folder: Path) -> NFNet:
    row = VARIANTS["nfnet-test"]
    model = NFNet(row.config, preprocessing=row.preprocessing, labels=LABELS, name=row.name)
    model.load_state_dict(random_params(row.config))
    model.eval().save_pretrained(folder, with_onnx=True)
    return model


@torch.no_grad()
def test_transformers_js(tmp_path: Path) -> None:
    model = save_digits(tmp_path / "models/digits")
    x = images(model.config, 3, 32)
    x.numpy().tofile(tmp_path / "pixels")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((60, 40))
    picture.save(tmp_path / "picture.png")
    shutil.copy(HERE / "transformers_js.mjs", tmp_path)
    given = {"models": f"{tmp_path}/models/", "name": "digits", "pixels": f"{tmp_path}/pixels", "shape": list(x.shape)}
    found: dict[str, Any] = json.loads(
        node(tmp_path / "transformers_js.mjs", json.dumps({**given, "image": f"{tmp_path}/picture.png"}))
    )
    assert (
        found["version"] == json.loads((HERE / "package.json").read_text())["dependencies"]["@huggingface/transformers"]
    )
    expected = model(x)
    for way in ("logits", "auto"):
        assert relative(torch.tensor(found[way]), expected) < CLOSE, way

    # From an image: the labels of the folder, with the probabilities of transformers.js' own pixels.
    pixels = torch.tensor(found["pixels"])
    assert relative(pixels, model.preprocess(picture)) < 0.5
    probabilities = model(pixels[None]).softmax(1)[0]
    assert {row["label"] for row in found["scores"]} == set(LABELS)
    scores = {row["label"]: row["score"] for row in found["scores"]}
    assert relative(torch.tensor([scores[label] for label in LABELS]), probabilities) < CLOSE

    # What docs/onnx.md says that it refuses.
    assert found["without_config"] == "Unsupported model type: nfzoo"
    assert found["pipeline"] == "Unknown image_processor_type: 'NFZooImageProcessor'."


def test_the_code_of_the_documentation(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```js\n(.*?)^```", (ROOT / "docs/onnx.md").read_text(encoding="utf-8"), re.M | re.S)
    save_digits(tmp_path / "published")
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "photo.jpg")
    (tmp_path / "classify.mjs").write_text(code)
    assert "label" in node(tmp_path / "classify.mjs")
