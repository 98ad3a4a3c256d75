"""Every image is read once, whatever reads it, and copies are found by their bytes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfzoo.check import scan as scan_module
from nfzoo.check.scan import Facts, scan
from nfzoo.data.images import ImageFolder
from nfzoo.data.source import open_parts
from tests.support.pictures import picture, png, write_images, write_shard, write_tar


def numbers(facts: Facts) -> tuple[object, ...]:
    arrays = [a.tolist() for a in (facts.readable, facts.width, facts.height, *facts.copies)]
    return arrays, facts.modes, facts.odd, facts.problems


def names_of_copies(facts: Facts) -> list[set[str]]:
    return [{Path(facts.name(int(i))).name for i in group} for group in facts.copies]


def test_odd_images_are_counted_and_sizes_are_upright(tmp_path: Path) -> None:
    folder = tmp_path / "odd" / "a"
    folder.mkdir(parents=True)
    rgb = Image.new("RGB", (30, 20), "red")
    rgb.save(folder / "plain.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.quantize(4).save(folder / "transparent.png", transparency=0)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    (folder / "grey16.png").write_bytes(png(30, 20, bits=16))
    (folder / "rgb16.png").write_bytes(png(30, 20, bits=16, colour=2))
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(folder / "grey16.tif")
    rgb.save(folder / "moves.gif", save_all=True, append_images=[Image.new("RGB", (30, 20), "blue")])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    facts = scan({"all": ImageFolder.scan(folder.parent)})
    assert facts.readable.all()
    assert facts.odd == {"alpha": 2, "CMYK": 1, "16-bit": 3, "animated": 1, "EXIF-rotated": 1}
    assert facts.modes == {"RGB": 3, "I;16": 2, "P": 2, "CMYK": 1, "RGBA": 1}
    sizes = {Path(facts.name(i)).stem: (facts.width[i], facts.height[i]) for i in range(9)}
    assert sizes.pop("turned") == (20, 30)
    assert set(sizes.values()) == {(30, 20)}


def test_processes_change_nothing_and_problems_name_the_file(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pets", {"cat": 90, "dog": 50})
    shutil.copy(folder / "cat" / "3.png", folder / "dog" / "copy.png")
    (folder / "dog" / "cut.png").write_bytes((folder / "dog" / "1.png").read_bytes()[:300])
    (folder / "dog" / "empty.png").write_bytes(b"")
    parts = open_parts(str(folder))
    alone, shared = scan(parts), scan(parts, workers=2)
    assert numbers(alone) == numbers(shared)
    assert names_of_copies(alone) == [{"3.png", "copy.png"}]
    assert sorted(alone.problems.values())[1] == f"{folder}/dog/empty.png is empty"
    assert "cut.png cannot be decoded" in min(alone.problems.values())
    assert (~alone.readable).sum() == 2


def test_only_images_of_one_size_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(9, 9)
    files = {"a": content, "b": content, "c": content + b"1", "d": content + b"22", "e": content + b"33"}
    (tmp_path / "x" / "k").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "x" / "k" / f"{name}.png").write_bytes(data)
    hashed = []
    digest = scan_module._digest

    def counted(source: Path) -> bytes:
        hashed.append(source.name)
        return digest(source)

    monkeypatch.setattr(scan_module, "_digest", counted)
    facts = scan({"all": ImageFolder.scan(tmp_path / "x")})
    assert hashed == ["a.png", "b.png", "d.png", "e.png"]
    assert names_of_copies(facts) == [{"a.png", "b.png"}]
    assert digest(tmp_path / "x" / "k" / "a.png") == hashlib.sha256(content).digest()


def test_copies_in_tar_files_and_among_images_without_bytes(tmp_path: Path) -> None:
    members = [(f"{i}.png", picture(i % 4)) for i in range(6)]
    labels = [(f"{i}.cls", b"%d" % (i % 2)) for i in range(6)]
    write_tar(tmp_path / "shards" / "train-0.tar", sorted(members + labels))
    write_shard(tmp_path / "shards" / "val-0.tar", {"x": 0, "y": 1})
    facts = scan(open_parts(str(tmp_path / "shards")))
    assert list(facts.parts) == ["train", "val"]
    # The first two pictures are also those of the part that is held out.
    assert [sorted(group.tolist()) for group in facts.copies] == [[0, 4, 6], [1, 5, 7]]
    assert facts.where(6) == ("val", 0)
    digits = scan(open_parts("digits"))
    assert digits.modes == {"L": 1797}
    pixels = next(iter(digits.parts.values())).pixels  # type: ignore[attr-defined]
    assert sum(map(len, digits.copies)) == 1797 - int((np.unique(pixels, axis=0, return_counts=True)[1] == 1).sum())
