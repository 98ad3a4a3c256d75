"""Exported programs compute what the model computes, also where nfzoo is not installed; bad input leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from nfzoo import CheckpointError, ConfigError, NFNet, Preprocessing, create, from_pretrained
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.config import config_from_dict
from nfzoo.data.loader import evaluation_batches
from nfzoo.data.source import open_split
from nfzoo.evaluate import score
from nfzoo.export.quantize import accuracy_of_int8, quantize_onnx, quantize_torch
from nfzoo.export.run import FORMATS, SHEET, export, main, sheet
from nfzoo.train.run import TrainConfig, train
from tests.support.helpers import FAMILIES, SMALL, images, random_params, relative
from tests.support.pictures import write_images

CLOSE = 1e-5  # float32 sums in another order
INT8 = 0.01  # of the held-out digits, three or four may change sides
LABELS = tuple("abcde")

# A process that has the program and numpy's arrays, and no nfzoo.
WITHOUT_NFZOO = """
import sys
sys.modules["nfzoo"] = None
import warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from torch._inductor import aoti_load_package
load = {"aoti": aoti_load_package, "torch": lambda path: torch.export.load(path).module()}[sys.argv[1]]
run = load(sys.argv[2])
for path in sys.argv[3:]:
    with torch.no_grad():
        np.save(path + ".out.npy", run(torch.from_numpy(np.load(path))).numpy())
try:
    import nfzoo
except ImportError:
    print("no nfzoo")
"""


def shell(name: str = "nfnet", size: int = 32) -> NFNet:
    cfg = SMALL[name].replace(depths=(1, 1, 1, 1))
    made = NFNet(cfg, preprocessing=Preprocessing(train_size=size, test_size=size), labels=LABELS, name="mine")
    made.load_state_dict(random_params(cfg))
    return made.eval()


def run_elsewhere(format: str, path: Path, inputs: list[torch.Tensor], folder: Path) -> list[np.ndarray]:
    files = []
    for i, x in enumerate(inputs):
        np.save(folder / f"{i}.npy", x.numpy())
        files.append(str(folder / f"{i}.npy"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NFZOO, format, str(path), *files],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "no nfzoo\n", done.stderr
    return [np.load(f"{file}.out.npy") for file in files]


def run_onnx(path: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": x.numpy()})
    return np.asarray(found)


@pytest.mark.parametrize("name", ["nfnet", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n != "nfnet")])
def test_onnx_computes_the_logits_of_any_number_of_images(name, tmp_path):
    model = shell(name)
    path = export(model, tmp_path / "out", format="onnx")
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", SHEET]
    for count in (1, 3):
        x = images(model.config, count, 32)
        assert relative(run_onnx(path, x), model(x)) < CLOSE


@pytest.mark.parametrize("name", ["nf-resnet-timm", *(pytest.param(n, marks=pytest.mark.long) for n in FAMILIES)])
def test_torch_program_runs_without_nfzoo_on_images_of_other_sizes(name, tmp_path):
    model = shell(name)
    path = export(model, tmp_path / "out", format="torch")
    fields = json.loads((path.parent / SHEET).read_text())
    assert fields["input"]["shape"] == ["batch", 3, "height", "width"]
    assert fields["multiple"] == 32
    inputs = [images(model.config, n, h, w) for n, h, w in ((1, 32, 32), (3, 96, 64), (2, 32, 160))]
    for x, found in zip(inputs, run_elsewhere("torch", path, inputs, tmp_path), strict=True):
        assert relative(found, model(x)) < CLOSE


@pytest.mark.parametrize(
    ("size", "step"),
    [
        *(pytest.param(size, step, marks=pytest.mark.long) for size, step in [(37, 1), (34, 2), (36, 4), (40, 8)]),
        pytest.param(48, 16, marks=pytest.mark.slow),
    ],
)
def test_torch_program_of_another_size_takes_all_of_its_kind(size, step, tmp_path):
    model = shell("nfnet", size=size)
    path = export(model, tmp_path / "out", format="torch")
    assert json.loads((path.parent / SHEET).read_text())["multiple"] == step
    run = torch.export.load(path).module()
    for height, width in ((size, size), (step, step), (50 * step, 33 * step), (64, 96)):
        x = images(model.config, 2, height, width)
        assert relative(run(x), model(x)) < CLOSE


@pytest.mark.long
def test_compiled_package_runs_without_nfzoo(tmp_path):
    model = shell()
    path = export(model, tmp_path / "out", format="aoti")
    inputs = [images(model.config, n, 32) for n in (1, 3)]
    for x, found in zip(inputs, run_elsewhere("aoti", path, inputs, tmp_path), strict=True):
        assert relative(found, model(x)) < CLOSE


def test_what_goes_in_and_comes_out_stands_beside_it(tmp_path):
    model = shell()
    model.provenance, model.temperature = {"data": "none"}, 1.5
    export(model.for_inference(), tmp_path, format="onnx", batch=2, size=64)
    fields = json.loads((tmp_path / SHEET).read_text())
    assert fields["program"] == "onnx"
    assert fields["file"] == "model.onnx"
    assert fields["input"] == {"name": "images", "shape": [2, 3, 64, 64], "dtype": "float32"}
    assert fields["output"] == {"name": "logits", "shape": [2, 5], "dtype": "float32"}
    assert fields["labels"] == list(LABELS)
    assert fields["provenance"] == {"data": "none"}
    assert fields["temperature"] == 1.5
    assert Preprocessing.from_dict(fields["preprocessing"]) == model.preprocessing
    assert config_from_dict(fields["architecture"]) == model.config.replace(folded=True)
    assert run_onnx(tmp_path / "model.onnx", images(model.config, 2, 64)).shape == (2, 5)


def test_a_multi_label_model_says_so_in_its_sheet():
    model = shell()
    fields = sheet(model, "onnx", 32, None)
    assert not {"problem_type", "thresholds", "temperature"} & fields.keys()
    model.problem_type, model.thresholds = MULTI_LABEL, (0.25,) * 5
    fields = sheet(model, "onnx", 32, None)
    assert (fields["problem_type"], fields["thresholds"]) == (MULTI_LABEL, [0.25] * 5)


def test_exporting_leaves_the_model_alone():
    model = shell().train()
    with pytest.raises(ConfigError, match="format 'tflite' is not known; choose one of onnx, aoti, torch, openvino"):
        export(model, "nowhere", format="tflite")
    assert model.training
    assert not Path("nowhere").exists()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(model, images, batch, path):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setitem(FORMATS, "torch", FORMATS["torch"]._replace(write=fail))
    shell().save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--format", "torch", "--output", str(tmp_path / "out")]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--format"),
        (["--format", "tflite"], "tflite"),
        (["--format", "onnx", "--size", "0"], "'0' is not a whole number"),
        (["--format", "onnx", "--batch", "many"], "'many' is not a whole number"),
        (["--format", "onnx", "--device", "cpu"], "--device is for aoti"),
        (["--format", "aoti", "--device", "nonsense"], "nonsense"),
        (["--format", "onnx", "--training"], "--training is for stablehlo"),
        (["--format", "torch", "--int8", "digits"], "--int8 is for onnx, openvino, litert, executorch, not torch"),
        (["--format", "stablehlo", "--int8", "digits"], "--int8 is for onnx, openvino"),
        (["--format", "onnx", "--int8", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path, capsys):
    shell().save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nfzoo export: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_bad_model_or_place_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    shell().save_pretrained(tmp_path / "model")
    for model, output, message in (
        ("no/such/folder/here", "out", "no file or folder"),
        (str(tmp_path / "model"), str(tmp_path / "file"), "is a file; give a folder"),
        (str(tmp_path / "model"), str(tmp_path / "file" / "out"), "no folder that takes files"),
    ):
        assert main([model, "--format", "torch", "--output", output]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "x"


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    shell("nf-resnet-timm").for_inference().save_pretrained(tmp_path / "model")  # folded already
    out = tmp_path / "out"
    assert main([str(tmp_path / "model"), "--format", "torch", "--output", str(out), "--batch", "2"]) == 0
    assert capsys.readouterr().out == f"wrote {out / 'model.pt2'}\nwrote {out / SHEET}\n"
    assert json.loads((out / SHEET).read_text())["input"]["shape"] == [2, 3, "height", "width"]


# ---------------------------------------------------------------- eight bits


@pytest.mark.parametrize("call", [lambda b: quantize_torch(shell().for_inference(), b)])
def test_quantisation_needs_images_and_a_folded_model(call):
    with pytest.raises(ConfigError, match="at least one batch"):
        call([])
    with pytest.raises(ConfigError, match="folded model"):
        quantize_torch(shell(), [torch.zeros(1, 3, 32, 32)])


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A model that reads digits."""
    folder = tmp_path_factory.mktemp("digits") / "model"
    train(TrainConfig(model="nfnet-test", data="digits", output=str(folder), epochs=6))
    return folder


@pytest.mark.long
def test_int8_reads_as_many_digits(reader, tmp_path, capsys):
    """Through onnxruntime and through torchao, calibrated on images of the training part."""
    model = from_pretrained(reader).for_inference()
    digits = open_split("digits")

    def batches(part):
        return evaluation_batches(part, model.preprocessing, batch_size=64, rank=0, world=1, workers=0)

    def accuracy(logits) -> float:
        return score(logits, batches(digits.validation), device="cpu").top1

    before = accuracy(model)
    assert before > 0.95
    assert main([str(reader), "--format", "onnx", "--output", str(tmp_path), "--int8", "digits"]) == 0
    told = re.search(r"accuracy on 359 held-out images: ([\d.]+)% before, ([\d.]+)% in int8", capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) / 100 == pytest.approx(before, abs=1e-4)
    quantised = accuracy(lambda x: torch.from_numpy(run_onnx(tmp_path / "model.onnx", x)))
    assert float(told[2]) / 100 == pytest.approx(quantised, abs=1e-4)
    assert json.loads((tmp_path / SHEET).read_text())["arithmetic"] == "int8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", SHEET]
    assert accuracy(lambda x: torch.from_numpy(run_onnx(tmp_path / "model.onnx", x))) > before - INT8

    calibration = [x for x, _ in batches(digits.train)][:4]
    eight = quantize_torch(model, calibration)
    calls = [str(node.target) for node in eight.graph.nodes]  # type: ignore[union-attr]
    kernels = sum(p.ndim in (2, 4) for p in model.parameters())
    assert sum("dequantize_per_channel" in call for call in calls) == kernels
    assert accuracy(eight) > before - INT8


@pytest.mark.slow
def test_a_broken_image_leaves_the_accuracy_in_int8_unmeasured(tmp_path: Path) -> None:
    """The program is written by then."""
    folder = write_images(tmp_path / "pets", {"cat": 2, "dog": 2})
    (folder / "dog" / "0.png").write_bytes(b"no image")
    said = accuracy_of_int8(create("nfnet-test", num_classes=2), tmp_path / "model.onnx", str(folder), None, None)
    assert said.startswith("the accuracy was not measured: ")
    assert "dog/0.png" in said


def test_int8_onnx_has_eight_bit_weights(tmp_path):
    model = shell("nf-regnet")
    path = export(model, tmp_path, format="onnx")
    x = images(model.config, 4, 32)
    quantize_onnx(path, tmp_path / "int8.onnx", [x])
    assert relative(run_onnx(tmp_path / "int8.onnx", x), model(x)) < 0.2  # random weights, seven bits
    with pytest.raises(ConfigError, match="at least one batch"):
        quantize_onnx(path, tmp_path / "none.onnx", [])
    import onnx

    for file in (path, tmp_path / "int8.onnx"):
        graph = onnx.load(str(file)).graph
        for value in (graph.input[0], graph.output[0]):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch", file
        names = {d.dim_param for value in graph.value_info for d in value.type.tensor_type.shape.dim}
        assert not [name for name in names if re.search(r"\bs\d+", name)], names
    types = {t.data_type for t in onnx.load(str(tmp_path / "int8.onnx")).graph.initializer}
    assert onnx.TensorProto.INT8 in types


def test_formats_name_the_extra_that_they_need(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    away = ("openvino", "litert_torch", "executorch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in away else find(name))
    for format, package, extra in (
        ("openvino", "openvino", r"openvino,export"),
        ("litert", "litert_torch", "litert"),
        ("executorch", "executorch", "executorch"),
    ):
        with pytest.raises(ConfigError, match=rf"{format} needs {package}: pip install 'nfzoo\[{extra}\]'"):
            export(shell("nf-regnet"), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_program_of_one_batch_is_float32_and_replaces_its_own_files(tmp_path, monkeypatch):
    """As `litert` and `executorch` are; here with a writer that keeps what it was given."""
    seen = []

    def write(model, images, batch, path):
        seen.append((tuple(images.shape), batch, images.dtype, next(model.parameters()).dtype))
        path.write_bytes(b"program")
        path.with_name("model.bin").write_bytes(b"weights")

    kind = FORMATS["litert"]._replace(write=write, needs=(), beside=("model.bin",))
    monkeypatch.setitem(FORMATS, "litert", kind)
    model = shell("nf-regnet").bfloat16()
    for batch in (None, 3):
        export(model, tmp_path / "out", format="litert", batch=batch)
        fields = json.loads((tmp_path / "out" / SHEET).read_text())
        assert fields["input"]["shape"] == [batch or 1, 3, 32, 32]
        assert fields["arithmetic"] == "float32"
    assert seen == [((n, 3, 32, 32), n, torch.float32, torch.float32) for n in (1, 3)]
    model.save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--format", "litert", "--output", str(tmp_path / "out")]) == 0


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys, monkeypatch):
    """An export beside another would leave a program that `nfzoo.json` does not describe."""
    for name in ("torch", "onnx"):
        instant = FORMATS[name]._replace(write=lambda model, images, batch, path: path.write_bytes(b"program"))
        monkeypatch.setitem(FORMATS, name, instant)
    shell().save_pretrained(tmp_path / "model")
    before = sorted(p.name for p in (tmp_path / "model").iterdir())
    for _ in range(2):
        assert main([str(tmp_path / "model"), "--format", "torch", "--output", str(tmp_path / "out")]) == 0
    for command in (["--format", "onnx", "--output", "out"], ["--format", "torch", "--output", "model"]):
        assert main([str(tmp_path / "model"), *command[:-1], str(tmp_path / command[-1])]) == 2
        assert "holds other files" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == before


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    model = shell()
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"head\.weight is not finite"):
        export(model, tmp_path / "out", format="torch")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_float64_becomes_float32_in_onnx(tmp_path):
    model = shell("nf-resnet-timm").double().eval()
    path = export(model, tmp_path / "out", format="onnx")
    x = images(model.config)
    assert relative(torch.from_numpy(run_onnx(path, x)), model(x.double())) < 1e-5
    assert json.loads((tmp_path / "out" / SHEET).read_text())["arithmetic"] == "float32"
