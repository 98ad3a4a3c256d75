"""Files of strangers: regular ones alone are read, and JSON and other text of a sensible size."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nfzoo.analysis.figures import training_curves
from nfzoo.checkpoint import run_state
from nfzoo.checkpoint.model_folder import load_checkpoint, read_description
from nfzoo.checkpoint.part_files import Parts, start
from nfzoo.checkpoint.weight_files import open_weights, read_index
from nfzoo.conversion.convert import convert
from nfzoo.data.hf_datasets import open_parquet
from nfzoo.data.label_files import LabelFiles, open_label_files
from nfzoo.data.labels import read_class_names
from nfzoo.data.tar.shards import TarShards
from nfzoo.errors import CheckpointError, NfzooError
from nfzoo.files import UnreadableFileError, csv_rows, nearest_path, open_regular, parse_json, read_json, read_text
from nfzoo.train.config import recipes
from nfzoo.transforms.decode import open_image
from tests.support.loops import each

ROOT = Path(__file__).resolve().parents[2]

# Name of the file -> a reader of it.
READERS: dict[str, Callable[[Path], Any]] = {
    "0.jpg": open_image,
    "config.json": read_description,
    "model.safetensors": read_description,
    "w.safetensors": open_weights,
    "alone/config.json": lambda path: load_checkpoint(path.parent),
    "model.safetensors.index.json": read_index,
    "x.yaml": lambda path: recipes.parse(["--recipe", str(path)]),
    "0.tar": lambda path: TarShards.index([path]),
    "classes.txt": lambda path: TarShards.index([path.with_name("none.tar")]),
    "0.parquet": lambda path: open_parquet([path], str(path)),
    "labels.csv": lambda path: open_label_files(str(path.parent), LabelFiles(str(path))),
    "labels.parquet": lambda path: open_label_files(str(path.parent), LabelFiles(str(path))),
    "names.txt": lambda path: read_class_names(str(path)),
    "metrics.jsonl": lambda path: training_curves(path.parent, path.with_name("x.png")),
    "manifest.json": lambda path: start(Parts(path.parent, 1, 1, "npz"), {}, {}, {}),
    "step_00000001/state.json": lambda path: run_state._read(path.parent),
    **{f"w{suffix}": lambda path: convert(path, path.with_name("out")) for suffix in (".npz", ".pkl", ".bin", ".pth")},
    "timm/config.json": lambda path: convert(path.parent, path.with_name("out")),
}


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a reader that waits."""

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@each(("kind", "name"), [(kind, name) for kind in ("pipe", "socket", "device") for name in READERS])
def test_no_reader_waits_for_a_pipe_or_reads_a_device(
    alarm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    path = tmp_path / kind / str(list(READERS).index(name)) / name
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # the address of a socket is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(NfzooError) as raised:
        READERS[name](path)
    assert "\n" not in str(raised.value)


def test_the_error_says_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: it is no regular file but a pipe"):
        read_description(tmp_path / "config.json")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"123"


def test_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("äöü")
    assert read_text(tmp_path / "file", 6) == "äöü"
    with pytest.raises(UnreadableFileError, match="longer than 5 bytes"):
        read_text(tmp_path / "file", 5)


@each(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "it has 'c' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 5000, "digits"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "file")


def test_json_that_is_read() -> None:
    assert parse_json(b'{"a": [{"b": 1}, {"b": 2}]}') == {"a": [{"b": 1}, {"b": 2}]}


def test_a_long_object_with_a_key_twice_is_refused_in_one_pass() -> None:
    text = ",".join(f'"{i}":0' for i in [*range(200_000), 199_999])
    with pytest.raises(ValueError, match="'199999' twice"):
        parse_json(f"{{{text}}}")


OPENING = re.compile(r'json\.loads?\(|\.read_(?:text|bytes)\(|\.open\((?:\)|"rb?")|(?<![.\w])open\(')
OWN = {
    *("nfzoo/cli/list_models.py", "nfzoo/data/digits.py", "nfzoo/data/labels.py"),  # files of the package
    *("nfzoo/runtime/distributed.py", "nfzoo/checkpoint/weight_files.py"),  # the system's, and what was just written
    *("nfzoo/evaluate/report.py", "nfzoo/evaluate/multi_label_report.py"),  # pictures that were just drawn
    *("nfzoo/train/memory.py", "nfzoo/benchmark/memory.py", "nfzoo/runtime/program.py"),  # the system's
    *("nfzoo/export/tpu_check.py", "nfzoo/export/tpu_worker.py"),  # what its own processes say
}


def test_files_are_opened_in_one_place() -> None:
    """So that no reader forgets what this module is for; the drill reads what its own runs wrote."""
    found = set()
    for folder in ("nfzoo", "hub", "conversion"):
        for path in (ROOT / folder).rglob("*.py"):
            if OPENING.search(path.read_text(encoding="utf-8")) and path.parent.name != "drill":
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"nfzoo/files.py", *OWN}


@each(
    ("content", "header", "rows"),
    [
        (b"a,b\n1,2\n\n3,4", ["a", "b"], [(2, ["1", "2"]), (4, ["3", "4"])]),
        (b"\xef\xbb\xbfa;b,c\n", ["a;b", "c"], []),  # as many of each: the comma
        (b"a;b\r\n'1';2\r\n", ["a", "b"], [(2, ["'1'", "2"])]),
        (b'a\tb\n"1\n2"\t3\n', ["a", "b"], [(3, ["1\n2", "3"])]),
        ("é\n€\n".encode(), ["é"], [(2, ["€"])]),
        (b"", [], []),
    ],
)
def test_csv(tmp_path: Path, content: bytes, header: list[str], rows: list[tuple[int, list[str]]]) -> None:
    (tmp_path / "file").write_bytes(content)
    with open_regular(tmp_path / "file") as file:
        found, cells = csv_rows(file)
        assert (found, list(cells)) == (header, rows)


def test_csv_that_tabs_separate(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a,b\n")
    with open_regular(tmp_path / "file") as file:
        assert csv_rows(file, tabs=True)[0] == ["a,b"]


def test_a_misspelt_path_has_its_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("runs/digits", "runs/pets", "home/photos", "runs/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "pets" / "train.yaml").touch()
    for name, near in {
        "runs/dgits": "runs/digits",
        "run/dgits/": "runs/digits",
        "./runs/pets/trian.yaml": "runs/pets/train.yaml",
        "~/photos": str(tmp_path / "home" / "photos"),
        "runs/hidden": None,
        "runs/digits/train.yaml": None,
        "runs/pets/train.yaml/x": None,
        "elsewhere/digits": None,
        "": None,
    }.items():
        assert nearest_path(name) == (f"; did you mean {near!r}?" if near else ""), name
