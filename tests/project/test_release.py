"""The files that make a release agree with each other and with the sources; the workflows call what exists."""

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def workflow(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["on"] = content.pop(True)  # YAML 1.1 reads the word as true
    return content


def steps() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield workflow and job, the job, and each of its steps."""
    for path in WORKFLOWS:
        for name, job in workflow(path)["jobs"].items():
            for step in job["steps"]:
                yield f"{path.name}, {name}", job, step


def combinations(matrix: dict[str, Any]) -> list[dict[str, str]]:
    keys = [key for key in matrix if key not in ("exclude", "include")]
    rows = [dict(zip(keys, row, strict=True)) for row in itertools.product(*(matrix[key] for key in keys))]
    return [row for row in rows if row not in matrix.get("exclude", [])]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


# -- the workflows


def test_every_step_calls_what_exists() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]
    called: set[str] = set()
    for where, job, step in steps():
        assert job["timeout-minutes"] <= 360, where
        assert ("uses" in step) != ("run" in step), where
        run = step.get("run", "")
        for target in re.findall(r"\bmake ([^\n]*)", run):
            for word in target.split("#")[0].split():
                if '"test-$SUITE"' in word:
                    called |= {f"test-{suite}" for suite in job["strategy"]["matrix"]["suite"]}
                elif "=" not in word:
                    called.add(word)
        for script in re.findall(r"\.ci/[\w.]+", run):
            assert (ROOT / script).is_file(), f"{where}: {script}"
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@([0-9a-f]{40}|v\d+|release/v1)", step["uses"]), where
        if str(step.get("uses")).startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False, where
    later = set() if (ROOT / "mkdocs.yml").is_file() else {"docs"}  # the target comes with the site
    assert called <= targets() | later, f"no such target: {called - targets()}"
    suites = {target for target in targets() if target.startswith("test")}
    assert suites | {"lint", "demo", "docs"} <= called


def test_the_matrix_is_what_the_project_supports() -> None:
    job = workflow(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]
    rows = combinations(job["strategy"]["matrix"])
    pythons = sorted({tuple(map(int, row["python"].split("."))) for row in rows})
    (oldest,) = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert pythons == [(3, minor) for minor in range(int(oldest), pythons[-1][1] + 1)]
    listed = [c.removeprefix("Programming Language :: Python :: ") for c in PROJECT["classifiers"]]
    assert [f"3.{minor}" for _, minor in pythons] == [v for v in listed if re.fullmatch(r"3\.\d+", v)]
    (least,) = (d.removeprefix("torch>=") for d in PROJECT["dependencies"] if d.startswith("torch>="))
    torches = {row["torch"] for row in rows}
    assert {least, "newest"} <= torches
    for python in (pythons[0], pythons[-1]):  # with each torch
        assert {row["torch"] for row in rows if row["python"] == f"3.{python[1]}"} == torches
    assert all("newest" in {row["torch"] for row in rows if row["python"] == f"3.{minor}"} for _, minor in pythons)


def test_little_is_allowed_to_the_workflows() -> None:
    for path in WORKFLOWS:
        content = workflow(path)
        assert content["permissions"] == {"contents": "read"}, path
        assert "pull_request_target" not in content["on"], path
        for name, job in content["jobs"].items():
            writes = {key for key, value in job.get("permissions", {}).items() if value == "write"}
            assert writes == {"publish": {"id-token", "attestations"}, "announce": {"contents"}}.get(name, set())
    for where, _, step in steps():  # what others choose, such as the name of a branch, is no program
        assert "${{" not in step.get("run", ""), where


# -- version, citation, notes


def load_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_release", ROOT / ".ci" / "check_release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECK = load_check()


def test_the_citation_is_of_this_version() -> None:
    assert CITATION["version"] == PROJECT["version"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["cff-version"] == "1.2.0"
    assert {ref["url"] for ref in CITATION["references"]} <= set(PROJECT["urls"].values())
    found = CHECK.section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), PROJECT["version"])
    assert found is not None, "CHANGELOG.md has no section of this version"
    assert found[0] == CITATION["date-released"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    before, _, after = text.partition("## [Unreleased]\n")
    changelog.write_text(f"{before}## [Unreleased]\n\n{after[after.index('## [') :]}", encoding="utf-8")
    return tmp_path


def test_what_does_not_agree_is_no_release(tree: Path) -> None:
    tag = f"v{PROJECT['version']}"
    assert CHECK.problems(tree, tag, None) == []
    assert len(CHECK.problems(tree, "v9.9.9", None)) == 1
    address = "https://github.com/OWNER/nfzoo"
    assert f"needs Repository = '{address}'" in CHECK.problems(tree, tag, address)[0]
    for name, old, new, words in (
        ("CITATION.cff", f"version: {PROJECT['version']}", "version: 0.0.1", "CITATION.cff needs version"),
        ("CITATION.cff", "date-released", "date-lost", "CITATION.cff needs date-released"),
        ("CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- Something.\n", "an empty section"),
        ("CHANGELOG.md", f"## [{PROJECT['version']}] - ", f"## [{PROJECT['version']}] of ", "needs the heading"),
    ):
        kept = (tree / name).read_text(encoding="utf-8")
        assert old in kept, old
        (tree / name).write_text(kept.replace(old, new), encoding="utf-8")
        assert any(words in problem for problem in CHECK.problems(tree, tag, None)), words
        (tree / name).write_text(kept, encoding="utf-8")


def test_the_notes_are_the_section_of_the_version() -> None:
    command = [sys.executable, ROOT / ".ci" / "check_release.py", f"v{PROJECT['version']}", "--notes"]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "\n### Added\n" in notes
    assert "## [" not in notes


def test_what_an_assistant_is_told_is_there() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for path in re.findall(r"`((?:nfzoo|tests|docs|hub|conversion|recipes|benchmarks|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for words in re.findall(r"`make ([^`]*)`", text):
        assert set(words.split()) <= targets(), words


def test_no_address_of_an_index_stands_anywhere() -> None:
    """Who installs chooses where packages come from."""
    hosts = ("pypi" + ".org", "python" + "hosted", "registry." + "npmjs", "download." + "pytorch")
    folders = ("nfzoo", "hub", "conversion", "recipes", "tests", "benchmarks", "docs", ".github", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    for path in filter(Path.is_file, [*files, *ROOT.iterdir()]):
        content = path.read_bytes()
        assert not [host for host in hosts if host.encode() in content], path
