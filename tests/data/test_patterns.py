"""Patterns of file names, and options behind a `?`."""

from pathlib import Path

import pytest

from nfzoo.data.patterns import expand, is_pattern, split_options
from nfzoo.errors import DataError


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
