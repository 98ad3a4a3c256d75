"""Parameter files of strangers: what today's libraries write is read, and nothing else is; nothing is ever executed."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nfzoo import ConversionError
from nfzoo.conversion import pickle_reader
from nfzoo.conversion.haiku import canonical, to_haiku
from nfzoo.conversion.haiku_files import open_source
from nfzoo.variants import VARIANTS
from tests.support.helpers import REFERENCE, random_params
from tests.support.hostile import corpus

ROOT = Path(__file__).resolve().parents[2]
NFNET_TEST = VARIANTS["nfnet-test"].config


def read(path: Path) -> dict[str, np.ndarray]:
    with open_source(path) as source:
        arrays = {name: leaf.read() for name, leaf in source.arrays.items()}
        for name, leaf in source.arrays.items():
            assert (arrays[name].shape, arrays[name].dtype) == (leaf.shape, leaf.dtype)
    return arrays


def digest(arrays: dict[str, np.ndarray]) -> str:
    """As in make_haiku_dumps.py."""
    h = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = array.astype("<f4")
        h.update(f"{name}:{array.shape}:".encode() + array.tobytes("C"))
    return h.hexdigest()


def small_tree() -> dict[str, dict[str, np.ndarray]]:
    return to_haiku(NFNET_TEST, random_params(NFNET_TEST))


# ---------------------------------------------------------------- what is read


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("haiku_dumps")
    with tarfile.open(REFERENCE / "haiku_dumps.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_files_of_todays_jax_haiku_and_dill(dumps: Path) -> None:
    contents = json.loads((dumps / "contents.json").read_text())["read as"]
    assert len(contents) == 126
    assert {name: digest(read(dumps / name)) for name in contents} == contents


def test_the_dumps_name_what_dumps_name(dumps: Path) -> None:
    """Every global that the reader knows, but for those of older releases, stands in one of the files."""
    everything = b"".join(path.read_bytes() for path in dumps.iterdir() if path.name != "contents.json")
    old = ("numpy.core", "dill.dill", "device_array", "FlatMap", "frozendict")
    known = pickle_reader._Machine(io.BytesIO(), 0).globals
    for name in known:
        module, _, leaf = name.rpartition(".")
        if not any(part in name for part in old):
            assert module.encode() in everything, name
            assert leaf.encode() in everything, name


OLDER = {
    b"numpy._core.": b"numpy.core.",
    b"data_structures\nFlatMapping\n": b"data_structures\nfrozendict\n",
    b"jax._src.array\n_reconstruct_array\n": b"jax._src.device_array\nreconstruct_device_array\n",
    b"dill._dill\n": b"dill.dill\n",
}


def test_the_names_of_older_releases(dumps: Path, tmp_path: Path) -> None:
    """Those of 2021; protocol 2 writes names as lines, so that they can be exchanged."""
    contents = json.loads((dumps / "contents.json").read_text())["read as"]
    met = set()
    for name in ("numpy.pickle2", "flatmap.dill2", "jax-flatmap.pickle2", "jax-bfloat16.dill2"):
        data = (dumps / name).read_bytes()
        for new, old in OLDER.items():
            met |= {new} if new in data else set()
            data = data.replace(new, old)
        (tmp_path / name).write_bytes(data)
        assert digest(read(tmp_path / name)) == contents[name]
    assert met == OLDER.keys()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_same_as_the_standard_unpickler(protocol: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(protocol)
    tree: dict[str, dict[str, Any]] = {}
    for i in range(60):
        shape = tuple(rng.integers(1, 6, size=i % 5))
        array = np.asarray(rng.standard_normal(shape), ("<f4", ">f8", "<f2", "<f8")[i % 4])
        array = np.asfortranarray(array) if i % 3 == 0 else array.transpose(rng.permutation(len(shape)))
        tree.setdefault(f"net/~/layer_{i // 3}", {})[f"w{i}"] = array
    path = tmp_path / "tree"
    path.write_bytes(pickle.dumps(tree, protocol))
    arrays = read(path)
    expected = {canonical(m, n): a for m, d in tree.items() for n, a in d.items()}
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype.newbyteorder("=")


def test_reading_does_not_touch_what_was_read_before(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    path.write_bytes(pickle.dumps({"a": {"w": np.arange(6, dtype="f4"), "s": np.float32(3)}}, 2))
    with open_source(path) as source:
        for leaf in source.arrays.values():
            first = leaf.read()
            first[...] = 7
            assert not np.array_equal(leaf.read(), first)


def test_what_follows_the_end_is_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    path.write_bytes(pickle.dumps({"a": {"w": np.ones(2, "f4")}}, 4) + b"rest")
    assert read(path)["a.w"].tolist() == [1, 1]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    path.write_bytes(pickle.dumps({"a": {"w": np.ones(99_999, "f4")}}, 4))
    with open_source(path) as source:
        path.write_bytes(b"")
        with pytest.raises(ConversionError, match="became shorter"):
            source.arrays["a.w"].read()


# ---------------------------------------------------------------- what is not


class Outcome(NamedTuple):
    kind: str
    message: str
    events: list[str]
    seconds: float


@functools.cache  # takes a second, which a run of other tests need not spend
def hostile() -> dict[str, tuple[bytes, str]]:
    """Name -> a file's bytes, and what its refusal says."""
    return {name: (data, told) for name, data, told in corpus(small_tree(), Path("CANARY"))}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Outcome], Path]:
    """The corpus, converted by a process of little memory; see hostile.py."""
    root = tmp_path_factory.mktemp("hostile")
    for folder in ("good", "files", "out"):
        (root / folder).mkdir()
    tree = small_tree()
    (root / "good" / "tree").write_bytes(pickle.dumps(tree, 2))
    flat: dict[str, Any] = {f"{m}/{n}": a for m, d in tree.items() for n, a in d.items()}
    np.savez_compressed(root / "good" / "tree.npz", **flat)
    for i, (data, _) in enumerate(hostile().values()):
        (root / "files" / f"{i:03}.npz").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.hostile", str(root)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: Outcome(*found[f"{i:03}.npz"]) for i, name in enumerate(hostile())}, root


def test_the_corpus_is_large() -> None:
    assert len(hostile()) >= 150


def test_refused_with_the_reason(outcomes: tuple[dict[str, Outcome], Path]) -> None:
    for name, (_, told) in hostile().items():
        outcome = outcomes[0][name]
        assert outcome.kind == "ConversionError", (name, outcome)
        assert re.search(told, outcome.message), (name, outcome.message)
        assert "/files/" in outcome.message, name  # the file is named
        assert outcome.events == [], name
        assert outcome.seconds < 15, name


def test_nothing_was_executed_or_written(outcomes: tuple[dict[str, Outcome], Path]) -> None:
    root = outcomes[1]
    assert not (ROOT / "CANARY").exists()
    assert list((root / "out").iterdir()) == []
    assert sorted(p.name for p in root.iterdir()) == ["files", "good", "models", "out"]
    assert sorted(p.name for p in (root / "models").iterdir()) == ["tree", "tree.npz"]


def test_the_attacks_are_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard unpickler falls for them, so that a refusal means something."""
    monkeypatch.chdir(tmp_path)
    for name in ("posix.system", "builtins.eval", "_pickle.loads", "among the weights, 5"):
        pickle.loads(hostile()[name][0])
        assert Path("CANARY").exists(), name
        Path("CANARY").unlink()


def test_folders_and_missing_files(tmp_path: Path) -> None:
    for path, told in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.npz", "does not exist"),
        (Path("/dev/zero"), "no file"),
    ):
        with pytest.raises(ConversionError, match=told), open_source(path):
            pass


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_damaged_bytes_never_surprise(protocol: int, tmp_path: Path) -> None:
    """One to three bytes changed: the file is read as something, or refused by a ConversionError."""
    tree = {"a/~/b": {"w": np.ones((2, 3), "f4"), "gain": np.ones(2, "f4")}, "a": {"skip_gain": np.float32(1)}}
    good = pickle.dumps(tree, protocol)
    rng = random.Random(protocol)
    path, refused = tmp_path / "tree", 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read(path)
        except ConversionError:
            refused += 1
    assert refused > 700


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_truncation_is_refused(protocol: int, tmp_path: Path) -> None:
    good = pickle.dumps({"a": {"w": np.ones((2, 3), "f4"), "s": np.float32(1)}}, protocol)
    path = tmp_path / "tree"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ConversionError), open_source(path):
            pass
