"""Check that the files of this tree agree on a release, or print its notes: `check_release.py v0.2.0 [--notes]`."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def section(changelog: str, title: str) -> tuple[str, str] | None:
    """Return the date and the text of a version's section of CHANGELOG.md, `None` if there is none."""
    found = re.search(
        rf"^## \[{re.escape(title)}\](?: - (\S+))?\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    return found and (found[1] or "", found[2].strip())


def problems(root: Path, tag: str, repository: str | None) -> list[str]:
    """Return what keeps a tag from being released, in sentences."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    version, found = project["version"], []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, but pyproject.toml has version {version}")
    date, text = section(changelog, version) or ("", "")
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        found.append(f"CHANGELOG.md needs the heading '## [{version}] - YYYY-MM-DD'")
    if not text:
        found.append(f"CHANGELOG.md says nothing about {version}")
    unreleased = section(changelog, "Unreleased")
    if unreleased is None or re.search("^- ", unreleased[1], re.MULTILINE):
        found.append("CHANGELOG.md needs an empty section [Unreleased]; move what it lists to the version")
    for key, value in (("version", version), ("date-released", date)):
        if not re.search(rf'^{key}: "?{re.escape(value)}"?$', citation, re.MULTILINE):
            found.append(f"CITATION.cff needs {key}: {value}")
    known = project.get("urls", {}).get("Repository")
    if repository is not None and known != repository:
        found.append(f"pyproject.toml needs Repository = {repository!r} under [project.urls], not {known!r}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 if all agree, 1 with a line for each problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag")
    parser.add_argument("--repository", help="the address that [project.urls] must have")
    parser.add_argument("--notes", action="store_true", help="print the version's section of CHANGELOG.md")
    options = parser.parse_args(argv)
    if options.notes:
        found = section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), options.tag.removeprefix("v"))
        print(found[1] if found else "")
        return 0
    wrong = problems(ROOT, options.tag, options.repository)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
