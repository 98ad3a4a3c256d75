"""Parquet files and data sets of the Hub: which columns are images and labels, and what is refused."""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nfzoo.config import Preprocessing
from nfzoo.data.hf_datasets import HFDataset
from nfzoo.data.loader import training_batches
from nfzoo.data.source import has_held_out, open_all, open_held_out, open_split
from nfzoo.errors import DataError
from nfzoo.transforms.decode import open_image
from tests.support.data_hub import DataHub
from tests.support.pictures import check_source, picture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    if shown:
        datasets.enable_progress_bars()


def cells(count: int) -> list[dict[str, Any]]:
    return [{"bytes": picture(i), "path": f"{i}.png"} for i in range(count)]


def write_parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def wrap(columns: dict[str, Any], features: Any = None, **options: Any) -> HFDataset:
    return HFDataset.labelled(datasets.Dataset.from_dict(columns, features=features), "the table", **options)


def content(images: HFDataset, index: int) -> bytes:
    found = images[index][0]
    assert isinstance(found, io.BytesIO)
    return found.read()


def test_a_table_keeps_the_laws() -> None:
    images = wrap({"image": cells(5), "label": [2, 0, 1, 1, 0]})
    check_source(images)
    assert images.labels.tolist() == [2, 0, 1, 1, 0]
    assert images.classes == ("0", "1", "2")
    assert [content(images, i) for i in range(5)] == [picture(i) for i in range(5)]
    again = pickle.loads(pickle.dumps(images.subset([3])))
    assert content(again, 0) == picture(3)


@pytest.mark.parametrize("stored", ["bytes and path", "bytes", "paths", "feature"])
def test_images_are_stored_in_every_usual_way(tmp_path: Path, stored: str) -> None:
    features = None
    column: list[Any] = cells(3)
    match stored:
        case "bytes":
            column = [picture(i) for i in range(3)]
        case "paths":
            column = [str(tmp_path / f"{i}.png") for i in range(3)]
            for i in range(3):
                (tmp_path / f"{i}.png").write_bytes(picture(i))
        case "feature":
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = wrap({"image": column, "label": [0, 1, 0]}, features, folders=[tmp_path])
    for i in range(3):
        with Image.open(io.BytesIO(picture(i))) as expected:
            np.testing.assert_array_equal(open_image(images[i][0]), expected)


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"img": 0, "fine_label": 1, "coarse_label": 2}, {}),
        ({"jpg": 0, "cls": 1, "__key__": 2}, {}),
        ({"other": 2, "picture": 0, "labels": 1}, {}),
        ({"scan": 0, "image": 2, "kind": 1, "label": 2}, {"image": "scan", "label": "kind"}),
    ],
)
def test_columns_are_found(columns: dict[str, int], options: dict[str, str]) -> None:
    kinds = [cells(2), [1, 0], [7, 7]]
    images = wrap({name: kinds[kind] for name, kind in columns.items()}, **options)
    assert content(images, 1) == picture(1)
    assert images.labels.tolist() == [1, 0]


def test_columns_are_found_by_their_kind() -> None:
    features = datasets.Features(
        {"scan": datasets.Image(), "text": datasets.Value("string"), "species": datasets.ClassLabel(names=["a", "b"])}
    )
    images = wrap({"scan": cells(2), "text": ["x", "y"], "species": [1, 0]}, features)
    assert images.classes == ("a", "b")
    assert images.labels.tolist() == [1, 0]


def test_labels_by_name_are_numbered_in_order_of_the_alphabet() -> None:
    train = wrap({"image": cells(3), "label": ["dog", "cat", "dog"]})
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [1, 0, 1]
    assert wrap({"image": cells(1), "label": ["dog"]}, classes=train.classes).labels.tolist() == [1]
    with pytest.raises(DataError, match="'eel', which the training images do not have"):
        wrap({"image": cells(1), "label": ["eel"]}, classes=train.classes)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": cells(1)}, {}, r"no column of labels with a usual name but image; add \?label="),
        ({"label": [0], "x": [1]}, {}, r"no column of images with a usual name but label, x"),
        ({"image": cells(1), "label": [0]}, {"label": "kind"}, r"no column 'kind' for \?label="),
        ({"image": cells(1), "label": [0]}, {"image": "img"}, r"no column 'img' for \?image="),
        ({"image": [0.5], "label": [0]}, {}, "holds no encoded images"),
        ({"image": cells(1), "label": [-1]}, {}, "holds -1, which means no label"),
        ({"image": cells(1), "label": [0.5]}, {}, "neither class numbers nor names"),
        ({"image": cells(1), "label": [True]}, {}, "neither class numbers nor names"),
        ({"image": cells(1), "label": [[1, 2]]}, {}, "neither class numbers nor names"),
        ({"image": cells(2), "label": [0, None]}, {}, "1 rows without a 'label'"),
        ({"image": cells(2), "label": [0, 5]}, {"classes": ("a", "b")}, "holds 5, beyond the 2 classes"),
        ({"image": [], "label": []}, {}, "the table is empty"),
    ],
)
def test_unusable_tables_are_explained(columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        wrap(columns, **options)
    assert "the table" in str(caught.value)


def test_other_class_names_than_the_training_images_are_refused() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    with pytest.raises(DataError, match="2 classes where 2 are expected; they differ in 'b', 'c'"):
        wrap({"image": cells(1), "label": [0]}, features, classes=("a", "c"))


def test_a_row_without_an_image_is_a_broken_image() -> None:
    images = wrap({"image": [*cells(3), None], "label": [0, 1, 0, 1]})
    rule = Preprocessing(train_size=8, test_size=8)
    (batch,) = training_batches(images, rule, epoch=0, seed=0, batch_size=4)
    assert batch.broken == ("the table, row 3 holds no image",)
    assert sorted(batch.indices.tolist()) == [0, 0, 1, 2]


def test_a_table_names_files_of_its_own_folder_alone(tmp_path: Path) -> None:
    """A table from elsewhere could name any file of this machine, also by links that came with it."""
    own, other = tmp_path / "own", tmp_path / "own-too"
    for folder in (own / "deep", other):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(picture(0))
    (own / "link.png").symlink_to(other / "0.png")
    (own / "folder").symlink_to(other)
    (own / "inside.png").symlink_to("deep/0.png")
    (tmp_path / "way").symlink_to(own)  # the user's own way to the data
    inside = ("deep/0.png", str(own / "deep" / "0.png"), "deep/../inside.png", str(tmp_path / "way" / "deep" / "0.png"))
    outside = (
        "/etc/passwd",
        "../own-too/0.png",
        str(other / "0.png"),
        "link.png",
        "folder/0.png",
        "deep/../../own-too/0.png",
    )
    column = [{"bytes": None, "path": path} for path in (*inside, *outside, "absent.png")]
    for folder in (own, tmp_path / "way"):
        images = wrap({"image": column, "label": [0] * len(column)}, folders=[folder])
        for i in range(len(inside)):
            assert open_image(images[i][0]).size == (24, 20)
        for i, path in enumerate(outside, start=len(inside)):
            with pytest.raises(DataError, match=rf"row {i} names the file {path!r}, which does not lie in the folder"):
                images[i]
        with pytest.raises(DataError, match="does not exist"):
            open_image(images[len(column) - 1][0])
    for index in range(len(column)):
        with pytest.raises(DataError, match="does not lie in the folder"):
            wrap({"image": column, "label": [0] * len(column)})[index]


def test_rows_of_parquet_files_that_name_files(tmp_path: Path) -> None:
    column = [{"bytes": None, "path": path} for path in ("0.png", "/etc/passwd")]
    source = str(write_parquet(tmp_path / "data" / "a.parquet", image=column, label=[0, 1]).parent)
    (tmp_path / "data" / "0.png").write_bytes(picture(0))
    for images in (open_all(f"{source}/a.parquet"), open_held_out(source).images, open_all(f"{source}/*.parquet")):
        assert open_image(images[0][0]).size == (24, 20)
        with pytest.raises(DataError, match="names the file '/etc/passwd'"):
            images[1]


# -- parquet files


def test_one_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pets.parquet", image=cells(8), label=[0, 1] * 4)
    train, validation = open_split(str(path), validation_fraction=0.25)
    assert (len(train), len(validation)) == (6, 2)
    assert not has_held_out(str(path))
    found = open_held_out(str(path))
    assert (found.dataset, found.split, len(found.images)) == ("pets.parquet", None, 8)
    assert found.images.name(3) == f"{str(path)!r}, row 3"


def test_parts_of_a_folder_as_the_hub_stores_them(tmp_path: Path) -> None:
    for k in range(2):
        write_parquet(tmp_path / "data" / f"train-0000{k}-of-00002.parquet", img=cells(3), fine_label=[k, 0, 2])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", img=cells(2), fine_label=[1, 1])
    train, validation = open_split(str(tmp_path / "data"))
    assert train.labels.tolist() == [0, 0, 2, 1, 0, 2]
    assert validation.labels.tolist() == [1, 1]
    assert validation.classes == ("0", "1", "2")
    named = open_split(f"{tmp_path / 'data'}?image=img&label=fine_label")
    assert named.train.labels.tolist() == train.labels.tolist()


def test_folders_of_parquet_files_with_workers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train" / "a.parquet", image=cells(8), label=[0, 1] * 4)
    write_parquet(tmp_path / "val" / "a.parquet", image=cells(2), label=[0, 1])
    images = open_split(str(tmp_path)).train
    rule = Preprocessing(train_size=8, test_size=8)
    alone, helped = (
        list(training_batches(images, rule, epoch=0, seed=0, batch_size=4, workers=workers)) for workers in (0, 2)
    )
    for one, other in zip(alone, helped, strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        assert (one.pixels == other.pixels).all()


def test_damaged_parquet_files_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pets.parquet", image=cells(8), label=[0, 1] * 4)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"pets\.parquet' cannot be opened \(.*\); check the files") as caught:
        open_split(str(path))
    assert "\n" not in str(caught.value)


def test_a_number_in_a_parquet_file_takes_no_memory(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", image=cells(2), label=[0, 2_147_483_646])
    with pytest.raises(DataError, match="has label 2,147,483,646; 2 images have at most 65,536 classes"):
        open_split(str(path))
    path = write_parquet(
        tmp_path / "y.parquet", image=cells(1) * 99_999, label=[0] * 99_999
    )  # each column in a few bytes
    with pytest.raises(DataError, match=r"y\.parquet states 99,999 rows in .* bytes"):
        open_split(str(path))


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "pets.parquet", image=cells(2), label=[0, 1])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'nfzoo\[data\]'"):
        open_split(str(path))


# -- the Hub


OPENED = """
import sys
from nfzoo.errors import DataError
from nfzoo.data.source import open_held_out, open_split
train, validation = open_split("hub:org/pets")
print(train.labels.tolist(), validation.labels.tolist(), train.classes, train.name(1))
sys.stdout.flush()
sys.stdout.buffer.write(validation[1][0].read().hex().encode() + b"\\n")
print(*open_held_out("hub:org/pets?validation=train&image=img")[1:])
for source in sys.argv[1:]:
    try:
        open_split(source)
    except DataError as error:
        print(error)
"""


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", img=cells(4), label=[0, 1, 2, 1])
    test = write_parquet(tmp_path / "test.parquet", img=cells(2)[::-1], label=[1, 0])
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train-00000-of-00001.parquet": train.read_bytes(),
        "data/test-00000-of-00001.parquet": test.read_bytes(),
    }
    bad = {
        "hub:org/absent": "'hub:org/absent' cannot be opened",
        "hub:org/pets:large": "'large' not found",
        "hub:org/pets?revision=old": "cannot be opened",
        "hub:org/pets?train=all": "has no part 'all' but train, test; add ?train=PART",
        "hub:org/pets?label=kind": "no column 'kind' for ?label=; its columns are img, label",
        "hub:org/pets/data": "names no data set of the Hub",
    }
    with DataHub("org/pets", files) as hub:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", OPENED, *bad],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "[0, 1, 2, 1] [1, 0] ('0', '1', '2') hub:org/pets (train), row 1"
    assert bytes.fromhex(lines[1]) == picture(0)
    assert lines[2].startswith("org/pets train ")
    assert len(lines) == 3 + len(bad)
    for line, message in zip(lines[3:], bad.values(), strict=True):
        assert message in line
    # The server is gone: one try, and then what the cache holds.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OPENED, "hub:org/other"],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    assert done.stdout.splitlines()[:3] == lines[:3]
    assert "'hub:org/other' is not whole in the cache, and the Hub cannot be reached (" in done.stdout.splitlines()[3]


FILES_OF_THE_HUB = """
import sys
from nfzoo.data.source import open_split
from nfzoo.errors import DataError
from nfzoo.transforms.decode import open_image
train, validation = open_split("hub:org/pets")
print([open_image(train[i][0]).size for i in range(len(train))], train.classes)
try:
    validation[0]
except DataError as error:
    print(error)
"""


@pytest.mark.slow
def test_image_files_of_a_data_set_of_the_hub_are_read_and_no_others(tmp_path: Path) -> None:
    shown = {f"train/{name}/0.png": picture(0) for name in ("cat", "dog")}
    row = write_parquet(tmp_path / "test.parquet", image=[{"bytes": None, "path": "/etc/passwd"}], label=[0])
    for files, expected in (
        ({**shown, **{f"test/{name}/0.png": picture(0) for name in ("cat", "dog")}}, []),
        (
            {"train.parquet": write_parquet(tmp_path / "a.parquet", image=cells(2), label=[0, 1]).read_bytes()}
            | {"test.parquet": row.read_bytes()},
            ["hub:org/pets (test), row 0 names the file '/etc/passwd'"],
        ),
    ):
        with DataHub("org/pets", files) as hub:
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", FILES_OF_THE_HUB],
                env={
                    **os.environ,
                    "HF_ENDPOINT": hub.url,
                    "HF_HOME": str(tmp_path / hub.url[-5:]),
                    "HF_HUB_OFFLINE": "0",
                },
                capture_output=True,
                text=True,
                timeout=300,
            )
        assert done.returncode == 0, done.stderr
        first, *others = done.stdout.splitlines()
        assert first.startswith("[(24, 20), (24, 20)] ")
        assert len(others) == len(expected)
        assert all(line.startswith(start) for line, start in zip(others, expected, strict=True))
