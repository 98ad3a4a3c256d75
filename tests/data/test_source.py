"""What the user names as data: split in two, a part to evaluate on, and all images, each once and in one order."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pytest

from nfzoo.data import source as source_module
from nfzoo.data.digits import Digits
from nfzoo.data.images import UNLABELLED, ImageFolder, Images
from nfzoo.data.source import fingerprint, has_held_out, open_all, open_held_out, open_split, split_options
from nfzoo.errors import ConfigError, DataError
from nfzoo.transforms.decode import open_image
from tests.support.pictures import picture, write_images, write_shard, write_tar


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
    trained, held_out = ({part[i][0] for i in range(len(part))} for part in (train, validation))
    assert not trained & held_out
    assert trained | held_out == set(folder.rglob("*.png"))
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
            (folder / "train" / "cat").mkdir(parents=True)
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
        ("no validation", "none of val,"),
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
    with pytest.raises(DataError, match=r"pets-more-0\.tar' has the name of no part"):
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
        ("000.tar?image=img", "does not take the option 'image'; it takes train, validation"),
        ("000.tar?colour=red", "does not take the option 'colour'"),
        ("000.tar?train=", "has an option without a value"),
        ("pets?label=x", "does not take the option 'label'; it takes none"),
        ("both", "holds tar files and parquet files"),
        ("?train=one", "needs files named after both parts, one and validation"),
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


@pytest.mark.parametrize(
    ("source", "path", "options"),
    [
        ("hub:org/name:small", "hub:org/name:small", {}),
        ("hub:org/name?image=img&label=fine_label", "hub:org/name", {"image": "img", "label": "fine_label"}),
        ("data/00?.tar", "data/00?.tar", {}),
        ("data/00?.parquet?label=x%26y", "data/00?.parquet", {"label": "x&y"}),
        ("what?/data", "what?/data", {}),
        ("plain", "plain", {}),
    ],
)
def test_options_stand_behind_the_last_question_mark(source: str, path: str, options: dict[str, str]) -> None:
    assert split_options(source) == (path, options)


# -- all images, by name


def names(images: Images) -> list[str]:
    found = [images.name(i) for i in range(len(images))]
    assert len(set(found)) == len(found)
    return found


def pixels(images: Images, index: int) -> bytes:
    return open_image(images[index][0]).tobytes()


def expected(seed: int) -> bytes:
    return open_image(io.BytesIO(picture(seed))).tobytes()


def test_a_folder_is_read_at_every_depth(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for i, name in enumerate(["b.png", "a/x.PNG", "a/deep/er/y.png", "a.b/z.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i))
    for hidden in (".c.png", ".cache/d.png", "a/notes.txt", "more.tar"):
        (root / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / hidden).write_bytes(b"")
    os.symlink(root, root / "a" / "loop")
    found = open_all(str(root))
    assert names(found) == ["a/deep/er/y.png", "a/x.PNG", "a.b/z.png", "b.png"]
    assert [pixels(found, i) for i in range(4)] == [expected(i) for i in (2, 1, 3, 0)]
    again = pickle.loads(pickle.dumps(found))
    assert names(again) == names(found)
    assert fingerprint(again) == fingerprint(found)
    assert (found.labels.tolist(), found.classes) == ([UNLABELLED] * 4, ())
    (root / "c.png").write_bytes(picture(9))
    assert fingerprint(open_all(str(root))) != fingerprint(found)


def test_a_link_to_other_images_is_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", {"x": 2})
    (tmp_path / "photos").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "link")
    assert names(open_all(str(tmp_path / "photos"))) == ["link/x/0.png", "link/x/1.png"]


def test_tar_files_need_no_labels(tmp_path: Path) -> None:
    plain = [("x/0.png", picture(0)), ("x/0.txt", b"a caption"), ("x/1.png", picture(1)), ("x/.2.png", b"")]
    write_tar(tmp_path / "tars" / "b" / "0.tar", plain, tarfile.PAX_FORMAT)
    write_shard(tmp_path / "tars" / "a.tar", {"k": 3}, seed=7)
    found = open_all(str(tmp_path / "tars"))
    assert names(found) == ["a.tar/k.png", "b/0.tar/x/0.png", "b/0.tar/x/1.png"]
    assert [pixels(found, i) for i in range(3)] == [expected(7000), expected(0), expected(1)]
    assert names(open_all(str(tmp_path / "tars" / "b" / "0.tar"))) == ["0.tar/x/0.png", "0.tar/x/1.png"]
    assert names(open_all(f"{tmp_path}/tars/{{a,b/0}}.tar")) == names(found)
    before = fingerprint(found)
    write_tar(tmp_path / "tars" / "b" / "0.tar", [plain[0], ("x/1.png", picture(5, "jpg"))])
    assert fingerprint(open_all(str(tmp_path / "tars"))) != before
    (tmp_path / "tars" / "b" / "0.tar").write_bytes(b"")
    with pytest.raises(DataError, match="is cut off"):
        pixels(found, 2)


def test_digits_are_all_there() -> None:
    found = open_all("digits")
    assert len(found) == 1797
    assert names(found)[:2] == ["digit 0", "digit 1"]
    assert open_image(found[3][0], channels=1).size == (32, 32)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield datasets
    if shown:
        datasets.enable_progress_bars()


def cells(*seeds: int) -> list[dict[str, Any]]:
    return [{"bytes": picture(seed), "path": None} for seed in seeds]


def test_parquet_needs_no_labels(tables: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows").mkdir()
    for k, seeds in enumerate([(4, 5), (6,)]):
        pq.write_table(pa.table({"img": cells(*seeds), "number": [k] * len(seeds)}), tmp_path / f"rows/{k}.parquet")
    for source in ("rows", "rows/*.parquet", "rows?image=img"):
        found = open_all(f"{tmp_path}/{source}")
        assert names(found) == ["row 0", "row 1", "row 2"]
        assert [pixels(found, i) for i in range(3)] == [expected(seed) for seed in (4, 5, 6)]
    assert names(open_all(f"{tmp_path}/rows/1.parquet")) == ["row 0"]
    for bad, message in {"rows?image=x": "no column 'x'", "rows?image=number": "holds no encoded images"}.items():
        with pytest.raises(DataError, match=message):
            open_all(f"{tmp_path}/{bad}")
    write_tar(tmp_path / "rows" / "0.tar", [("0.png", picture(0))])
    with pytest.raises(DataError, match="holds tar files and parquet files"):
        open_all(f"{tmp_path}/rows")


def test_the_hub_gives_all_parts_or_one(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = tables.Features({"picture": tables.Image()})
    parts = {
        name: tables.Dataset.from_dict({"picture": cells(*seeds)}, features=feature)
        for name, seeds in {"train": (0, 1), "test": (2, 3, 4)}.items()
    }
    asked = []

    def open_hub(*given: Any) -> Any:
        asked.append(given)
        return tables.DatasetDict(parts)

    monkeypatch.setattr(source_module, "open_hub", open_hub)
    found = open_all("hub:org/pets:small?revision=main")
    assert asked == [("org/pets", "small", "main", "'hub:org/pets:small?revision=main'")]
    assert names(found) == ["test, row 0", "test, row 1", "test, row 2", "train, row 0", "train, row 1"]
    assert [pixels(found, i) for i in range(5)] == [expected(seed) for seed in (2, 3, 4, 0, 1)]
    one = open_all("hub:org/pets", part="train")
    assert names(one) == ["train, row 0", "train, row 1"]
    assert fingerprint(one) != fingerprint(found)
    with pytest.raises(DataError, match="no part 'val' but train, test"):
        open_all("hub:org/pets", part="val")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(picture(0))
    write_tar(tmp_path / "text.tar", [("a.txt", b"")])
    write_tar(tmp_path / "twice.tar", [("a.png", picture(0)), ("a.png", picture(1))])
    (tmp_path / "packed.tar.gz").write_bytes(b"")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    for source, message in {
        "nowhere": "do not exist",
        "empty": "holds no images, nor tar or parquet files",
        "a.png": "give single images without --data",
        "text.tar": "holds no images",
        "twice.tar": "holds 'a.png' twice",
        "packed.tar.gz": "is compressed",
        "bad.tar": "no tar file",
        "*.tgz": "matches no files",
        "bad.tar?image=x": "does not take the option 'image'",
    }.items():
        with pytest.raises(DataError, match=message):
            open_all(f"{tmp_path}/{source}")
    for source in ("hub:", "digits"):
        with pytest.raises(DataError):
            open_all(source, part="x" if source == "digits" else None)


def test_the_results_of_earlier_runs_are_still_those_of_the_same_images(tmp_path: Path) -> None:
    """Bulk prediction resumes a folder of results only if the fingerprint in its manifest is that of the images."""
    write_tar(tmp_path / "a.tar", [("x/0.png", b"image"), ("1.jpg", b"image")])
    for name in ("f/0.png", "f/a/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for source, expected in {
        "digits": "22b429449ced37094080c0d9876cff80f8ba34522e6ede364dd2d7312aa85443",
        f"{tmp_path}/a.tar": "35d93b03f9c1310931b93fd95d4f9aa5cccf59336f23a72152ac3d638f693fe6",
        f"{tmp_path}/f": "94b8c6a10a963a18cdcf01e4bb1da4d2232ba87baa1e7258462d9e4f7886e4c6",
    }.items():
        assert fingerprint(open_all(source)) == expected, source
