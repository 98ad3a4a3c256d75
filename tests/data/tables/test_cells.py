"""Sets of labels in tables: the ways in which they are read, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from nfzoo.data.images import ImageFolder
from nfzoo.data.label_files import LabelFiles, label_files, open_label_files
from nfzoo.data.source import open_split
from nfzoo.data.tables import cells
from nfzoo.errors import ConfigError, DataError
from tests.support.loops import each
from tests.support.pictures import write_images

SETS = {"a/0.png": {"cat", "dog"}, "a/1.png": {"dog"}, "a/2.png": set(), "a/3.png": {"bee", "cat", "dog"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "photos", {"a": 4})


def sets(images: ImageFolder) -> dict[str, set[str]]:
    return {images.name(i): {images.classes[c] for c in np.flatnonzero(images.labels[i])} for i in range(len(images))}


def opened(folder: Path, source: object, **options: Any) -> ImageFolder:
    return open_label_files(str(folder), LabelFiles(str(source), multi_label=True, **options)).first


def lines(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def parquet(target: Path, /, **columns: Sequence[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), target)
    return target


def test_the_ways_to_write_sets_are_one(tmp_path: Path, folder: Path) -> None:
    joined = ["a/0.png,cat|dog", "a/1.png, dog ", "a/2.png,", "a/3.png,dog | bee|cat"]
    bars = lines(tmp_path / "bars.csv", "path,label", *joined)
    first = opened(folder, bars)
    assert sets(first) == SETS
    assert first.classes == ("bee", "cat", "dog")
    assert first.labels.dtype == bool
    assert first.multi_label
    assert first[3][1].tolist() == [True, True, True]
    other = lines(tmp_path / "other.csv", "path,label", *(row.replace("|", ";") for row in joined))
    tabs = lines(tmp_path / "t.tsv", "path\ttags", *(row.replace(",", "\t").replace("|", " + ") for row in joined))
    lists = [["dog", "cat"], ["dog"], [], ["bee", "cat", "dog"]]
    table = parquet(tmp_path / "l.parquet", path=list(SETS), label=lists)
    null = parquet(tmp_path / "n.parquet", path=list(SETS), label=[*lists[:2], None, lists[3]])
    columns = ["a/0.png,0,1,1,7", "a/1.png,0,0,1,8", "a/2.png,0,0,0,9", "a/3.png,1,1,TRUE,3"]
    ones = lines(tmp_path / "ones.csv", "path,bee,cat,dog,id", *columns)
    every = lines(tmp_path / "every.csv", "path,dog,cat,bee", "a/0.png,1,1,0", "a/1.png,1,0,0", "a/2.png,0,0,0")
    every.write_text(every.read_text() + "a/3.png,1.0,1,true\n")
    truth = {"bee": [False, False, False, True], "cat": [True, False, False, True], "dog": [True, True, False, True]}
    truths = parquet(tmp_path / "truths.parquet", path=list(SETS), **truth)
    long = ["a/0.png,cat", "a/1.png,dog", "a/3.png,bee", "a/0.png,dog", "a/3.png,dog", "a/3.png,cat", "a/2.png,"]
    tall = lines(tmp_path / "tall.csv", "path,label", *long)
    spaced = lines(tmp_path / "spaced.csv", "path,label", *(r.replace(" ", "").replace("|", " ") for r in joined))
    for source in (
        f"{other}?separator=;",
        f"{tabs}?label=tags&separator=%2B",
        table,
        null,
        f"{ones}?labels=bee,cat,dog",
        f"{every}?labels=*",
        f"{truths}?labels=*",
        tall,
        f"{spaced}?separator= ",
    ):
        again = opened(folder, source)
        assert sets(again) == SETS, source
        assert again.labels.tolist() == first.labels.tolist(), source


def test_classes_may_be_more_than_the_labels(tmp_path: Path, folder: Path) -> None:
    names = lines(tmp_path / "names.txt", "emu", "dog", "cat")
    bars = lines(tmp_path / "bars.csv", "path,label", "a/0.png,cat|dog", "a/1.png,dog")
    images = opened(folder, bars, class_names=str(names))
    assert images.classes == ("emu", "dog", "cat")
    assert images.labels.tolist() == [[False, True, True], [False, True, False]]
    ones = lines(tmp_path / "ones.csv", "path,cat,emu", "a/0.png,1,0", "a/1.png,0,0")
    assert opened(folder, f"{ones}?labels=*").classes == ("cat", "emu")
    numbers = lines(tmp_path / "numbers.csv", "path,label", "a/0.png,10|2")
    assert opened(folder, numbers).classes == ("2", "10")
    turned = opened(folder, bars).relabelled([3, 1], 4)
    assert turned.labels.tolist() == [[False, True, False, True], [False, True, False, False]]


def test_a_split_and_rows_that_repeat(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ["a/0.png,cat|dog,train", "a/1.png,dog,val", "a/1.png,dog,val", "a/0.png,dog|cat,train"]
    table = lines(tmp_path / "l.csv", "path,label,split", *rows)
    first, held_out, _ = open_label_files(str(folder), LabelFiles(str(table), multi_label=True))
    assert held_out is not None
    assert (sets(first), sets(held_out)) == ({"a/0.png": {"cat", "dog"}}, {"a/1.png": {"dog"}})
    assert [r.getMessage() for r in caplog.records] == [f"{table} repeats the rows of 2 images, which count once"]


MULTI = {
    "twice": ("path,label", ["a/0.png,cat|dog", "a/0.png,cat"], "", "line 3 of .*'cat', and 2 has it with 'cat|dog'"),
    "one and none": ("path,label", ["a/0.png,cat", "a/0.png,"], "", "keep one of them"),
    "gap": ("path,label", ["a/0.png,cat||dog"], "", "line 2 of .* has an empty label among 3"),
    "end": ("path,label", ["a/0.png,cat|"], "", "an empty label"),
    "none": ("path,label", ["a/0.png,", "a/1.png,"], "", "no row of the labels .* has a label"),
    "sign": ("path,label", ["a/0.png,cat;dog", "a/1.png,dog"], "", "has 'cat;dog', and no cell has .*separator=;"),
    "commas": ("path,label", ['a/0.png,"cat, dog"', "a/1.png,dog"], "", "separator=,"),
    "column": ("path,cat", ["a/0.png,1"], "?labels=cat,dog", "no column 'dog' for"),
    "number": ("path,cat,dog", ["a/0.png,1,2"], "?labels=*", "line 2 of .* has '2' in the column 'dog', which is neit"),
    "two ways": ("path,label", ["a/0.png,1"], "?labels=*&label=label", "two ways to give labels"),
    "half a way": ("path,cat", ["a/0.png,1"], "?labels=cat&separator=;", "two ways to give labels"),
    "unknown": ("path,label", ["a/0.png,cat"], "?label=x&separator=;", "no column 'x'"),
}


@each("name", MULTI)
def test_sets_that_are_refused(tmp_path: Path, folder: Path, name: str) -> None:
    header, rows, options, message = MULTI[name]
    table = lines(tmp_path / "l.csv", header, *rows)
    with pytest.raises(DataError, match=message.replace("cat|dog", r"cat\|dog")):
        opened(folder, f"{table}{options}")


SINGLE = {
    "cells": (
        "path,label",
        ["a/0.png,cat|dog", "a/1.png,dog"],
        "",
        "line 2 of .*'cat.dog', which are several; .*--task",
    ),
    "places": (
        "path,label",
        ["a/0.png,cat;dog", "a/1.png,dog;emu"],
        "",
        "several; sets of labels are for --task multi-l",
    ),
    "rows": ("path,label", ["a/0.png,cat", "a/0.png,dog"], "", "keep one of them; .*--task multi-label"),
    "columns": ("path,label,cat", ["a/0.png,1,1"], "?labels=cat", "'labels' of .*--task multi-label"),
    "separator": ("path,label", ["a/0.png,cat"], "?separator=;", "'separator' of .*--task multi-label"),
}


@each("name", SINGLE)
def test_several_labels_are_never_read_as_one(tmp_path: Path, folder: Path, name: str) -> None:
    header, rows, options, message = SINGLE[name]
    table = lines(tmp_path / "l.csv", header, *rows)
    with pytest.raises(DataError, match=message):
        open_label_files(str(folder), LabelFiles(f"{table}{options}"))


def test_a_list_is_several_labels(tmp_path: Path, folder: Path) -> None:
    table = parquet(tmp_path / "l.parquet", path=["a/0.png", "a/1.png"], label=[["cat"], ["dog"]])
    with pytest.raises(DataError, match=r"row 1 of .* has a list of labels; .*--task multi-label"):
        open_label_files(str(folder), LabelFiles(str(table)))


def test_names_of_one_class_may_have_bars(tmp_path: Path, folder: Path) -> None:
    for first, second in (("n01|tabby", "n02|emu"), ("animal|cat", "animal|dog"), ("big; red", "small; blue")):
        table = lines(tmp_path / "l.csv", "path,label", f"a/0.png,{first}", f"a/1.png,{second}")
        images = open_label_files(str(folder), LabelFiles(str(table))).first
        assert images.classes == (first, second)
        assert images.labels.dtype == np.int64


def test_parts_that_combine_freely_are_told(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for labels, told in (
        (
            ["cat|big", "cat|small", "dog|big"],
            "line 2 of .*'cat.big', which is read as one class; .*--task multi-label",
        ),
        (["pet|cat", "pet|dog", "wild|emu"], None),
        (["cat|big", "dog", "emu"], None),
    ):
        caplog.clear()
        rows = [f"{name},{label}" for name, label in zip(("a/0.png", "a/1.png", "a/2.png"), labels, strict=True)]
        table = lines(tmp_path / "l.csv", "path,label", *rows)
        assert open_label_files(str(folder), LabelFiles(str(table))).first.classes == tuple(labels)
        said = [record.getMessage() for record in caplog.records]
        assert not [line for line in said if "one class" in line] if told is None else re.search(told, said[0])


def test_the_sets_fit_into_memory(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MOST_LABELS", 5)
    table = lines(tmp_path / "l.csv", "path,label", "a/0.png,cat|dog|emu", "a/1.png,emu")
    with pytest.raises(DataError, match="2 images of 3 classes"):
        opened(folder, table)


def test_sets_need_a_table() -> None:
    with pytest.raises(ConfigError, match="give it as labels"):
        label_files(None, None, None, multi_label=True)


def test_images_are_held_out_by_their_rarest_label(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", {"a": 40})
    # 10 images without a label, 30 with "often", of which 10 have "rare" too, and one has "once".
    kinds = ["", *["often|rare"] * 10, *["often"] * 19, "often|once"]
    labels = [*[""] * 9, *kinds]
    table = lines(tmp_path / "l.csv", "path,label", *(f"a/{i}.png,{label}" for i, label in enumerate(labels)))
    files = LabelFiles(str(table), multi_label=True)
    for seed in (3, 2, 1, 0):
        train, held_out = open_split(str(folder), labels=files, seed=seed)
        assert held_out.labels.sum(0).tolist() == [6, 0, 2]  # often, once, rare: a fifth of 10 and of 19 images
        assert int((~held_out.labels.any(1)).sum()) == 2
        assert len(train) + len(held_out) == 40
    again = open_split(str(folder), labels=files).validation
    assert [again.name(i) for i in range(len(again))] == [held_out.name(i) for i in range(len(held_out))]
    few = lines(tmp_path / "few.csv", "path,label", "a/0.png,x|y", "a/1.png,z")
    with pytest.raises(DataError, match="too few to hold any out"):
        open_split(str(folder), labels=LabelFiles(str(few), multi_label=True))
