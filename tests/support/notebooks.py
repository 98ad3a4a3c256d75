"""Run the notebooks of docs/notebooks without a kernel: cell after cell, in this process and an empty folder.

    python -m tests.support.notebooks    # runs all, and stores what they print and show

A cell shows what it prints, and the value of its last expression: as a picture if it is one, else as text.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
VARIES = "varies"
"""Tag of a cell whose numbers depend on the machine, as those of a training do."""

_SPEED = re.compile(r"\d+ images/s")


def names() -> list[str]:
    """The notebooks, by their names without the suffix."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> dict[str, Any]:
    """A notebook as the JSON that it is."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that are run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any], name: str) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, in the form of the notebook format 4.5.

    Raises:
        AssertionError: if a cell writes to standard error, as warnings do.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = []
    with _empty_folder():
        for count, cell in enumerate(code_cells(notebook), start=1):
            title = f"{name}.ipynb, cell {count}"
            out, err = io.StringIO(), io.StringIO()
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    value = _run_cell(source(cell), title, namespace)
                    data = None if value is None else _shown(value)
            except BaseException as error:
                error.add_note(f"in {title}")
                raise
            assert not err.getvalue(), f"{title} writes to standard error: {err.getvalue()}"
            outputs: list[dict[str, Any]] = []
            if out.getvalue():
                text = _SPEED.sub("… images/s", out.getvalue())
                outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
            if data is not None:
                outputs.append(
                    {"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"}
                )
            found.append(outputs)
    return found


def _run_cell(code: str, title: str, namespace: dict[str, Any]) -> Any:
    """The value of a cell's last expression, `None` if it ends otherwise."""
    tree = ast.parse(code, title)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, title, "exec", dont_inherit=True), namespace)
        return None
    tree.body.pop()
    exec(compile(tree, title, "exec", dont_inherit=True), namespace)
    return eval(compile(ast.Expression(last.value), title, "eval", dont_inherit=True), namespace)


def _shown(value: Any) -> dict[str, Any]:
    """A value by its kind of contents, as a kernel shows it."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    data: dict[str, Any] = {"text/plain": text.splitlines(keepends=True)}
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
    return data


@contextlib.contextmanager
def _empty_folder() -> Iterator[None]:
    """Work in a folder that goes when the notebook has run."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def main() -> int:
    """Run all notebooks and store their outputs."""
    for name in names():
        notebook = read(name)
        for count, (cell, outputs) in enumerate(zip(code_cells(notebook), run(notebook, name), strict=True), start=1):
            cell["execution_count"], cell["outputs"] = count, outputs
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        (FOLDER / f"{name}.ipynb").write_text(text, encoding="utf-8")
        print(f"{name}: {len(code_cells(notebook))} cells run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
