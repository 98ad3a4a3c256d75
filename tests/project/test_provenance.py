"""Every file of tests/reference says in its README where its numbers come from."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REFERENCE = TESTS / "reference"
README = (REFERENCE / "README.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 2, heading
    assert len({len(line) for line in lines}) == 1, heading
    return [[cell.strip() for cell in line] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_file_has_one_line() -> None:
    files = [path.relative_to(REFERENCE) for path in REFERENCE.rglob("*") if path.is_file()]
    files = [path.as_posix() for path in files if "__pycache__" not in path.parts and path.name != "README.md"]
    listed = [name for row in rows("The files") for name in names(row[0])]
    assert sorted(listed) == sorted(files)


def test_every_origin_is_known() -> None:
    origins = re.findall(r"^- \*\*(.+?)\*\*", README, re.M)
    assert origins
    for heading in ("The files", "Numbers in the tests"):
        assert {row[1] for row in rows(heading)} <= set(origins)


def test_the_tests_that_are_named_exist() -> None:
    tests = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")}
    used = [name for row in rows("The files") for name in names(row[3])]
    for name in used + [name for row in rows("Numbers in the tests") for name in names(row[0])]:
        assert name in tests, name
