"""Results in parts: which images a part has, what a row keeps of their names, and what is still to be done."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from nfzoo.checkpoint.part_files import FORMATS, Parts, check_format, finish, start, write_part
from nfzoo.errors import ConfigError

ODD = os.fsdecode(b'caf\xc3\xa9/\xff "x"\n.png')  # a name with bytes that are no UTF-8, a quote and a line feed
TOP: dict[str, Any] = {
    "classes": np.array([[1, 0], [0, 1]]),
    "labels": [["bée", "ant"], ["ant", "bée"]],
    "probabilities": np.array([[0.75, 0.25], [0.5, 0.5]], np.float32),
}


def begin(parts: Parts, **identity: Any) -> list[int]:
    return start(parts, identity, {"model": "m"}, {"torch": "0"})


@pytest.mark.parametrize(("images", "size", "count"), [(1, 1, 1), (7, 7, 1), (8, 7, 2), (23, 7, 4), (3, 100, 1)])
def test_every_image_is_in_one_part(tmp_path: Path, images: int, size: int, count: int) -> None:
    parts = Parts(tmp_path, images, size, "npz")
    assert len(parts) == count
    assert [i for k in range(count) for i in parts.rows(k)] == list(range(images))
    assert {len(parts.rows(k)) for k in range(count - 1)} <= {size}
    assert len({parts.path(k) for k in range(count)}) == count


@pytest.mark.parametrize("format", ["jsonl", "parquet", "npz"])
def test_names_come_back(tmp_path: Path, format: str) -> None:
    names = ["a/b.png", ODD]
    parts = Parts(tmp_path, 2, 2, format)
    assert begin(parts) == [0]
    if format == "npz":
        write_part(parts, 0, names, {"embeddings": np.eye(2, dtype=np.float32)}, {})
        with np.load(parts.path(0)) as file:
            assert file["image"].tolist() == names
            assert np.array_equal(file["embeddings"], np.eye(2))
        return
    if format == "parquet":
        write_part(parts, 0, names, TOP, {})
        table = parquet.read_table(parts.path(0)).to_pydict()
        assert table["image"] == ["a/b.png", ODD.replace("\udcff", "\\udcff")]
        assert table["labels"] == TOP["labels"]
        return
    write_part(parts, 0, names, TOP, {})
    rows = [json.loads(line) for line in parts.path(0).read_bytes().splitlines()]
    assert [row["image"] for row in rows] == names
    assert rows[0]["predictions"][0] == {"class": 1, "label": "bée", "probability": 0.75}


def test_equal_results_are_equal_files(tmp_path: Path) -> None:
    vectors = {"embeddings": np.eye(2, dtype=np.float16)}
    for kind, columns in (("top-k", TOP), ("embeddings", vectors)):
        for format in FORMATS[kind]:
            found = []
            for turn in range(2):
                parts = Parts(tmp_path / f"{kind} {format} {turn}", 2, 2, format)
                write_part(parts, 0, ["a", "b"], columns, {})
                found.append(parts.path(0).read_bytes())
            assert found[0] == found[1]


def test_a_part_without_readable_images_has_no_rows(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 4, 2, "npz")
    assert begin(parts) == [0, 1]
    write_part(parts, 0, [], {"embeddings": np.zeros((0, 3), np.float32)}, {"a": "a is empty", "b": "b is empty"})
    write_part(parts, 1, ["c", "d"], {"embeddings": np.zeros((2, 3), np.float32)}, {})
    with np.load(parts.path(0)) as file:
        assert (file["image"].shape, file["embeddings"].shape) == ((0,), (0, 3))
    assert [entry["image"] for entry in finish(parts)] == ["a", "b"]
    assert [entry["problem"] for entry in finish(parts)] == ["a is empty", "b is empty"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", parts.path(0).name, parts.path(1).name]


def test_a_note_without_its_part_is_forgotten(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 2, 2, "npz")
    begin(parts)
    vectors = {"embeddings": np.eye(2, dtype=np.float32)}
    write_part(parts, 0, ["b"], {"embeddings": vectors["embeddings"][:1]}, {"a": "a is empty"})
    parts.path(0).unlink()  # as if the run had been killed between the two
    assert parts.broken_path(0).exists()
    assert begin(parts) == [0]
    write_part(parts, 0, ["a", "b"], vectors, {})
    assert finish(parts) == []


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    parts = Parts(tmp_path, 2, 2, "jsonl")
    assert begin(parts, a=1) == [0]
    write_part(parts, 0, ["a", "b"], TOP, {})
    with pytest.raises(ConfigError, match="another run: a 1 and not 2"):
        begin(parts, a=2)
    assert start(parts, {"a": 2}, {}, {}, overwrite=True) == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "notes.txt"]


@pytest.mark.parametrize(("kind", "format"), [("top-k", "npz"), ("embeddings", "jsonl")])
def test_formats_that_do_not_suit_are_refused(kind: str, format: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind} are written as .* or parquet, not {format}"):
        check_format(kind, format)


def test_parquet_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'nfzoo\[data\]'"):
        check_format("top-k", "parquet")
    check_format("top-k", "jsonl")
