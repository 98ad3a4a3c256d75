"""Imports run along the table in ARCHITECTURE.md only. Sources are parsed, not run, so lazy imports count too."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = {"nfzoo": "nfzoo", "hub": "nfzoo.hub", "conversion": "nfzoo.conversion"}  # folder -> import name
OTHERS = ("tests", "benchmarks")

# One row of the table: names of packages and modules, what they hold, and what they may import.
_ROW = re.compile(r"^\| (`[^|]+) \|[^|]+\| ([^|]+) \|$", re.MULTILINE)


def arrows(text: str) -> dict[str, frozenset[str]]:
    """Unit -> the units that it may import. A unit is a package, or a module directly in `nfzoo/`."""
    allowed: dict[str, frozenset[str]] = {}
    for names, targets in _ROW.findall(text.partition("## Arrows")[2].partition("\n## ")[0]):
        named = re.findall(r"`([\w.]+)`", targets)
        for name in re.findall(r"`([\w.]+)`", names):
            allowed[name] = frozenset([*named, *allowed] if "all before" in targets else named)
    return allowed


ARROWS = arrows((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))

# The doors: an import against the arrows, inside a function. `from_pretrained`, `fit`, `push_to_hub`, `predict`
# and `save_pretrained(with_onnx=True)` are where users look for them.
DOORS = {("nfzoo", "hub"), ("nfzoo", "train"), ("nn", "hub"), ("nn", "predict"), ("nn", "export")}

WITH_TRANSFORMERS = tuple(
    f"nfzoo.integrations.transformers{module}"
    for module in ("", ".configuration", ".image_processing", ".modeling", ".registration")
)
# External package -> the modules that may import it, inside a function. torch-xla pins torch; gradio, starlette and
# uvicorn bring web servers; the others are compilers and reference frameworks, which nobody needs to use the library.
# What stands APART runs in an environment of its own, or by hand, beside such a package. A package of `integrations`
# derives its classes from those of such a package, and so imports it at its head.
SEAMS = {
    "torch_xla": ("nfzoo.runtime.device", "nfzoo.export.stablehlo"),
    "torchax": ("nfzoo.export.tpu_worker",),
    "gradio": ("nfzoo.hub.space.app",),
    "jax": ("nfzoo.conversion.verify", "nfzoo.export.tpu_worker"),
    "openvino": ("nfzoo.export.onnx_program", "nfzoo.runtime.execution"),
    "litert_torch": ("nfzoo.export.edge",),
    "ai_edge_quantizer": ("nfzoo.export.edge",),
    "ai_edge_litert": ("nfzoo.export.edge", "nfzoo.export.runtimes"),
    "executorch": ("nfzoo.export.edge", "nfzoo.export.runtimes"),
    "starlette": ("nfzoo.serve.app", "nfzoo.serve.body", "tests.serve.test_body"),
    "uvicorn": ("nfzoo.serve.run",),
    "python_multipart": ("nfzoo.serve.body",),
    "prometheus_client": ("nfzoo.serve.metrics",),
    "haiku": ("nfzoo.conversion.verify",),
    "timm": ("nfzoo.conversion.verify", "nfzoo.integrations.timm", "benchmarks.peer"),
    "transformers": WITH_TRANSFORMERS,
    "tensorflow": ("nfzoo.conversion.verify",),
}
APART = ("tests.reference", "tests.xla", "tests.tpu", "tests.gpu", "tests.integrations")


class Module(NamedTuple):
    name: str
    source: str


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool  # inside a function, or for type checkers alone


def unit(name: str) -> str | None:
    """The unit of a module of the library: `nfzoo.models.nfnet` is of `models`, the facade is `nfzoo` itself."""
    top, _, rest = name.partition(".")
    return (rest.partition(".")[0] or "nfzoo") if top == "nfzoo" else None


def imports(module: Module, known: set[str]) -> Iterator[Import]:
    """All imports of a module by absolute name; `from package import name` is the submodule where there is one."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Import(names=names):
                    yield from (Import(alias.name, child.lineno, lazy) for alias in names)
                case ast.ImportFrom(module=base, names=names, level=level):
                    for alias in names:
                        inner = f"{base}.{alias.name}"
                        target = "." * level + (inner if inner in known else str(base))
                        yield Import(target, child.lineno, lazy)
                case ast.Call(
                    func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                    args=[ast.Constant(value=str(target)), *_],
                ):
                    yield Import(target, child.lineno, lazy)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and not child.orelse and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            yield from visit(child, lazy or inside)

    yield from visit(ast.parse(module.source, filename=module.name), lazy=False)


def objection(module: Module, found: Import) -> str | None:
    """What forbids an import, `None` if nothing does."""
    target, _, lazy = found
    top = target.partition(".")[0]
    if not top:
        return "is relative; write the absolute name"
    if top in ("hub", "conversion"):
        return f"is a second copy of the module; write nfzoo.{target}"
    if top in SEAMS and not any(module.name == name or module.name.startswith(f"{name}.") for name in APART):
        if module.name not in SEAMS[top]:
            return f"belongs in {' and '.join(SEAMS[top])} alone"
        return None if lazy or module.name in WITH_TRANSFORMERS else "has to stand inside a function"
    here, there = unit(module.name), unit(target)
    if here is None or there is None or here == there:  # tests and benchmarks may import all of the library
        return None
    if (here, there) in DOORS:
        return None if lazy else "has to stand inside a function"
    if here not in ARROWS:
        return f"comes from {here!r}, which has no row in ARCHITECTURE.md"
    own = target.removeprefix("nfzoo.")
    if there in ARROWS[here] or own in ARROWS[here]:
        return None
    return f"is no arrow of ARCHITECTURE.md: {here} -> {there}"


def violations(module: Module, known: set[str]) -> list[str]:
    found = ((item, objection(module, item)) for item in imports(module, known))
    return [f"{module.name}:{item.line}: import of {item.target} {why}" for item, why in found if why]


def read(folder: str, name: str) -> list[Module]:
    modules = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        dotted = ".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])
        modules.append(Module(dotted, path.read_text(encoding="utf-8")))
    return modules


MODULES = [module for folder, name in LIBRARY.items() for module in read(folder, name)]
KNOWN = {module.name for module in MODULES}


def test_the_table_has_every_unit_once_and_no_circle() -> None:
    assert set(ARROWS) == {unit(module.name) for module in MODULES}
    graphlib.TopologicalSorter({name: {t.partition(".")[0] for t in to} for name, to in ARROWS.items()}).prepare()
    assert len(_ROW.findall((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))) <= 16


def test_imports_run_along_the_arrows() -> None:
    modules = MODULES + [module for folder in OTHERS for module in read(folder, folder)]
    assert [line for module in modules for line in violations(module, KNOWN)] == []


def test_no_circle_at_import_time() -> None:
    graph = {module.name: {item.target for item in imports(module, KNOWN) if not item.lazy} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_packages_stay_small() -> None:
    """At most 14 modules directly in `nfzoo/`, and 10 in a package."""
    for folder in {path.parent for name in LIBRARY for path in (ROOT / name).rglob("*.py")}:
        modules = [path.name for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
        assert len(modules) <= (14 if folder == ROOT / "nfzoo" else 10), folder


@pytest.mark.parametrize(
    ("name", "source", "why"),
    [
        ("nfzoo.config", "from nfzoo.model import apply", "config -> model"),
        ("nfzoo.config", "from nfzoo import model", "config -> model"),
        ("nfzoo.config", "from . import model", "relative"),
        ("nfzoo.config", "def f():\n    import nfzoo.model", "config -> model"),
        ("nfzoo.models.nfnet", "from nfzoo.model import apply", "models -> model"),
        ("nfzoo.model", "import importlib\nimportlib.import_module('nfzoo.cli')", "model -> cli"),
        ("nfzoo.data.images", "import nfzoo", "data -> nfzoo"),
        ("nfzoo.hub.registry", "import nfzoo.cli", "hub -> cli"),
        ("nfzoo.optim.clipping", "from nfzoo.config import NFNet", "optim -> config"),
        ("nfzoo.runtime.device", "from nfzoo.checkpoint.run_state import Saved", "runtime -> checkpoint"),
        ("nfzoo.new.module", "import nfzoo.types", "no row"),
        ("nfzoo.train.run", "def f():\n    import nfzoo.hub.registry", "train -> hub"),
        ("nfzoo.conversion.convert", "def f():\n    import nfzoo.hub", "conversion -> hub"),
        ("nfzoo", "from nfzoo.hub import registry", "inside a function"),
        ("nfzoo.cli.main", "def f():\n    import hub", "second copy"),
        ("nfzoo.hub.space.app", "import gradio", "inside a function"),
        ("tests.hub.test_hub", "from conversion.verify import x", "second copy"),
        ("nfzoo.runtime.compile", "def f():\n    import torch_xla.core", "nfzoo.export.stablehlo alone"),
        ("nfzoo.runtime.device", "import torch_xla", "inside a function"),
        ("nfzoo.conversion.timm", "def f():\n    import timm", "alone"),
        ("benchmarks.run", "def f():\n    import jax.numpy as jnp", "alone"),
    ],
)
def test_forbidden_import_is_caught(name: str, source: str, why: str) -> None:
    (line,) = violations(Module(name, source), KNOWN)
    assert why in line


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("nfzoo.runtime.program", "from nfzoo.checkpoint.atomic import replaced"),
        ("nfzoo.nn", "def f():\n    from nfzoo.hub import push"),
        ("nfzoo.models.nfnet", "from nfzoo.models.layers import Layers"),
        ("tests.core.test_model", "import nfzoo.cli.main"),
    ],
)
def test_allowed_import_passes(name: str, source: str) -> None:
    assert violations(Module(name, source), KNOWN) == []
