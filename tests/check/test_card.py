"""The card of a data set: what it says, and that the Hub's client and `datasets` read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from nfzoo.check.card import data_card, size_category
from nfzoo.check.report import check
from nfzoo.cli.data import main
from nfzoo.cli.main import main as nfzoo
from nfzoo.data.label_files import LabelFiles
from nfzoo.runtime.output import escaped, markdown_text
from tests.support.loops import each
from tests.support.pictures import write_images, write_shard


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    write_images(tmp_path / "pets" / "train", {"cat": 12, "dog": 10})
    write_images(tmp_path / "pets" / "val", {"cat": 2, "bird": 1}, seed=1)
    return tmp_path / "pets"


def test_a_folder_of_classes(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = pets / "README.md"
    assert nfzoo(["data", "card", str(pets), "--output", str(readme), "--workers", "0", "--license", "mit"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"wrote {readme}\n"
    assert "`nfzoo data check` finds faults" in shown.err  # one class in each part alone
    card = DatasetCard.load(readme)
    assert card.data.to_dict() == {
        "license": "mit",
        "pretty_name": "pets",
        "task_categories": ["image-classification"],
        "task_ids": ["multi-class-image-classification"],
        "size_categories": ["n<1K"],
        "dataset_info": {
            "features": [
                {"name": "image", "dtype": "image"},
                {"name": "label", "dtype": {"class_label": {"names": {"0": "bird", "1": "cat", "2": "dog"}}}},
            ],
            "splits": [{"name": "train", "num_examples": 22}, {"name": "validation", "num_examples": 3}],
        },
    }
    for line in ("| label | train | val |", "| bird | 0 | 1 |", "| cat | 12 | 2 |", "| in all | 22 | 3 |"):
        assert line in card.text
    assert "| width | 24 to 24 pixels, median 24 |" in card.text
    assert str(pets.parent) not in card.content
    # What is there is not replaced unasked.
    before = readme.read_bytes()
    for options, status in (([], 2), (["--overwrite"], 0)):
        assert main(["card", str(pets), "--output", str(readme), "--workers", "0", *options]) == status
        assert (readme.read_bytes() == before) == (status == 2)
    assert "is there already; --overwrite replaces it" in capsys.readouterr().err
    assert "To be filled in by whoever publishes the data" in readme.read_text()
    assert "license" not in DatasetCard.load(readme).data.to_dict()


@pytest.mark.slow
def test_datasets_loads_what_the_card_describes(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes labels from the card, and compares its numbers with what it finds."""
    datasets = pytest.importorskip("datasets")
    (pets / "README.md").write_text(data_card(check(str(pets))))
    loaded = datasets.load_dataset(str(pets), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 22, "validation": 3}
    assert loaded["train"].features["label"].names == ["bird", "cat", "dog"]
    assert sorted(loaded["validation"]["label"]) == [0, 1, 1]
    whole = tmp_path / "whole"
    shutil.copytree(pets / "train", whole)
    (whole / "README.md").write_text(data_card(check(str(whole))))
    assert len(datasets.load_dataset(str(whole), cache_dir=str(tmp_path / "cache"))["train"]) == 22
    next((pets / "train" / "cat").iterdir()).unlink()
    with pytest.raises(datasets.exceptions.NonMatchingSplitsSizesError):
        datasets.load_dataset(str(pets), cache_dir=str(tmp_path / "other"))


def test_other_layouts_have_their_labels_in_the_text(pets: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("path,label\ncat/0.png,a|b\ncat/1.png,\ndog/0.png,b\n")
    several = check(str(pets / "train"), labels=LabelFiles(str(table), multi_label=True))
    card = DatasetCard(data_card(several))
    assert card.data.to_dict()["task_ids"] == ["multi-label-image-classification"]
    assert "dataset_info" not in card.data.to_dict()
    assert "| label | images |\n| --- | --- |\n| a | 1 |\n| b | 2 |\n| in all | 3 |" in card.text
    write_shard(tmp_path / "x.tar", {"a": 2, "b": 1})
    card = DatasetCard(data_card(check(str(tmp_path / "x.tar")), name="Shards"))
    assert "dataset_info" not in card.data.to_dict()
    assert card.data.to_dict()["pretty_name"] == "Shards"
    card = DatasetCard(data_card(check("digits")))
    assert card.data.to_dict()["size_categories"] == ["1K<n<10K"]


def test_numbers_that_others_may_count_differently_are_left_out(pets: Path) -> None:
    """`datasets` reads more formats, and would refuse data of another number."""
    (pets / "train" / "cat" / "x.psd").write_bytes(b"8BPS")
    info = DatasetCard(data_card(check(str(pets)))).data.to_dict()["dataset_info"]
    assert "features" in info
    assert "splits" not in info


def test_folders_in_a_class_are_no_labels(pets: Path) -> None:
    """`datasets` takes the folder that an image lies in for its label, and would not know it."""
    write_images(pets / "val" / "cat", {"more": 1}, seed=2)
    card = DatasetCard(data_card(check(str(pets))))
    assert "| cat | 12 | 3 |" in card.text
    assert "dataset_info" not in card.data.to_dict()


@each("label", ["<b>x", "a|b", "`x`", "# x", "[a](b)", "no", "1", "null", "a: b", "\x1b[2J", "a\n---\nb", "{{x}}"])
def test_labels_are_text(label: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    folder = write_images(tmp_path / "d", {"zebra": 1})
    try:
        shutil.copytree(folder / "zebra", folder / label)
    except OSError:
        pytest.fail(f"{label!r} is no name of a folder here")
    card = DatasetCard(data_card(check(str(folder))))
    (_, described) = card.data.to_dict()["dataset_info"]["features"]
    assert label in described["dtype"]["class_label"]["names"].values()
    assert f"| {markdown_text(label)} | 1 |" in card.text
    assert escaped(label).isprintable()


def test_sizes() -> None:
    sizes = {0: "n<1K", 999: "n<1K", 1000: "1K<n<10K", 10**6 - 1: "100K<n<1M", 10**8: "100M<n<1B", 10**9: "n>1B"}
    assert {n: size_category(n) for n in sizes} == sizes


def test_what_is_refused(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        (["--license", "a\nb"], "licence must be one line"),
        (["--name", ""], "name must be one line"),
        (["--output", str(tmp_path)], "is a folder"),
    ):
        assert main(["card", str(pets), *options]) == 2
        assert told in capsys.readouterr().err
    assert main(["card", str(tmp_path / "none")]) == 2
    assert main(["card", str(pets), "--workers", "0"]) == 0
    assert capsys.readouterr().out.startswith("---\nsize_categories:\n")
