"""The notebooks run from top to bottom, and show what they print."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType

import pytest

from nfzoo import config
from nfzoo.models import functional
from tests.support import notebooks
from tests.support.documents import assert_alike
from tests.support.loops import each
from tests.support.notebooks import VARIES, code_cells, read, source

NAMES = ("agc-by-hand", "haiku-to-fine-tuned", "quick-start", "signal-propagation")


def test_all_notebooks_are_tested() -> None:
    assert tuple(notebooks.names()) == NAMES


@each("name", NAMES)
def test_a_notebook_is_small_and_has_been_run(name: str) -> None:
    text = (notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 120_000
    notebook = read(name)
    assert json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n" == text
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for count, cell in enumerate(code_cells(notebook), start=1):
        assert cell["execution_count"] == count
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result")
            assert output.get("name", "stdout") == "stdout"


@each("name", NAMES)
def test_a_notebook_tells_nothing_of_the_machine(name: str) -> None:
    for cell in code_cells(read(name)):
        for output in cell["outputs"]:
            shown = "".join(output.get("text", output.get("data", {}).get("text/plain", [])))
            assert not re.search(r"/(home|root|tmp|Users)\b|0x[0-9a-f]{6}|\d images/s|[Ww]arning", shown), shown


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """Return the site's hooks, a file that is in no package."""
    spec = importlib.util.spec_from_file_location("hooks", notebooks.FOLDER.parent / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@each("name", NAMES)
def test_a_notebook_is_a_page_of_the_site(name: str, hooks: ModuleType) -> None:
    path = f"docs/notebooks/{name}.md"
    page = hooks.made(path)
    for cell in read(name)["cells"]:
        assert source(cell) in page
        for output in cell.get("outputs", []):
            if "text" in output:
                assert "".join(output["text"]).rstrip() in page
    targets = [found[0] for target in hooks.links(page) if (found := hooks.destination(path, target))]
    assert all(hooks.exists(target) for target in targets), targets
    assert page.count("data:image/png;base64,") == (name in ("quick-start", "signal-propagation"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_what_it_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "GAMMA", dict(functional.GAMMA))  # a notebook registers activations
    monkeypatch.setattr(functional, "_ACTIVATION", dict(functional._ACTIVATION))
    before = list(config.ACTIVATIONS)
    notebook = read(name)
    try:
        found = notebooks.run(notebook, name)
    finally:
        config.ACTIVATIONS[:] = before
    for cell, outputs in zip(code_cells(notebook), found, strict=True):
        varies = VARIES in cell["metadata"].get("tags", [])
        assert len(outputs) == len(cell["outputs"]), source(cell)
        for printed, shown in zip(outputs, cell["outputs"], strict=True):
            assert printed["output_type"] == shown["output_type"]
            if "text" in printed:
                assert_alike("".join(printed["text"]), "".join(shown["text"]), any_numbers=varies)
            else:
                assert printed["data"].keys() == shown["data"].keys()
                assert printed["data"]["text/plain"] == shown["data"]["text/plain"]


def test_a_cell_that_warns_is_refused() -> None:
    cell = {"cell_type": "code", "source": ["import sys\n", "print('careful', file=sys.stderr)"]}
    with pytest.raises(AssertionError, match=r"x\.ipynb, cell 1 writes to standard error: careful"):
        notebooks.run({"cells": [cell]}, "x")


def test_the_last_expression_is_shown() -> None:
    cell = {"cell_type": "code", "source": ["print('3 images/s')\n", "6 * 7"]}
    (outputs,) = notebooks.run({"cells": [cell]}, "x")
    assert outputs[0]["text"] == ["… images/s\n"]
    assert outputs[1]["data"] == {"text/plain": ["42"]}
