"""What the user names as data, and how it is split."""

from pathlib import Path

import numpy as np
import pytest

from nfzoo.data.images import Digits, ImageFolder
from nfzoo.data.source import has_held_out, held_out_folder, open_held_out, open_split
from nfzoo.errors import ConfigError, DataError
from tests.support.pictures import write_images, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pets", {"cat": 10, "dog": 6})


@pytest.mark.parametrize("seed", [0, 1])
def test_split_holds_out_a_part_of_each_class(seed: int) -> None:
    train, validation = open_split("digits", validation_fraction=0.25, seed=seed)
    assert len(train) + len(validation) == 1797
    for digit in range(10):
        held = np.sum(np.asarray(validation.labels) == digit)
        assert held == round(0.25 * np.sum(Digits.embedded().labels == digit))
    again = open_split("digits", validation_fraction=0.25, seed=seed)
    assert np.array_equal(np.asarray(validation.labels), np.asarray(again.validation.labels))
    other = open_split("digits", validation_fraction=0.25, seed=seed + 7)
    assert isinstance(validation, Digits)
    assert isinstance(other.validation, Digits)
    assert not np.array_equal(validation.images, other.validation.images)


def test_folder_is_split_without_overlap(folder: Path) -> None:
    train, validation = open_split(str(folder), validation_fraction=0.3)
    assert isinstance(train, ImageFolder)
    assert isinstance(validation, ImageFolder)
    assert train.classes == validation.classes == ("cat", "dog")
    assert not set(train.paths) & set(validation.paths)
    assert {*train.paths, *validation.paths} == set(folder.rglob("*.png"))
    assert sorted(validation.labels) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_with_its_own_split(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train", {"a": 3, "b": 1})
    write_images(tmp_path / name, {"a": 1, "b": 2})
    train, validation = open_split(str(tmp_path))
    assert (len(train), len(validation)) == (4, 3)


def damage(folder: Path, case: str) -> str:
    """Make `folder` unusable; returns the path to open."""
    match case:
        case "missing":
            return str(folder / "nowhere")
        case "file":
            return str(folder / "cat" / "0.png")
        case "no classes":
            (folder / "empty").mkdir()
            return str(folder / "empty")
        case "empty class":
            (folder / "bird").mkdir()
            return str(folder)
        case "no text":
            write_images(folder, {"\udcff\udcfe": 3})
            return str(folder)
        case "one image":
            write_images(folder, {"fish": 1})
            return str(folder)
        case "no validation":
            (folder / "cat").rename(folder / "train")
            return str(folder)
    raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "does not exist"),
        ("file", "is not a folder"),
        ("no classes", "no subfolders"),
        ("empty class", "bird"),
        ("no text", "no text"),
        ("one image", "too few to hold any out"),
        ("no validation", "none of val/"),
    ],
)
def test_unusable_folders_are_named(folder: Path, case: str, message: str) -> None:
    source = damage(folder, case)
    with pytest.raises(DataError, match=message):
        open_split(source)


def test_validation_with_other_classes_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="'b', 'c'"):
        open_split(str(tmp_path))


# -- how data are named


def test_folders_of_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "b.tar", {"0": 2, "1": 0})
    write_shard(tmp_path / "train" / "a.tar", {"0": 1, "1": 1, "2": 0}, seed=1)
    write_shard(tmp_path / "val" / "a.tar", {"0": 1}, seed=2)
    train, validation = open_split(str(tmp_path))
    assert train.labels.tolist() == [1, 1, 0, 2, 0]
    assert validation.labels.tolist() == [1]
    assert train.classes == validation.classes == ("0", "1", "2")
    assert has_held_out(str(tmp_path))
    assert not has_held_out(str(tmp_path / "train"))
    assert len(open_held_out(str(tmp_path / "train")).images) == 5
    write_shard(tmp_path / "val" / "a.tar", {"0": 3}, seed=2)
    with pytest.raises(DataError, match="label 3, beyond the 3 classes"):
        open_split(str(tmp_path))


@pytest.mark.parametrize(
    "pattern", ["{000..002}.tar", "*.tar", "00[0-2].tar", "00?.tar", "{000,001,002}.tar", "{00,}{0..2}.tar"]
)
def test_patterns_of_shards(tmp_path: Path, pattern: str) -> None:
    for k in range(3):
        write_shard(tmp_path / f"{k:03}.tar", {"a": 0, "b": 1, "c": 0, "d": 1}, seed=k)
    if pattern.startswith("{00,}"):
        for k in range(3):
            (tmp_path / f"{k}.tar").write_bytes((tmp_path / f"{k:03}.tar").read_bytes())
    train, validation = open_split(str(tmp_path / pattern), validation_fraction=0.3)
    assert len(train) + len(validation) == 12 * (1 + pattern.startswith("{00,}"))
    names = [part.name(i) for part in (train, validation) for i in range(len(part))]
    assert len(set(names)) == len(names)
    assert sorted(set(validation.labels.tolist())) == [0, 1]


def test_one_tar_file(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "pets.tar", {"a": 0, "b": 1, "c": 0, "d": 1})
    assert len(open_split(str(path)).train) == 2


def test_parts_by_the_names_of_files(tmp_path: Path) -> None:
    for name in ("pets-train-0.tar", "pets-train-1.tar", "pets-validation-0.tar", "pets-test-0.tar"):
        write_shard(tmp_path / name, {"a": 0, "b": 1})
    train, validation = open_split(str(tmp_path))
    assert [Path(train.name(i).split(",")[0]).name for i in range(4)] == ["pets-train-0.tar"] * 2 + [
        "pets-train-1.tar"
    ] * 2
    assert [Path(validation.name(i).split(",")[0]).name for i in range(2)] == ["pets-validation-0.tar"] * 2
    found = open_held_out(str(tmp_path))
    assert (found.dataset, found.split, len(found.images)) == (tmp_path.name, "validation", 2)
    write_shard(tmp_path / "pets-more-0.tar", {"a": 0, "b": 1})
    with pytest.raises(DataError, match=r"pets-more-0\.tar' names no part, as train and validation do"):
        open_split(str(tmp_path))


def test_an_archive_beside_the_classes_is_passed_over(folder: Path) -> None:
    write_shard(folder / "download.tar", {"a": 0})
    assert isinstance(open_split(str(folder)).train, ImageFolder)


def test_what_is_judged_has_a_name(tmp_path: Path) -> None:
    write_images(tmp_path / "pets" / "train", {"a": 3})
    write_images(tmp_path / "pets" / "val", {"a": 1})
    root = tmp_path / "pets"
    for source, count in ((root, 1), (root / "val", 1), (root / "train", 3)):
        found = open_held_out(str(source))
        split = "train" if source.name == "train" else "val"
        assert (found.dataset, found.split, len(found.images)) == ("pets", split, count)
    assert held_out_folder(root) == root / "val"
    shard = write_shard(tmp_path / "x-000.tar", {"a": 0})
    assert open_held_out(str(shard))[1:] == ("x-000.tar", None, repr(str(shard)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{000..004}.tar", r"003\.tar' of .* is missing, and 1 more"),
        ("{004..000}.tar", r"'\{004\.\.000\}' in .* does not count upwards"),
        ("*.parquet", "matches no files that end in"),
        ("nowhere/*.tar", "matches no files"),
        ("nowhere.tar", "cannot be read: No such file"),
        ("a.tar.gz", "is compressed"),
        ("000.tar?image=img", "does not take the option 'image'; there train, validation can stand"),
        ("000.tar?colour=red", "does not take the option 'colour'"),
        ("000.tar?train=", "leaves an option empty"),
        ("pets?label=x", "does not take the option 'label'; it takes none"),
        ("both", "holds tar files and parquet files"),
        ("?train=one", "have the names that it asks for"),
    ],
)
def test_bad_names_are_explained(tmp_path: Path, folder: Path, source: str, message: str) -> None:
    for k in range(3):
        write_shard(tmp_path / f"{k:03}.tar", {"a": 0, "b": 1})
    write_shard(tmp_path / "both" / "x.tar", {"a": 0})
    (tmp_path / "both" / "x.parquet").touch()
    if source.startswith("?"):
        source = "*.tar" + source
    with pytest.raises(DataError, match=message):
        open_split(str(tmp_path / source))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_the_held_out_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        open_split("digits", validation_fraction=fraction)
