"""Images: folders, what holds of every source, and patterns of file names."""

from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from nfzoo.data import images as images_module
from nfzoo.data.digits import Digits
from nfzoo.data.images import ImageFolder, Texts, expand, is_pattern
from nfzoo.data.labels import match_classes
from nfzoo.data.source import open_all, open_split
from nfzoo.errors import DataError
from nfzoo.transforms import decode
from tests.support.pictures import check_source, write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pets", {"cat": 10, "dog": 6})


def test_hidden_and_other_files_are_passed_over(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / "cat" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "cat" / "deeper" / "more.JPG", "jpeg")
    assert len(ImageFolder.scan(folder)) == 17


@pytest.mark.parametrize(
    "name", ["@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".thumbnails", "@Recycle", "@tmp"]
)
def test_what_systems_put_beside_images_is_no_image_and_no_class(folder: Path, name: str) -> None:
    for parent in (folder, folder / "cat", folder / "cat" / "1.png.d"):
        thumbnails = parent / name / "SYNOPHOTO_THUMB"
        thumbnails.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(thumbnails / "small.png")
    images = ImageFolder.scan(folder)
    assert images.classes == ("cat", "dog")
    assert len(images) == 16
    assert len(open_all(str(folder))) == 16


def test_images_of_formats_that_are_not_read_are_counted_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "IMAGE_SUFFIXES", decode.IMAGE_SUFFIXES - decode.HEIF_SUFFIXES)
    monkeypatch.setattr(images_module, "UNREAD_SUFFIXES", decode.UNREAD_SUFFIXES | decode.HEIF_SUFFIXES)
    for i in range(5):
        (folder / "cat" / f"{i}.HEIC").write_bytes(b"")
    (folder / "dog" / "a.jxl").write_bytes(b"")
    assert len(ImageFolder.scan(folder)) == 16
    assert "are left out: 5 .heic, 1 .jxl; pip install 'nfzoo[heif]' reads HEIC" in caplog.text
    caplog.clear()
    (folder / "fish").mkdir()
    (folder / "fish" / "1.heic").write_bytes(b"")
    with pytest.raises(DataError, match="fish' holds no images"):
        ImageFolder.scan(folder)
    assert ".heic" in caplog.text


def test_heic_is_read_with_its_plug_in(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pillow_heif.register_heif_opener()
    picture = Image.new("RGB", (64, 48), (200, 30, 60))
    picture.save(folder / "cat" / "photo.HEIC", format="HEIF", quality=95)
    images = ImageFolder.scan(folder)
    assert len(images) == 17
    assert not caplog.text
    source = next(source for source, _ in images if str(source).endswith(".HEIC"))  # pyright: ignore[reportGeneralTypeIssues]
    pixels = np.asarray(decode.open_image(source)).astype(int)
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels - (200, 30, 60)).max() <= 6


def test_a_letter_in_two_encodings_is_one_letter(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_images(tmp_path / "train", {composed: 4, "cafz": 4})
    write_images(tmp_path / "val", {decomposed: 2, "cafz": 2})
    split = open_split(str(tmp_path))
    assert split.train.classes == split.validation.classes == ("cafz", composed)
    assert [split.validation.name(int(i)).count(decomposed) for i in np.flatnonzero(split.validation.labels == 1)] == [
        1,
        1,
    ]
    assert match_classes([decomposed, "cafz"], 2, ["cafz", composed], source="val")[0] == (1, 0)
    assert match_classes([composed], 2, ["cafz", decomposed], source="val")[0] == (1,)
    write_images(tmp_path / "both", {composed: 1, decomposed: 1})
    with pytest.raises(DataError, match=r"has folders .cafe\\u0301. and .caf\\xe9., .*merge them"):
        ImageFolder.scan(tmp_path / "both")


def test_no_folder_is_entered_twice(folder: Path) -> None:
    (folder / "cat" / "loop").symlink_to(folder / "cat", target_is_directory=True)
    (folder / "cat" / "other").symlink_to(folder / "cat" / "loop", target_is_directory=True)
    assert len(ImageFolder.scan(folder)) == 16


def test_every_source_keeps_the_laws(folder: Path) -> None:
    check_source(ImageFolder.scan(folder))
    check_source(Digits.embedded())


def test_images_are_in_the_order_of_paths(folder: Path) -> None:
    """`a/b` comes before `a-b`, as parts of a path compare."""
    for name in ("a/0.png", "a-b.png", "a.png"):
        (folder / "cat" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "cat" / name)
    images = ImageFolder.scan(folder)
    paths = [images[i][0] for i in range(len(images))]
    assert len(paths) == 19
    assert paths == sorted(paths)


def test_other_classes_than_expected_are_refused(folder: Path) -> None:
    assert len(ImageFolder.scan(folder, ("cat", "dog"))) == 16
    with pytest.raises(DataError, match="2 classes where 3 are expected; they differ in 'eel'"):
        ImageFolder.scan(folder, ("cat", "dog", "eel"))
    with pytest.raises(DataError, match="another order"):
        ImageFolder.scan(folder, ("dog", "cat"))


def test_texts() -> None:
    names = ["", "a", "Ünï", "b/c.jpg", "\udcff", ""]
    texts = Texts(names)
    assert list(texts) == names
    assert texts[-2] == "\udcff"
    assert len(Texts([])) == 0
    with pytest.raises(IndexError):
        texts[6]


# -- patterns of file names


@pytest.mark.parametrize(("path", "found"), [("a/b.tar", False), ("a/*.tar", True), ("{0..3}", True), ("a[1]", True)])
def test_patterns_are_known(path: str, found: bool) -> None:
    assert is_pattern(path) == found


def test_braces_and_stars(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-1.tar", "b-2.tar", "b-2.txt"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand(str(tmp_path / pattern), (".tar",))]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("b-{2,1}.tar") == ["b-2.tar", "b-1.tar"]
    assert sorted(names("{b-{1..2},a-08}.tar")) == ["a-08.tar", "b-1.tar", "b-2.tar"]
    assert names("[ab]-?.*") == ["b-1.tar", "b-2.tar"]
    with pytest.raises(DataError, match=r"a-11\.tar' of .* is missing, and 1 more"):
        names("a-{08..12}.tar")
    with pytest.raises(DataError, match=r"matches no files that end in one of \.tar"):
        names("*.txt")
    with pytest.raises(DataError, match=r"names '.*b-1\.tar' twice"):
        names("b-{1,?}.tar")
    with pytest.raises(DataError, match="does not count upwards"):
        names("a-{0..9999999}.tar")
