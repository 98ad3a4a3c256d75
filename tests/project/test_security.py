"""Every promise of SECURITY.md names tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def promises(text: str) -> dict[str, list[str]]:
    """Promise -> its tests, from the rows of all tables."""
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| (.+) \|$", text, re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return {promise: re.findall(r"`([^`]+)`", tests) for promise, tests in rows}


def missing(name: str) -> bool:
    """Whether a test `path::function` does not exist."""
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file():
        return True
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return not any(isinstance(node, ast.FunctionDef) and node.name == function for node in nodes)


def test_every_promise_is_held_by_tests_that_exist() -> None:
    table = promises((ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(table) >= 20
    assert {promise for promise, tests in table.items() if not tests} == set()
    assert {name for tests in table.values() for name in tests if missing(name)} == set()


def test_a_promise_without_its_test_is_noticed() -> None:
    table = promises(
        "| promise | tests |\n| --- | --- |\n| A. | `tests/x.py::test_a`, `tests/y.py::test_b` |\n| B. | none |\n"
    )
    assert table == {"A.": ["tests/x.py::test_a", "tests/y.py::test_b"], "B.": []}
    own = "tests/project/test_security.py"
    assert not missing(f"{own}::test_a_promise_without_its_test_is_noticed")
    assert missing(f"{own}::test_that_was_renamed")
    assert missing("tests/project/test_that_was_moved.py::test_page")
