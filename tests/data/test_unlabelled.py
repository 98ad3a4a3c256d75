"""All images of a source by name: each found once, in one order, without labels, and told apart from others."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pytest

from nfzoo.data import unlabelled
from nfzoo.data.unlabelled import Pictures, fingerprint, open_all
from nfzoo.errors import DataError
from nfzoo.transforms.decode import open_image
from tests.support.pictures import picture, write_images, write_shard, write_tar


def names(pictures: Pictures) -> list[str]:
    found = [pictures.name(i) for i in range(len(pictures))]
    assert len(set(found)) == len(found)
    return found


def pixels(pictures: Pictures, index: int) -> bytes:
    return open_image(pictures[index]).tobytes()


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
    assert open_image(found[3], channels=1).size == (32, 32)


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

    monkeypatch.setattr(unlabelled, "open_hub", open_hub)
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
        "a.png": "single images go without --data",
        "text.tar": "holds no images",
        "twice.tar": "names are not their own",
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
