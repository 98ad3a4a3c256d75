"""An ONNX program beside the weights that it was made from, and never beside others."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.numpy_helper import from_array

from nfzoo import CheckpointError, ConfigError, NFNet, Preprocessing
from nfzoo.cli.main import main
from nfzoo.conversion.convert import convert
from nfzoo.conversion.timm import write_timm
from nfzoo.export import onnx_folder
from nfzoo.export.onnx_folder import INPUT, onnx_files
from nfzoo.hub.publish import bundle
from nfzoo.nn import create, load
from tests.support.helpers import SMALL, images, random_params, relative

CLOSE = 1e-5  # float32 sums in another order
FILES = ["onnx/model.onnx", "onnx/nfzoo.json"]


def small(name: str = "nfnet", dtype: torch.dtype = torch.float32, seed: int = 0) -> NFNet:
    config = SMALL[name].replace(depths=(1, 1, 1, 1))
    model = NFNet(config, preprocessing=Preprocessing(train_size=24, test_size=32), labels=tuple("abcde"), dtype=dtype)
    model.load_state_dict(random_params(config, seed, dtype))
    return model.eval()


class Doubled(NFNet):
    def forward(self, x: torch.Tensor, noise: Any = None) -> torch.Tensor:
        return 2 * super().forward(x, noise)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a few bytes in the place of a program, which takes seconds to trace."""

    def write(model: NFNet, x: torch.Tensor, batch: int | None, path: Path, **names: str) -> None:
        path.write_bytes(b"program of " + str(float(next(iter(model.state_dict().values())).sum())).encode())

    monkeypatch.setattr(onnx_folder, "write_onnx", write)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logits(folder: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": x.numpy()})
    return np.asarray(found)


@pytest.mark.parametrize(
    "name", ["nfnet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("nf-resnet", "nf-regnet"))]
)
def test_the_program_computes_the_logits_of_any_number_of_images(name: str, tmp_path: Path) -> None:
    model = small(name)
    folder = model.save_pretrained(tmp_path / "m", with_onnx=True)
    assert onnx_files(folder) == FILES
    assert set(FILES) < content(folder).keys()
    for count in (1, 3):
        x = images(model.config, count, 32)
        assert relative(logits(folder, x), model(x)) < CLOSE
    fields = json.loads((folder / "onnx/nfzoo.json").read_text())
    assert fields["input"] == {"name": INPUT, "shape": ["batch", 3, 32, 32], "dtype": "float32"}
    assert fields["output"] == {"name": "logits", "shape": ["batch", 5], "dtype": "float32"}
    assert fields["labels"] == list("abcde")
    (first,) = onnx.load(folder / "onnx/model.onnx").graph.input
    assert first.name == "pixel_values"
    assert first.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert load(folder).description.to_dict() == model.description.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bfloat16", "folded"])
def test_a_program_is_of_float32_and_folded_whatever_the_model_is(form: str, tmp_path: Path) -> None:
    model = small(dtype=torch.bfloat16) if form == "bfloat16" else small().for_inference()
    folder = model.save_pretrained(tmp_path / "m", with_onnx=True)
    x = images(model.config, 2, 32)
    assert relative(logits(folder, x), model.float()(x)) < CLOSE
    assert load(folder).config.folded == (form == "folded")


@pytest.mark.usefixtures("quick")
def test_a_program_does_not_outlive_its_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = small().save_pretrained(tmp_path / "m", with_onnx=True)
    before = content(folder)
    small().save_pretrained(folder, with_onnx=True)
    assert content(folder) == before
    other = small(seed=1)
    other.save_pretrained(folder, with_onnx=True)
    assert content(folder)["onnx/model.onnx"] != before["onnx/model.onnx"]
    assert onnx_files(folder) == FILES
    assert not caplog.records
    other.save_pretrained(folder)
    assert not (folder / "onnx").exists()
    assert f"removing {folder / 'onnx'}, which was made from the weights that were there before" in caplog.text
    assert onnx_files(folder) == []

    other.save_pretrained(folder, with_onnx=True)
    regnet = create("timm-nf-regnet-b0", num_classes=2)
    write_timm(folder, regnet.description, regnet.state_dict())
    assert not (folder / "onnx").exists()


@pytest.mark.usefixtures("quick")
def test_programs_of_others_stay_and_are_not_taken_for_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = small().save_pretrained(tmp_path / "m", with_onnx=True)
    (folder / "onnx/model_quantized.onnx").write_bytes(b"theirs")
    before = content(folder)
    with pytest.raises(
        ConfigError, match=r"onnx holds 'model_quantized\.onnx', which nfzoo did not write; move it away"
    ):
        small(seed=1).save_pretrained(folder, with_onnx=True)
    assert content(folder) == before
    small(seed=1).save_pretrained(folder)
    assert "stays, and is of the weights that were there before: it holds 'model_quantized.onnx'" in caplog.text
    assert content(folder)["onnx/model_quantized.onnx"] == b"theirs"
    with pytest.raises(CheckpointError, match=r"was made from other weights than those of .*--with-onnx"):
        bundle(folder, "org/m")
    shutil.rmtree(folder / "onnx")
    (folder / "onnx").write_text("a file")
    small().save_pretrained(folder)
    with pytest.raises(ConfigError, match="onnx is a file; move it away"):
        small().save_pretrained(folder, with_onnx=True)
    assert (folder / "onnx").read_text() == "a file"


@pytest.mark.usefixtures("quick")
def test_what_is_published_is_of_the_published_weights(tmp_path: Path) -> None:
    folder = small().save_pretrained(tmp_path / "m", with_onnx=True)
    published = bundle(folder, "org/m")
    assert set(FILES) < published.files.keys()
    assert "- onnx\n" in published.card
    assert "`onnx/model.onnx`, from `pixel_values` (N, 3, 32, 32) to `logits`" in published.card

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            bundle(folder, "org/m")

    sheet = (folder / "onnx/nfzoo.json").read_text()
    for text, match in (("{", "cannot be read"), ("[]", "does not say which"), ("{}", "does not say which")):
        (folder / "onnx/nfzoo.json").write_text(text)
        refused(match)
    (folder / "onnx/nfzoo.json").write_text(sheet)
    (folder / "onnx/model.onnx").rename(folder / "onnx/other.onnx")
    refused(r"lacks model\.onnx")
    shutil.copy(folder / "onnx/other.onnx", folder / "onnx/model.onnx")
    refused(r"holds 'other\.onnx', which nfzoo did not write")
    shutil.rmtree(folder / "onnx")
    shutil.copytree(small(seed=1).save_pretrained(tmp_path / "n", with_onnx=True) / "onnx", folder / "onnx")
    refused("other weights")
    (tmp_path / "made").mkdir()
    made = bundle(folder, "org/m", onnx=tmp_path / "made")
    assert set(FILES) < made.files.keys()
    assert json.loads((tmp_path / "made/nfzoo.json").read_text()) == json.loads(sheet)


@pytest.mark.usefixtures("quick")
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small().save_pretrained(tmp_path / "m")
    before = content(folder)
    assert main(["push", str(folder), "org/m", "--dry-run", "--with-onnx"]) == 0
    assert "onnx/model.onnx" in capsys.readouterr().out
    assert content(folder) == before
    assert main(["convert", str(folder), str(tmp_path / "n"), "--with-onnx"]) == 0
    assert onnx_files(tmp_path / "n") == FILES
    assert content(tmp_path / "n").items() > before.items()
    assert main(["convert", str(folder), str(folder), "--with-onnx", "--overwrite"]) == 0
    assert content(folder) == content(tmp_path / "n")
    assert main(["convert", str(folder), str(tmp_path / "o"), "--to", "timm", "--with-onnx"]) == 2
    assert "an ONNX program goes with nfzoo's folder, not with the form timm" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "o")]) == 2
    assert "is a model of nfzoo's already" in capsys.readouterr().err
    small().for_inference().save_pretrained(tmp_path / "folded")
    convert(tmp_path / "folded", tmp_path / "p", with_onnx=True)
    assert onnx_files(tmp_path / "p") == FILES


@pytest.mark.usefixtures("quick")
def test_what_has_no_program_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: NFNet, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            model.save_pretrained(tmp_path / "m", with_onnx=True)
        assert list(tmp_path.iterdir()) == []

    headless = small()
    headless.reset_classifier(0)
    refused(headless, ConfigError, r"has no classifier \(num_classes 0\)")
    other = Doubled(small().config)
    refused(other, ConfigError, "Doubled has a forward of its own")
    damaged = small()
    with torch.no_grad():
        damaged.get_parameter("head.bias")[0] = torch.nan
    refused(damaged, CheckpointError, r"head\.bias is not finite")
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    refused(small(), ConfigError, r"ONNX needs onnxscript: pip install 'nfzoo\[export\]'")


def test_weights_outside_the_program_have_the_name_that_transformers_js_expects(tmp_path: Path) -> None:
    value = np.arange(512, dtype=np.float32)
    made = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "sum",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [512])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [512])],
        [from_array(value, "w")],
    )
    model = onnx.helper.make_model(made, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    # As torch writes it, of more than 1.5 GiB.
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    onnx_folder._rename_data(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones(512, np.float32)})
    assert np.array_equal(np.asarray(found), value + 1)
