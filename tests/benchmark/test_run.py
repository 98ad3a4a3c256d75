"""`nfzoo benchmark`: its table, its JSON, its picture, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from nfzoo.benchmark import contenders
from nfzoo.benchmark.contenders import Contender, Program, Task
from nfzoo.cli.main import main
from nfzoo.nn import create
from tests.support.loops import each


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = create("nfnet-test", labels=[str(i) for i in range(10)])
    model.name = "mine"
    return model.save_pretrained(tmp_path / "model")


def test_table_json_and_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(task: Task, precision: str) -> Program:
        raise RuntimeError("\x1b[31mred")

    others = (Contender("onnx", "float32", breaks), Contender("openvino", "int8", breaks, "openvino", ("no_such",)))
    monkeypatch.setattr(contenders, "CONTENDERS", (*contenders.CONTENDERS[:3], *others))
    small = ["--data", "digits", "--images", "20", "--rounds", "2", "--batch-size", "4"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert main(["benchmark", str(model), *small, *files]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("mine, 32 pixels, batches of 4, ")
    assert lines[0].endswith("; 20 images: digits, held out")
    assert {tuple(line.split()[:2]) for line in lines[2:5]} == {
        ("eager", "float32"),
        ("eager", "bf16"),
        ("folded", "float32"),
    }
    assert lines[5] == r"onnx float32 failed: RuntimeError: \x1b[31mred"
    assert lines[6] == "openvino int8 is left out: needs no_such: pip install 'nfzoo[openvino]'"
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result["model"], result["images"], result["batch"], result["rounds"]) == ("mine", 20, 4, 2)
    measured = [row for row in result["results"] if row["status"] == "measured"]
    assert [row["agreement"] for row in measured if row["precision"] == "float32"] == [1.0, 1.0]
    assert all(row["milliseconds"] > 0 and 0 <= row["accuracy"] <= 1 for row in measured)
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.format == "PNG"
    assert main(["benchmark", str(model), "--formats", "eager", "--rounds", "1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == "random images"


@each(
    ("options", "words"),
    [
        (["--formats", "eager,tensorrt"], "no format 'tensorrt'"),
        (["--precisions", ""], "no precision ''"),
        (["--plot", "x.jpg"], "must end in .png"),
        (["--rounds", "0"], "'0' is not a whole number"),
        (["--data", "no-such-data"], "no-such-data"),
        (["--json", "."], "is a folder"),
    ],
)
def test_refusals(model: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert main(["benchmark", str(model), *options]) == 2
    assert words in capsys.readouterr().err
