"""What a check of data finds, prints and draws, and its exit status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nfzoo.check.report import check
from nfzoo.cli.data import main
from nfzoo.cli.main import main as nfzoo
from tests.support.loops import each
from tests.support.pictures import write_images, write_shard


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Return a folder with one fault of each kind."""
    folder = tmp_path / "pets"
    write_images(folder / "train", {"cat": 12, "dog": 3, "fish": 10})
    write_images(folder / "val", {"bird": 1, "cat": 2, "dog": 2}, seed=1)
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / "again.png")
    shutil.copy(folder / "train" / "cat" / "1.png", folder / "val" / "cat" / "leak.png")
    shutil.copy(folder / "train" / "cat" / "2.png", folder / "train" / "fish" / "cat.png")
    (folder / "train" / "fish" / "cut.png").write_bytes((folder / "train" / "fish" / "1.png").read_bytes()[:300])
    (folder / "train" / "fish" / "x.psd").write_bytes(b"")
    return folder


def test_each_fault_is_found(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(pets), "--workers", "0", "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == {"train": {"cat": 13, "dog": 3, "fish": 12}, "val": {"bird": 1, "cat": 3, "dog": 2}}
    assert found["images"] == 34
    assert found["pixels"] == {"width": [24, 24, 24], "height": [20, 20, 20]}
    assert (found["modes"], found["odd"]) == ({"RGB": 33}, {})
    assert found["unreadable"]["images"] == 1
    (broken,) = found["unreadable"]["listed"]
    assert broken["image"].endswith("fish/cut.png")
    assert "cut off" in broken["problem"]
    copies = found["copies"]
    assert (copies["groups"], copies["images"]) == (3, 6)
    assert (copies["across_parts"], copies["across_classes"]) == (1, 1)
    leak = [g for g in copies["listed"] if len({c["part"] for c in g}) > 1]
    assert [Path(c["image"]).name for c in leak[0]] == ["1.png", "leak.png"]
    assert found["few_images"] == {"dog": 3}
    assert found["in_one_part"] == {"train": ["fish"], "val": ["bird"]}
    text = "\n".join(found["findings"])
    for words in (
        "1 .psd",
        "1 image cannot be read; mend or remove it, or train with --max-broken 1",
        "3 images repeat",
        "train and val share 1 group",
        "more than one class",
    ):
        assert words in text
    assert len(found["findings"]) == 8

    assert main(["check", str(pets), "--workers", "0"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("finding: ") == 8
    assert re.search(
        r"train: +28 images, 3 classes, from 3 to 13 images each\n +cat +13 +#{40}\n +dog +3 +#{9}\n", shown
    )
    assert f"copies:   {pets}/train/cat/1.png (train) = {pets}/val/cat/leak.png (val)\n" in shown


def test_clean_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "pets", {"cat": 10, "dog": 11})
    report = tmp_path / "new" / "report.json"
    assert nfzoo(["data", "check", str(folder), "--workers", "0", "--json", str(report)]) == 0
    assert "nothing was found that harms a training\n" in capsys.readouterr().out
    assert json.loads(report.read_text())["findings"] == []
    assert check(str(folder)).layout == "a folder of images for each class, of which training holds out a share"


@each(
    ("words", "message"),
    [
        (["check", "{none}"], "does not exist"),
        (["check", "{empty}"], "has no subfolders"),
        (["check"], "arguments are required: PATH"),
        ([], "arguments are required: VERB"),
        (["chek", "x"], "there is no 'chek' but check, card; did you mean 'check'?"),
        (["check", "{data}", "--sheet", "{data}/sheets"], "among the data"),
        (["check", "{data}", "--json", "{data}"], "is a folder; give a file"),
        (["check", "{data}", "--workers", "x"], "not a whole number"),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    folder = tmp_path_factory.mktemp("data")
    (folder / "empty").mkdir()
    data = write_images(folder / "pets", {"cat": 2})
    paths = {"none": folder / "none", "empty": folder / "empty", "data": data}
    assert main([word.format(**paths) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"nfzoo data.*: error: [^\n]+\n", err), err
    assert message in err


def test_a_sheet_for_each_class(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pets / "train" / "cat").rename(pets / "train" / "a cat, or two")
    assert main(["check", str(pets), "--workers", "0", "--sheet", str(tmp_path / "sheets")]) == 1
    assert capsys.readouterr().out.endswith(f"wrote 5 sheets to {tmp_path}/sheets\n")
    names = ["000-a_cat_or_two.png", "001-dog.png", "002-fish.png", "003-bird.png", "004-cat.png"]
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == names
    sizes = []
    for name in names:
        with Image.open(tmp_path / "sheets" / name) as sheet:
            sizes.append(sheet.size)
    assert sizes[2] == sizes[0] != sizes[3]  # 11 readable and 13 images, and one image


def test_a_full_disk_is_no_finding(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nfzoo.cli.data.write_sheets", full)
    assert main(["check", str(pets), "--workers", "0", "--sheet", str(tmp_path / "sheets")]) == 2
    assert "came to no end: [Errno 28] No space left" in capsys.readouterr().err


def test_classes_of_numbers_that_a_part_lacks(tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "train-0.tar", {f"{i:02}": i % 3 for i in range(30)})
    write_shard(tmp_path / "s" / "val-0.tar", {"a": 0, "b": 2}, seed=1)
    report = check(str(tmp_path / "s"))
    assert report.in_one_part == {"train": ["1"]}
    assert report.layout == "tar files, in the parts train and val"
    assert report.findings() == ["1 class in train alone: '1'"]


def test_labels_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "photos", {"a": 12, "b": 12})
    text = "".join(f"{d}/{i}.png,{'cat' if i % 2 else 'dog'}\n" for d in "ab" for i in range(12) if (d, i) != ("b", 3))
    (tmp_path / "l.csv").write_text(f"path,label\n{text}")
    assert main(["check", str(folder), "--labels", f"{tmp_path}/l.csv", "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == {"all": {"cat": 11, "dog": 12}}
    assert found["findings"] == [f"images without a label are left out: 1 in {folder}, such as b/3.png"]
    assert found["layout"] == "a folder of images, and their labels, of which training holds out a share"
    # The same picture in both tables, under two names.
    shutil.copy(folder / "a" / "0.png", folder / "b" / "again.png")
    (tmp_path / "v.csv").write_text("path,label\nb/again.png,dog\nb/3.png,cat\n")
    words = ["check", str(folder), "--labels", f"{tmp_path}/l.csv", "--validation-labels", f"{tmp_path}/v.csv"]
    assert main([*words, "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == {"train": {"cat": 11, "dog": 12}, "validation": {"cat": 1, "dog": 1}}
    assert found["copies"]["across_parts"] == 1
    assert main(["check", str(folder), "--class-names", "x"]) == 2
    assert "goes with a file of labels" in capsys.readouterr().err


def test_one_class_alone_is_a_finding(tmp_path: Path) -> None:
    report = check(str(write_images(tmp_path / "pets", {"cat": 12})))
    assert report.findings() == ["there is one class alone, cat; nothing is to be told apart"]


def test_sets_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "photos", {"a": 30})
    shutil.copy(data / "a" / "0.png", data / "a" / "1.png")
    table = tmp_path / "labels.csv"
    sets = ["cat", "cat|dog", *["cat|dog"] * 12, *["dog"] * 10, *[""] * 6]
    table.write_text("path,label\n" + "".join(f"a/{i}.png,{labels}\n" for i, labels in enumerate(sets)))
    options = [str(data), "--labels", str(table)]
    assert main(["check", *options]) == 2
    assert "--task multi-label" in capsys.readouterr().err
    sheets = tmp_path / "sheets"
    target = tmp_path / "found.json"
    assert main(["check", *options, "--task", "multi-label", "--sheet", str(sheets), "--json", str(target)]) == 1
    said = capsys.readouterr().out
    assert "all:      30 images, 2 classes, from 14 to 23 images each, 6 without a label" in said
    assert "more than one set of labels has copies of the same image, in 1 group" in said
    found = json.loads(target.read_text())
    assert (found["images"], found["classes"]) == (30, {"all": {"cat": 14, "dog": 23}})
    assert "1 image repeats the bytes of another, in 1 group" in found["findings"]
    assert [one["class"] for one in found["copies"]["listed"][0]] == ["cat", "cat|dog"]
    assert sorted(path.name for path in sheets.iterdir()) == ["000-cat.png", "001-dog.png"]
    cards = []
    for name in ("000-cat.png", "001-dog.png"):
        with Image.open(sheets / name) as sheet:
            cards.append(sheet.size[1])
    assert cards[0] < cards[1], "each sheet has the images of its own label"
