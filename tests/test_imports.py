"""Imports point down the layers only. The sources are parsed, not run, so an import inside a function counts too."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"nfzoo": "nfzoo", "hub": "nfzoo.hub", "conversion": "nfzoo.conversion"}  # folder -> import name
OTHERS = ("tests", "benchmarks")

# From the bottom to the top. A module imports from its own layer or a lower one. "nfzoo" is the facade, __init__.py;
# a package stands for all of its modules.
LAYERS = (
    (
        "nfzoo.types",
        "nfzoo.errors",
        "nfzoo.files",
        "nfzoo.standardize",
        "nfzoo.functional",
        "nfzoo.config",
        "nfzoo.variants",
        "nfzoo.labels",
        "nfzoo.device",
        "nfzoo.randaugment",
        "nfzoo.boxes",
        "nfzoo.resize",
        "nfzoo.tar",
        "nfzoo.patterns",
        "nfzoo.partfiles",
        "nfzoo.state",
    ),
    ("nfzoo.onednn",),
    ("nfzoo.models",),
    ("nfzoo.model", "nfzoo.preprocess"),
    ("nfzoo.agc", "nfzoo.optim", "nfzoo.sam", "nfzoo.augment"),
    ("nfzoo.step", "nfzoo.fold", "nfzoo.signal", "nfzoo.checkpoint", "nfzoo.sources", "nfzoo.compile", "nfzoo.fused"),
    ("nfzoo.module", "nfzoo.adapter", "nfzoo.parallel", "nfzoo.shards", "nfzoo.tables", "nfzoo.tpu_worker"),
    ("nfzoo.splits", "nfzoo.quantize", "nfzoo.stablehlo"),
    ("nfzoo.data", "nfzoo.plots", "nfzoo.unlabelled"),
    ("nfzoo.recipe", "nfzoo.command"),
    ("nfzoo.optimizers", "nfzoo.diagnosis", "nfzoo.meters", "nfzoo.broken", "nfzoo.inputs", "nfzoo.runfiles"),
    ("nfzoo.trainee",),
    ("nfzoo", "nfzoo.hub", "nfzoo.conversion"),
    (
        "nfzoo.loop",
        "nfzoo.train",
        "nfzoo.evaluate",
        "nfzoo.predict",
        "nfzoo.bulk",
        "nfzoo.outputs",
        "nfzoo.export",
        "nfzoo.plot",
        "nfzoo.dp",
        "nfzoo.tpu_check",
        "nfzoo.tpu_process",
    ),
    ("nfzoo.hub.space",),
    ("nfzoo.cli", "nfzoo.demo"),
    ("nfzoo.__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PACKAGES = ("nfzoo.models", "nfzoo.hub.space", "nfzoo.hub", "nfzoo.conversion")  # an inner one before its outer one

# Narrower than the layer: the optimizer knows parameters as dicts, not models.
ONLY = {"nfzoo.agc": {"nfzoo.types"}, "nfzoo.optim": {"nfzoo.types"}, "nfzoo.sam": {"nfzoo.types"}}

# The outer packages are met inside a function, and only where users expect a door to them: the facade, the command
# line, and the model class, whose from_pretrained and push_to_hub are those of every library of the Hub.
OUTER = ("nfzoo.hub", "nfzoo.hub.space", "nfzoo.conversion")
MAY_REACH_OUTER = ("nfzoo", "nfzoo.cli", "nfzoo.module")

# External package -> the modules that may import it, inside a function. torch-xla pins torch, gradio brings a web
# server; the others are compilers and reference frameworks, which nobody needs to use the library. What stands APART
# runs in an environment of its own, or by hand, beside such a package.
SEAMS = {
    "torch_xla": ("nfzoo.device", "nfzoo.stablehlo"),
    "torchax": ("nfzoo.tpu_worker",),
    "gradio": ("nfzoo.hub.space.app",),
    "jax": ("nfzoo.conversion.verify", "nfzoo.tpu_worker"),
    "haiku": ("nfzoo.conversion.verify",),
    "timm": ("nfzoo.conversion.verify", "benchmarks.peer"),
    "tensorflow": ("nfzoo.conversion.verify",),
}
APART = ("tests.reference", "tests.xla", "tests.tpu", "tests.gpu", "benchmarks.xla_scan")


class Module(NamedTuple):
    name: str
    source: str
    is_package: bool = False


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool  # inside a function


def entry(name: str) -> str | None:
    """The name under which a module stands in LAYERS, None if it does not."""
    if name in RANK:
        return name
    return next((package for package in PACKAGES if name.startswith(package + ".")), None)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(module: Module, known: set[str]) -> Iterator[Import]:
    """All imports of a module by absolute name; `from package import name` is the submodule where there is one."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Import(names=names):
                    yield from (Import(alias.name, child.lineno, lazy) for alias in names)
                case ast.ImportFrom(module=base, names=names, level=level):
                    if level:
                        parts = module.name.split(".")
                        parts = parts[: len(parts) + module.is_package - level]
                        base = ".".join([*parts, base] if base else parts)
                    for alias in names:
                        inner = f"{base}.{alias.name}"
                        yield Import(inner if inner in known else str(base), child.lineno, lazy)
                case ast.Call(
                    func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                    args=[ast.Constant(value=str(target)), *_],
                ):
                    yield Import(target, child.lineno, lazy)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, lazy or inside)

    yield from visit(ast.parse(module.source, filename=module.name), lazy=False)


def objection(module: Module, found: Import) -> str | None:
    """Why this import is not allowed, None if it is."""
    target, _, lazy = found
    top = target.partition(".")[0]
    if top in ("hub", "conversion"):
        return f"is a second copy of the module; write nfzoo.{target}"
    if top in SEAMS and not within(module.name, APART):
        if module.name not in SEAMS[top]:
            return f"belongs in {' and '.join(SEAMS[top])} alone"
        return None if lazy else "has to stand inside a function"
    here = entry(module.name)
    if top != "nfzoo" or here is None:  # tests and benchmarks may import all of the library
        return None
    there = entry(target)
    if there is None:
        return "is not in LAYERS; add it"
    if there in OUTER and not within(module.name, OUTER):
        if here not in MAY_REACH_OUTER:
            return f"is for {' and '.join(MAY_REACH_OUTER)} alone"
        return None if lazy else "has to stand inside a function"
    if here in ONLY and there not in ONLY[here]:
        return f"is not among {sorted(ONLY[here])}"
    return None if RANK[there] <= RANK[here] else "points up"


def violations(module: Module, known: set[str]) -> list[str]:
    found = ((item, objection(module, item)) for item in imports(module, known))
    return [f"{module.name}:{item.line}: import of {item.target} {why}" for item, why in found if why]


def read(folder: str, name: str) -> list[Module]:
    modules = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        dotted = ".".join([name, *(parts[:-1] if is_package else parts)])
        modules.append(Module(dotted, path.read_text(encoding="utf-8"), is_package))
    return modules


MODULES = [module for folder, name in LIBRARY.items() for module in read(folder, name)]
KNOWN = {module.name for module in MODULES} | {"nfzoo", *OUTER}


def test_every_module_has_a_layer() -> None:
    missing = [module.name for module in MODULES if entry(module.name) is None]
    assert not missing, f"add {missing} to LAYERS in {Path(__file__).name}, at the place ARCHITECTURE.md gives them"


def test_imports_point_down() -> None:
    modules = MODULES + [module for folder in OTHERS for module in read(folder, folder)]
    assert [line for module in modules for line in violations(module, KNOWN)] == []


def test_no_cycle_at_import_time() -> None:
    graph = {module.name: {item.target for item in imports(module, KNOWN) if not item.lazy} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize(
    ("name", "source", "why"),
    [
        ("nfzoo.config", "from nfzoo.model import apply", "points up"),
        ("nfzoo.config", "from nfzoo import model", "points up"),
        ("nfzoo.config", "from . import model", "points up"),
        ("nfzoo.config", "def f():\n    import nfzoo.model", "points up"),
        ("nfzoo.models.nfnet", "from ..model import apply", "points up"),
        ("nfzoo.model", "import importlib\nimportlib.import_module('nfzoo.cli')", "points up"),
        ("nfzoo.data", "import nfzoo", "points up"),
        ("nfzoo.hub.table", "import nfzoo.cli", "points up"),
        ("nfzoo.agc", "from nfzoo.config import NFNet", "is not among"),
        ("nfzoo.agc", "import nfzoo.typo", "is not in LAYERS"),
        ("nfzoo.train", "def f():\n    import nfzoo.hub.table", "is for nfzoo and nfzoo.cli and nfzoo.module alone"),
        ("nfzoo", "from nfzoo.hub import table", "inside a function"),
        ("nfzoo.cli", "class A:\n    import nfzoo.conversion", "inside a function"),
        ("nfzoo.cli", "def f():\n    import hub", "second copy"),
        ("nfzoo.hub.load", "def f():\n    from nfzoo.hub.space import app", "points up"),
        (
            "nfzoo.predict",
            "def f():\n    import nfzoo.hub.space.app",
            "is for nfzoo and nfzoo.cli and nfzoo.module alone",
        ),
        ("nfzoo.hub.space.app", "import gradio", "inside a function"),
        ("tests.test_hub", "from conversion.verify import x", "second copy"),
        ("nfzoo.compile", "def f():\n    import torch_xla.core", "nfzoo.device and nfzoo.stablehlo alone"),
        ("nfzoo.device", "import torch_xla", "inside a function"),
        ("nfzoo.conversion.timm", "def f():\n    import timm", "alone"),
        ("benchmarks.run", "def f():\n    import jax.numpy as jnp", "alone"),
    ],
)
def test_forbidden_import_is_caught(name: str, source: str, why: str) -> None:
    (line,) = violations(Module(name, source), KNOWN | {"nfzoo.model"})
    assert why in line


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("nfzoo.models.nfnet", "from nfzoo.config import NFNet\nfrom nfzoo.models.blocks import block\nimport torch"),
        ("nfzoo.agc", "from nfzoo.types import Params"),
        ("nfzoo.train", "from nfzoo import model\nfrom nfzoo.evaluate import evaluate"),
        ("nfzoo", "def from_pretrained():\n    from nfzoo.hub import table"),
        ("nfzoo.cli", "def f():\n    import nfzoo.conversion.verify"),
        ("nfzoo.module", "def f():\n    from nfzoo.hub import push"),
        ("nfzoo.hub.space.app", "from nfzoo.predict import classify\nfrom nfzoo.hub.table import PUBLIC"),
        ("nfzoo.hub.table", "import nfzoo\nfrom nfzoo.module import Shell\nfrom nfzoo.conversion import timm"),
        ("nfzoo.device", "def f():\n    import torch_xla"),
        ("nfzoo.conversion.verify", "def f():\n    import jax, haiku, timm"),
        ("tests.test_hub", "import nfzoo.hub.table\nimport nfzoo.cli"),
        ("tests.reference.make_golden", "import timm"),
    ],
)
def test_allowed_import_is_let_through(name: str, source: str) -> None:
    assert violations(Module(name, source), KNOWN | {"nfzoo.model"}) == []


def test_a_cycle_is_caught() -> None:
    pair = [Module("nfzoo.module", "import nfzoo.adapter"), Module("nfzoo.adapter", "import nfzoo.module")]
    graph = {module.name: {item.target for item in imports(module, KNOWN)} for module in pair}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
