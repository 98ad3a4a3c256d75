"""The pages of ideas show what their code prints, and their plots what the benchmark computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from benchmarks.claims import ideas
from benchmarks.claims.stability import digits, load
from tests.support.documents import assert_alike, printed_by, shown_blocks
from tests.support.loops import each

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "ideas"
DRAWN_ALIKE = 1.0  # grey levels on average: curves of another machine may move a little, an empty picture costs 6
PAGES = ("why-no-normalizer", "weight-standardization", "alpha-and-beta", "agc")


@each("page", PAGES)
def test_a_page_shows_what_its_code_prints(page: str) -> None:
    blocks = shown_blocks(FOLDER / f"{page}.md")
    assert blocks
    for code, shown in blocks:
        assert_alike(printed_by(code, f"{page}.md"), shown)


@each("page", PAGES)
def test_a_page_has_a_small_picture(page: str) -> None:
    picture = FOLDER / f"{page}.png"
    assert f"]({picture.name})" in (FOLDER / f"{page}.md").read_text()
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width == 1440


def test_moments_follow_the_law() -> None:
    plain, standard = (ideas.moments(way, layers=6, channels=64) for way in (False, True))
    assert sum(plain[0]) == pytest.approx(ideas.GROWTH, rel=0.15)  # 64 channels' means are few draws
    assert sum(plain[-1]) > 4
    assert all(mean < 0.01 and abs(variance - 1) < 0.1 for mean, variance in standard)


def test_without_beta_blocks_double_the_variance() -> None:
    found = ideas.without_beta(*ideas.tower(1.0, widths=(128, 128, 128, 128)))
    assert len(found) == 16
    assert 1.6 < (found[-1] / found[0]) ** (1 / 15) < 2.2  # padding of small maps takes some


def test_an_nf_network_couples_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ideas, "SIZES", (4, 8))
    monkeypatch.setattr(ideas, "PARTS", (1, 2))
    monkeypatch.setattr(ideas, "EXAMPLES", 3)
    both = ideas.untrained()
    found = ideas.coupling(both["NF-ResNet"], digits())
    assert found.mates == [0, 0]
    assert found.parts[0] == 0
    assert found.parts[1] < 1e-5  # sums in another order, in float32
    mixed = ideas.coupling(both["batch norm"], digits())
    assert min(mixed.mates) > 0.1
    assert mixed.parts[1] > 0.1


def test_the_plot_of_clipping_is_drawn(tmp_path: Path) -> None:
    ratios = ideas.gradient_ratios(digits(), steps=1, batch=16)
    assert {len(values) for values in ratios.values()} == {4, 8, 16, 32, 64}
    runs = [run for run in load(ideas.STABILITY).values() if run.batch == 256]
    ideas.draw_clipping(ratios, runs, tmp_path / "agc.png", clip=0.04)
    assert (tmp_path / "agc.png").stat().st_size < 60_000


@pytest.mark.slow
def test_the_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    assert ideas.main(["--output", str(tmp_path)]) == 0
    for page in PAGES:
        with Image.open(tmp_path / f"{page}.png") as new, Image.open(FOLDER / f"{page}.png") as old:
            difference = ImageChops.difference(new.convert("L"), old.convert("L"))
        assert ImageStat.Stat(difference).mean[0] < DRAWN_ALIKE, page
