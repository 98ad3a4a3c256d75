"""Labels of images from tables: which columns, parts and classes they have, and which tables are refused."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nfzoo.data import hf_datasets
from nfzoo.data.images import ImageFolder
from nfzoo.data.label_files import LabelFiles, has_split, label_files, open_label_files
from nfzoo.data.source import has_held_out, open_held_out, open_parts, open_split
from nfzoo.errors import ConfigError, DataError, NfzooError
from tests.support.loops import each
from tests.support.pictures import check_source, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images a/0.png to a/5.png and b/0.png to b/3.png, which are of no classes."""
    return write_images(tmp_path_factory.mktemp("data") / "photos", {"a": 6, "b": 4})


ROWS = [(f"a/{i}.png", ("cat", "dog")[i % 2]) for i in range(6)] + [(f"b/{i}.png", "cat") for i in range(4)]


def table(path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("path", "label")) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def classes(images: ImageFolder) -> dict[str, str]:
    """Name of each image -> its class."""
    return {images.name(i): images.classes[images.labels[i]] for i in range(len(images))}


def test_a_row_for_each_image(tmp_path: Path, folder: Path) -> None:
    labels = table(tmp_path / "l.csv", ROWS)
    first, held_out, name = open_label_files(str(folder), LabelFiles(labels))
    assert (held_out, name) == (None, None)
    assert classes(first) == dict(ROWS)
    assert first.classes == ("cat", "dog")
    check_source(first)
    assert list(first.files()) == [str(folder / path) for path, _ in ROWS]
    # Neither the order of the rows nor that of the columns matters, nor how a table is written.
    turned = tmp_path / "turned.csv"
    turned.write_text("\ufeffid; Label ;FILE\n" + "".join(f"7;{label};./{path}\n\n" for path, label in ROWS[::-1]))
    tabs = tmp_path / "tabs.tsv"
    tabs.write_text("label\tpath\r\n" + "".join(f"{label}\t{folder.resolve()}/{path}\r\n" for path, label in ROWS))
    columns = {"image": [{"bytes": b"1"}] * 10, "filename": [p for p, _ in ROWS], "label": [x for _, x in ROWS]}
    parquet = tmp_path / "l.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), parquet)
    odd = table(tmp_path / "odd.csv", [(x, p, "z") for p, x in ROWS], ("breed", "where", "label"))
    for source in (str(turned), str(tabs), f"{parquet}?path=filename", f"{odd}?path=where&label=breed"):
        again = open_label_files(str(folder), LabelFiles(source)).first
        assert [again.name(i) for i in range(10)] == [first.name(i) for i in range(10)], source
        assert again.labels.tolist() == first.labels.tolist(), source


def test_a_column_splits_the_images(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = ["train"] * 5 + ["Val"] * 2 + ["test"] * 3
    rows = [(*row, part) for row, part in zip(ROWS, parts, strict=True)]
    files = LabelFiles(table(tmp_path / "l.csv", rows, ("path", "label", "split")))
    train, validation = open_split(str(folder), labels=files)
    assert (len(train), len(validation)) == (5, 2)
    assert train.classes == validation.classes == ("cat", "dog")
    assert "3 images of the part 'test', which are left out" in caplog.text
    assert has_split(files)
    assert has_held_out(str(folder), labels=files)
    part = open_held_out(str(folder), labels=files)
    assert (part.split, [part.images.name(i) for i in range(2)]) == ("Val", ["a/5.png", "b/0.png"])
    tested = LabelFiles(f"{files.labels}?validation=test")
    assert [len(images) for images in open_split(str(folder), labels=tested)] == [5, 3]
    both = LabelFiles(f"{files.labels}?train=test&validation=train")
    assert [len(images) for images in open_split(str(folder), labels=both)] == [3, 5]
    folds = table(tmp_path / "folds.csv", [(*row, i % 5) for i, row in enumerate(ROWS)], ("path", "label", "fold"))
    train, validation = open_split(str(folder), labels=LabelFiles(f"{folds}?validation=3"))
    assert [validation.name(i) for i in range(2)] == ["a/3.png", "b/2.png"]
    assert len(train) == 8


def test_a_table_of_their_own_for_the_images_that_are_held_out(tmp_path: Path, folder: Path) -> None:
    files = LabelFiles(table(tmp_path / "t.csv", ROWS[:7]), table(tmp_path / "v.csv", ROWS[7:]))
    train, validation = open_split(str(folder), labels=files)
    assert (len(train), len(validation)) == (7, 3)
    assert has_held_out(str(folder), labels=files)
    assert list(open_parts(str(folder), labels=files)) == ["train", "validation"]
    with pytest.raises(DataError, match=r"'a/0.png' is both in .*t.csv' and in .*w.csv'"):
        open_split(str(folder), labels=files._replace(validation=table(tmp_path / "w.csv", ROWS[:1])))
    gone = table(tmp_path / "g.csv", [*ROWS[7:], ("b/9.png", "cat")])
    with pytest.raises(DataError, match=r"1 of the 4 images that .*g.csv' names .* in line 5 of .*g.csv'"):
        open_split(str(folder), labels=files._replace(validation=gone))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    strange = table(tmp_path / "x.csv", [*ROWS[7:9], (ROWS[9][0], "cow")])
    with pytest.raises(DataError, match=r"line 4 of .*x.csv' has the label 'cow'"):
        open_split(str(folder), labels=files._replace(validation=strange, class_names=str(tmp_path / "names.txt")))
    split = table(tmp_path / "s.csv", [(*row, "train") for row in ROWS[:7]], ("path", "label", "split"))
    with pytest.raises(ConfigError, match=r"s.csv' has a column that splits .*v.csv' holds images out as well"):
        open_split(str(folder), labels=files._replace(labels=split))


def test_chance_holds_out_what_no_table_does(tmp_path: Path, folder: Path) -> None:
    files = LabelFiles(table(tmp_path / "l.csv", ROWS))
    assert not has_held_out(str(folder), labels=files)
    train, validation = open_split(str(folder), labels=files, validation_fraction=0.3)
    assert (len(train), len(validation)) == (7, 3)
    assert sorted(validation.labels) == [0, 0, 1]


def test_names_of_classes(tmp_path: Path, folder: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("dog\nCafe\u0301\ncat\n\n", encoding="utf-8")
    labels = table(tmp_path / "l.csv", ROWS)
    named = open_label_files(str(folder), LabelFiles(labels, None, str(names))).first
    assert named.classes == ("dog", "Café", "cat")  # the accent as one character
    assert classes(named) == dict(ROWS)
    numbers = table(tmp_path / "n.csv", [(path, {"cat": 2, "dog": 0}[label]) for path, label in ROWS])
    assert classes(open_label_files(str(folder), LabelFiles(numbers, None, str(names))).first) == dict(ROWS)
    plain = table(tmp_path / "p.csv", [(path, 9 + i % 3) for i, (path, _) in enumerate(ROWS)])
    assert open_label_files(str(folder), LabelFiles(plain)).first.classes == ("9", "10", "11")
    columns = {"path": [path for path, _ in ROWS], "label": [9 + i % 3 for i in range(10)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    assert open_label_files(str(folder), LabelFiles(str(tmp_path / "p.parquet"))).first.classes == ("9", "10", "11")
    for text, message in (
        ("cat\n\ndog\n", r"line 2 of .*names.txt' is empty"),
        ("cat\ndog\ncat\n", r"have 'cat' in lines 1 and 3"),
        ("\n", "are empty"),
        ("cat\ndig\n", r"line 3 of .*l.csv' has the label 'dog', .* none of the 2 classes .*did you mean 'dig'"),
    ):
        names.write_text(text)
        with pytest.raises(DataError, match=message):
            open_label_files(str(folder), LabelFiles(labels, None, str(names)))
    names.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"names.txt' are not in UTF-8; save them in it"):
        open_label_files(str(folder), LabelFiles(labels, None, str(names)))
    names.write_text("a\nb\n")
    with pytest.raises(DataError, match="has the label '2', which is none of the 2 classes"):
        open_label_files(str(folder), LabelFiles(numbers, None, str(names)))
    with pytest.raises(ConfigError, match="goes with a file of labels"):
        label_files(None, None, str(names))
    with pytest.raises(ConfigError, match="goes with a file of labels"):
        label_files(None, "v.csv", None)
    assert label_files(None, None, None) is None
    assert label_files("l.csv", "v.csv", None) == LabelFiles("l.csv", "v.csv")


def test_rows_that_repeat_count_once(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = LabelFiles(table(tmp_path / "l.csv", [*ROWS, *ROWS[:3]]))
    assert len(open_label_files(str(folder), files).first) == 10
    assert "repeats the rows of 3 images, which count once" in caplog.text


def test_a_check_counts_images_that_no_row_names(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nfzoo"):
        open_parts(str(folder), labels=LabelFiles(table(tmp_path / "l.csv", ROWS[:8])))
    assert f"without a label are left out: 2 in {folder}, such as b/2.png" in caplog.text


REFUSED: dict[str, tuple[str, str]] = {
    "empty": ("", "are empty, or their first line is; its first line must name its columns"),
    "no header": (
        "a/0.png,cat\n",
        r"no column of paths with a usual name; the columns are 'a/0.png', 'cat'; .* first line",
    ),
    "no label": ("path,breed\na/0.png,cat\n", r"no column of labels .* 'path', 'breed'; .*add \?label=COLUMN"),
    "columns of 0 and 1": (
        "path,cat,dog\na/0.png,1,0\n",
        r"or \?labels=\* for columns of 0 and 1; .*--task multi-label",
    ),
    "a column twice": ("path,label,label\n", "two columns 'label'"),
    "no rows": ("path,label\n", "no rows but the first"),
    "a label is missing": ("path,label\na/0.png,cat\na/1.png,\n", r"line 3 of .* has no label; fill it in"),
    "a path is missing": ("path,label\n ,cat\n", r"line 2 of .* has no path"),
    "a part is missing": ("path,label,split\na/0.png,cat,\n", r"line 2 of .* has no split"),
    "a file is missing": (
        "path,label\na/0.png,cat\nb/9.png,cat\n",
        r"1 of the 2 images .* missing in .*'b/9.png' in line 3 of ",
    ),
    "a folder": ("path,label\na,cat\n", r"1 of the 1 images .* missing"),
    "two labels": (
        "path,label\na/0.png,cat\n./a/0.png,dog\n",
        r"line 3 of .* 'a/0.png' with the label 'dog', and 2 .*'cat'",
    ),
    "two parts": (
        "path,label,split\na/0.png,c,train\na/0.png,c,val\n",
        r"with the part 'val', and 2 has it with 'train'",
    ),
    "outside": ("path,label\n../x.png,cat\n", r"line 2 of .* names '../x.png', which is not in the folder"),
    "outside, absolute": ("path,label\n/etc/passwd,cat\n", r"names '/etc/passwd', which is not in the folder"),
    "outside, by a turn": ("path,label\na/../../photos2/0.png,cat\n", "not in the folder"),
    "cells": ("path,label\na/0.png\n", "line 2 has 1 cells, and the first has 2"),
    "quotes": ('path,label\n"a/0.png"x,cat\n', "cannot be read: .*expected after"),
    "one part": (
        "path,label,split\na/0.png,cat,train\n",
        r"no part to hold out; its parts are 'train'; add \?validation=",
    ),
    "no part to train on": ("path,label,split\na/0.png,cat,val\n", "no part to train on; its parts are 'val'"),
    "an odd part": (
        "path,label,split\na/0.png,c,train\na/1.png,c,val\na/2.png,c,x\n",
        r"line 4 of .* has the part 'x'",
    ),
}


@each("name", REFUSED)
def test_tables_that_are_refused(tmp_path: Path, folder: Path, name: str) -> None:
    text, message = REFUSED[name]
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        open_label_files(str(folder), LabelFiles(str(tmp_path / "l.csv")))
    assert "\n" not in str(raised.value)


@each(
    ("source", "message"),
    [
        ("{l}?path=where", r"no column 'where' for \?path=; the columns are 'path', 'label'"),
        ("{l}?image=x", "does not take the option 'image'; it takes path, label, split"),
        ("{l}?path=", "an option without a value"),
        ("{l}?train=x", r"no column that splits its images, for \?train="),
        ("{none}", r"the labels .*none.csv' do not exist"),
        ("{folder}", "cannot be read: .*Is a directory"),
        ("{binary}", "are not in UTF-8; save them in it"),
        ("{parquet}", "cannot be read: .*[Pp]arquet"),
        ("{floats}", r"row 1 of .* has no label"),
    ],
)
def test_options_and_files_that_are_refused(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, source: str, message: str
) -> None:
    tmp_path = tmp_path_factory.mktemp("tables")
    (tmp_path / "binary.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 but no more")
    columns = {"path": ["a/0.png"], "label": [0.5]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "floats.parquet")
    places: dict[str, Any] = {"l": table(tmp_path / "l.csv", ROWS), "none": tmp_path / "none.csv", "folder": folder}
    places |= {"binary": tmp_path / "binary.csv", "parquet": tmp_path / "cut.parquet"}
    places |= {"floats": tmp_path / "floats.parquet"}
    with pytest.raises(NfzooError, match=message):
        open_label_files(str(folder), LabelFiles(source.format(**places)))


def test_labels_are_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'digits' is none; give the folder as --data"):
        open_split("digits", labels=LabelFiles(table(tmp_path / "l.csv", ROWS)))


def test_long_cells_of_parquet_take_no_memory(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"path": [path for path, _ in ROWS], "label": ["x" * 10_000] * 10}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "l.parquet")
    monkeypatch.setattr(hf_datasets, "_MOST_BYTES", 50_000)
    with pytest.raises(DataError, match="too many for paths and labels"):
        open_label_files(str(folder), LabelFiles(str(tmp_path / "l.parquet")))


def test_links_in_the_folder_are_followed_as_in_a_folder_of_classes(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "links").mkdir()
    os.symlink(folder / "a", tmp_path / "links" / "a")
    files = LabelFiles(table(tmp_path / "l.csv", ROWS[:6]))
    assert len(open_label_files(str(tmp_path / "links"), files).first) == 6
