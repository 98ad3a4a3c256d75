"""The report of an evaluation: its figures are scikit-learn's, its page is safe and whole, its folder is its own."""

import builtins
import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nfzoo
from nfzoo.evaluate import main, report
from nfzoo.evaluate.page import page
from nfzoo.nn import NFNet
from nfzoo.predict import predict
from tests.evaluate.test_accuracy import LABELS, make_model
from tests.support.forks import run_in_group
from tests.support.loops import each
from tests.support.pictures import write_images

ALONE = ["--workers", "0", "--device", "cpu"]
# A batch of another size adds a convolution's terms in another order; logits are of order one.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "animals", {"bee": 11, "cat": 7, "gnu": 6})


@pytest.fixture(scope="module")
def model() -> NFNet:
    return make_model()


@pytest.fixture(scope="module")
def checkpoint(model: NFNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "animals")


@pytest.fixture(scope="module")
def written(checkpoint: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("reports") / "animals"
    assert main([str(checkpoint), "--data", str(folder), "--report", str(target), "--batch-size", "5", *ALONE]) == 0
    return target


def read(target: Path) -> dict[str, Any]:
    return json.loads((target / "report.json").read_text())


def logits_of(model: NFNet, folder: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, labels and logits, one image at a time."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    with torch.no_grad():
        logits = torch.cat([model(model.preprocess(path)[None]) for path in paths])
    names = [path.relative_to(folder).as_posix() for path in paths]
    return names, np.array([LABELS.index(path.parent.name) for path in paths]), logits.double().numpy()


# -- the figures


def test_the_figures_are_those_of_sklearn(model: NFNet, folder: Path, written: Path) -> None:
    from scipy.special import softmax
    from sklearn import metrics

    names, labels, logits = logits_of(model, folder)
    predictions, probabilities = logits.argmax(1), softmax(logits, axis=1)
    found = read(written)
    present = sorted({*labels.tolist()})
    macro = metrics.precision_recall_fscore_support(
        labels,
        predictions,
        labels=present,
        average="macro",
        zero_division=0,  # type: ignore[arg-type]
    )
    expected = {
        "top1": metrics.accuracy_score(labels, predictions),
        "top5": metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(8)),
        **dict(zip(("precision", "recall", "f1"), macro, strict=False)),
        "nll": metrics.log_loss(labels, probabilities, labels=range(8)),
    }
    for name, value in expected.items():
        row = found["metrics"][name]
        assert row["value"] == pytest.approx(value, abs=TOLERANCE), name
        assert row["low"] <= row["value"] <= row["high"], name
    by_class = metrics.precision_recall_fscore_support(labels, predictions, labels=range(8), zero_division=0)  # type: ignore[arg-type]
    for row in found["classes"]:
        values = [column[row["index"]] for column in by_class]  # type: ignore[index]
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(values)
        assert row["label"] == LABELS[row["index"]]
    shown = sorted({*labels.tolist(), *predictions.tolist()})
    assert [row["index"] for row in found["classes"]] == shown

    with (written / "confusion_matrix.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0][1:] == [row[0] for row in table[1:]] == [LABELS[i] for i in shown]
    matrix = metrics.confusion_matrix(labels, predictions, labels=shown)
    assert [[int(cell) for cell in row[1:]] for row in table[1:]] == matrix.tolist()

    wrong = [i for i in np.argsort(probabilities[np.arange(24), labels]) if labels[i] != predictions[i]]
    assert len(wrong) > 5
    assert [row["image"] for row in found["mistakes"]] == [names[i] for i in wrong]
    for row, i in zip(found["mistakes"], wrong, strict=True):
        assert (row["label"], row["predicted"]) == (LABELS[labels[i]], LABELS[predictions[i]])
        assert row["probability"] == pytest.approx(probabilities[i, labels[i]], abs=TOLERANCE)
        assert row["confidence"] == pytest.approx(probabilities[i].max(), abs=TOLERANCE)
    assert str(folder.parent) not in (written / "report.json").read_text() + (written / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "animals", {"bee": 11, "cat": 7, "gnu": 7})
    (data / "gnu" / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    options = [str(checkpoint), "--data", str(data), "--skip-broken", "--batch-size", "4", "--workers", "0"]
    first, second = run_in_group(main, [*options, "--report", str(tmp_path / "two")], tmp_path)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert (first[1].count("report.html"), second[1]) == (1, "")
    assert main([*options, "--report", str(tmp_path / "one"), *ALONE]) == 0
    two, one = read(tmp_path / "two"), read(tmp_path / "one")
    assert near(two, one), (two, one)
    assert one["evaluation"]["skipped"] == 1
    for name in ("confusion_matrix.csv", "mistakes.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def near(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else a == b


# -- the page


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        assert not [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_page_holds_all_and_loads_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    found = Page(text)
    assert found.tags.count("img") == len(found.addresses) == 3
    assert all(address.startswith("data:image/png;base64,iVBOR") for address in found.addresses)
    assert not {"script", "link", "iframe", "object"} & {*found.tags}
    assert not re.search(r"url\(|@import|https?:", text)
    fields = read(written)
    for share in (fields["metrics"]["top1"]["value"], fields["metrics"]["f1"]["high"]):
        assert f"{share:.2%}" in found.shown
    assert f"The temperature {fields['calibration']['temperature']:.4g} minimises" in found.shown
    assert "cross-fitted" in found.shown
    for row in (*fields["classes"], *fields["mistakes"]):
        assert row["label"] in found.shown


def test_text_from_files_is_text(written: Path) -> None:
    evil = "<script>alert(1)</script>\x1b[2J\"'&\udcff"
    fields = read(written)

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(v) for key, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return evil if isinstance(value, str) else value

    pictures: dict[str, bytes] = dict.fromkeys(("confusion_matrix.png", "reliability.png", "mistakes.png"), b"")
    text = page(spoil(fields), pictures)
    text.encode()
    assert "script" not in Page(text).tags
    assert sorted({*Page(text).tags}) == sorted({*Page(page(fields, pictures)).tags})
    assert "\x1b" not in text
    assert Page(text).shown.count("<script>alert(1)</script>\\x1b[2J\"'&\\udcff") > 20


def test_many_classes_and_none_wrong(tmp_path: Path, model: NFNet) -> None:
    data = write_images(tmp_path / "data", {f"{i:02}": 2 for i in range(62)})
    many = make_model(labels=[f"{i:02}" for i in range(64)], classes=64)
    options = ["--data", str(data), "--report", str(tmp_path / "many"), *ALONE]
    assert main([str(many.save_pretrained(tmp_path / "model")), *options]) == 0
    found = Page((tmp_path / "many" / "report.html").read_text())
    assert "The 20 of the lowest F1:" in found.shown
    assert found.tags.count("details") == 2

    sure = make_model(labels=["only", "other"], classes=2)
    with torch.no_grad():
        sure.get_parameter("head.weight").zero_()
        sure.get_parameter("head.bias").copy_(torch.tensor([9.0, 0.0]))
    data = write_images(tmp_path / "only", {"only": 3})
    assert (
        main([str(sure.save_pretrained(tmp_path / "sure")), "--data", str(data), "--report", str(tmp_path / "r")]) == 0
    )
    found = Page((tmp_path / "r" / "report.html").read_text())
    assert "There are none: all predictions are right." in found.shown
    assert "No temperature fits" in found.shown
    assert found.tags.count("img") == 2


# -- the folder


def test_the_folder_is_the_reports_own(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [str(checkpoint), "--data", str(folder), *ALONE]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("all of it")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "report.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for target, message in (
        (tmp_path / "other", "holds other files than a report's, such as 'thesis.tex'; give a new folder"),
        (tmp_path / "json", "holds other files than a report's"),
        (tmp_path / "file", "is a file; give a folder"),
        (folder / "bee" / "report", "among the data; give a folder elsewhere"),
    ):
        assert main([*options, "--report", str(target)]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert (out, err.count("\n")) == ("", 1)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]

    target = tmp_path / "new" / "report"
    assert main([*options, "--report", str(target)]) == 0
    assert {path.name for path in target.iterdir()} == {*report.FILES} - {"corruptions.png", "classes.csv"}
    before = (target / "confusion_matrix.csv").read_bytes()
    (target / "confusion_matrix.csv").write_text("")
    (target / "notes.txt").write_text("mine")
    monkeypatch.setattr(report, "_worst", lambda *_: [])  # of a better model
    assert main([*options, "--report", str(target)]) == 0
    assert (target / "confusion_matrix.csv").read_bytes() == before
    assert (target / "notes.txt").read_text() == "mine"
    assert not (target / "mistakes.png").exists()


def test_a_report_that_cannot_be_written_leaves_the_one_before(
    checkpoint: Path, folder: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    before = {path.name: path.read_bytes() for path in written.iterdir()}
    monkeypatch.setattr(report, "reliability_figure", full)
    for target in (written, tmp_path / "new"):
        assert main([str(checkpoint), "--data", str(folder), "--report", str(target), *ALONE]) == 1
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_nothing_is_evaluated(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([str(checkpoint), "--data", str(folder), "--report", str(tmp_path / "r"), *ALONE]) == 2
    assert "pip install 'nfzoo[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_json_on_standard_output_is_alone_there(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--report", str(tmp_path / "r"), "--json", "-", *ALONE]
    assert main([str(checkpoint), "--data", str(folder), *options]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == read(tmp_path / "r")["evaluation"]
    assert err == f"wrote {tmp_path / 'r' / 'report.html'}\n"


# -- the temperature


def test_a_temperature_is_saved_and_used(
    model: NFNet, folder: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = model.save_pretrained(tmp_path / "own")
    weights = (own / "model.safetensors").read_bytes()
    expected = read(written)["calibration"]["temperature"]
    for target in (own, tmp_path / "new"):
        assert main([str(own), "--data", str(folder), "--save-temperature", str(target), *ALONE]) == 0
        assert f"wrote {target}, with temperature {expected:.4f}\n" in capsys.readouterr().out
        warm = nfzoo.from_pretrained(target)
        assert warm.temperature == pytest.approx(expected, rel=1e-3)
        assert warm.temperature is not None
        assert all(torch.equal(a, b) for a, b in zip(warm.parameters(), model.parameters(), strict=True))
    assert (own / "model.safetensors").read_bytes() != weights  # its metadata have the temperature, too

    _, labels, logits = logits_of(model, folder)
    found = predict(warm, sorted((folder / "bee").glob("*.png")), topk=1)
    divided = torch.from_numpy(logits[:11]) / warm.temperature
    assert [row.top[0][1] for row in found] == pytest.approx(divided.softmax(1).max(1).values.tolist(), abs=TOLERANCE)

    # What is given is now calibrated as well as it can be on these images.
    assert main([str(own), "--data", str(folder), "--report", str(tmp_path / "again"), *ALONE]) == 0
    assert f", without the model's temperature of {warm.temperature:.4f}\n" in capsys.readouterr().out
    again = read(tmp_path / "again")["calibration"]
    assert again["as_given"]["temperature"] == warm.temperature
    assert again["temperature"] == pytest.approx(expected, rel=1e-3)
    assert again["as_given"]["nll"] < read(written)["calibration"]["as_given"]["nll"]
    loss = torch.nn.functional.cross_entropy(divided.new_tensor(logits / warm.temperature), torch.from_numpy(labels))
    assert again["as_given"]["nll"] == pytest.approx(float(loss), abs=TOLERANCE)


@each(
    ("target", "message"),
    [
        ("full", "is not empty, nor '.*/model' itself; give a new folder"),
        ("model/config.json", "is a file; give a folder"),
        ("new", "no temperature fits these images, so none is saved"),
    ],
)
def test_a_temperature_is_saved_nowhere_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, message: str
) -> None:
    (tmp_path / "full").mkdir(exist_ok=True)
    (tmp_path / "full" / "config.json").write_text("mine")
    model = make_model()
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
    model.save_pretrained(tmp_path / "model")
    options = ["--save-temperature", str(tmp_path / target), *ALONE]
    assert main([str(tmp_path / "model"), "--data", str(folder), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["full", "model"]
    assert (tmp_path / "full" / "config.json").read_text() == "mine"
