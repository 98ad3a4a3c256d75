"""The wheel and the sdist hold what they should, and the wheel works outside the repository.

Everything is built from a copy and installed into a fresh environment, with neither network nor isolation: the build
backend and the dependencies are those of the environment that runs the tests.
"""

import fnmatch
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_DIRS = {
    "nfzoo": "nfzoo",
    "hub": "nfzoo/hub",
    "conversion": "nfzoo/conversion",
    "recipes": "nfzoo/recipes",
}  # in the tree -> in the wheel
COPIED = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tests", "benchmarks", *PACKAGE_DIRS)


def sources() -> list[Path]:
    """Every file that has to be shipped, relative to the root."""
    python = (path for folder in PACKAGE_DIRS for path in (ROOT / folder).rglob("*.py"))
    assets = [path for path in (ROOT / "nfzoo/assets").glob("*") if path.is_file()]
    assets += (ROOT / "recipes").glob("*.yaml")
    assets += (ROOT / "nfzoo/drill").glob("*.c")
    assets += [ROOT / "hub/pins.json", ROOT / "hub/space/README.md", ROOT / "hub/space/requirements.txt"]
    found = [ROOT / "nfzoo/py.typed", *python, *assets]
    return sorted(path.relative_to(ROOT) for path in found)


def in_wheel(path: Path) -> str:
    folder, *rest = path.parts
    return "/".join([PACKAGE_DIRS[folder], *rest])


def outside_environment() -> dict[str, str]:
    """The environment without what would lead a child interpreter back into the repository."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=outside_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_packages_of_the_wheel_are_the_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {in_wheel(path.parent) for path in sources() if path.suffix == ".py"}
    assert {name.replace(".", "/") for name in project["packages"]} == {folder.rstrip("/") for folder in folders}
    for package, folder in project["package-dir"].items():
        assert PACKAGE_DIRS[folder] == package.replace(".", "/")
    patterns = [f"{package.replace('.', '/')}/{p}" for package, ps in project["package-data"].items() for p in ps]
    for path in sources():
        if path.suffix != ".py":
            assert any(fnmatch.fnmatch(in_wheel(path), pattern) for pattern in patterns), path


# ---------------------------------------------------------------- built and installed


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sdist, and one wheel built from that sdist."""
    tree = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree)
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; for all else it falls back to the packages of the test environment."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    (wheel,) = dist.glob("*.whl")
    python = environment / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=environment)
    # A folder named in a .pth file comes after the environment's own, and .pth files inside it are not read: the
    # import hook of an editable nfzoo stays out.
    (packages,) = environment.glob("lib/python*/site-packages")
    fallback = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "test_environment.pth").write_text("\n".join(sorted(fallback)) + "\n")
    return environment


@pytest.mark.slow
def test_wheel_holds_exactly_the_library(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"nfzoo", info}
    assert f"{info}/licenses/LICENSE" in names
    library = {name for name in names if not name.startswith(info)}
    assert library == {in_wheel(path) for path in sources()}, "compare `packages` and `package-data` in pyproject.toml"


@pytest.mark.slow
def test_sdist_holds_every_source(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.as_posix() for path in sources()} | {"LICENSE", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nfzoo", "nfzoo.hub", "nfzoo.conversion"])
def test_wheel_imports_outside_the_repository(installed: Path, name: str) -> None:
    program = f"import importlib; print(importlib.import_module({name!r}).__file__)"
    file = Path(run(installed / "bin/python", "-W", "error", "-c", program, cwd=installed).strip())
    assert file.is_relative_to(installed), f"{name} was imported from {file}, not from the installed wheel"


@pytest.mark.slow
def test_version_is_that_of_the_wheel(installed: Path, dist: Path) -> None:
    version = run(installed / "bin/python", "-c", "import nfzoo; print(nfzoo.__version__)", cwd=installed).strip()
    assert [path.name.split("-")[1] for path in dist.glob("*.whl")] == [version]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_command_runs(installed: Path, arguments: list[str]) -> None:
    assert run(installed / "bin/nfzoo", *arguments, cwd=installed).strip()
