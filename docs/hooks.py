"""Hooks of mkdocs: the same pages can be read in the repository and on the site.

Files of the repository that a page links to become files of the site, in its folder `repository`. Notebooks become
pages. Entries of the navigation with a wildcard stand for the pages there are. Formulas become MathML, which browsers
draw without a script.
"""

from __future__ import annotations

import fnmatch
import html
import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"(^ *(```+|~~~+).*?^ *\2`*$|``.*?``|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
FOREIGN = re.compile(r'<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')
logger = logging.getLogger("mkdocs.hooks.nfzoo")


# ---------------------------------------------------------------- links


def without_code(text: str, change: Callable[[str], str]) -> str:
    """Return a page with `change` applied to all but code."""
    parts = CODE.split(text)
    return "".join(
        change(part) if i % 3 == 0 else part if i % 3 == 1 else ""  # the third is the fence within the second
        for i, part in enumerate(parts)
    )


def links(text: str) -> list[str]:
    """Return the targets of a page's links, without those in code."""
    found: list[str] = []
    without_code(text, lambda part: found.extend(LINK.findall(part)) or part)
    return found


def destination(page: str, target: str) -> tuple[str, str] | None:
    """Return the file that a link leads to, from the repository's root on, and its anchor; `None` for another site.

    A folder is its README.md, or its `listing` where it has none.
    """
    path, _, anchor = target.partition("#")
    if re.match(r"[a-z]+:", path):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if (ROOT / found).is_dir():
        found = posixpath.join(found, "README.md")
    return found, anchor


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site; a notebook is a page."""
    path = re.sub(r"\.ipynb$", ".md", path)
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def of_repository(page: str) -> str:
    """Return the file of the repository that a page of the site is made of."""
    path = page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"
    notebook = re.sub(r"\.md$", ".ipynb", path)
    return notebook if (ROOT / notebook).is_file() else path


def relinked(text: str, page: str) -> str:
    """Return a page of the repository with its links as they are on the site."""

    def change(match: re.Match[str]) -> str:
        found = destination(page, match[0])
        if found is None:
            return match[0]
        path, anchor = found
        if not exists(path):
            logger.warning("%s links to %s, which does not exist", page, path)
        where = posixpath.relpath(site_path(path), posixpath.dirname(site_path(page)) or ".")
        return where + (f"#{anchor}" if anchor else "")

    return without_code(text, lambda part: LINK.sub(change, part))


def listing(folder: str) -> str:
    """Return a page that lists the files of a folder."""
    found = sorted(path for path in (ROOT / folder).iterdir() if path.suffix in (".md", ".yaml", ".jsonl", ".json"))
    return f"# {folder}\n\n" + "".join(f"- [{path.name}]({path.name})\n" for path in found)


def text_of(page: str) -> str:
    """Return the text of a page, which for a folder's README.md that is none is the folder's listing."""
    path = ROOT / page
    if path.suffix == ".ipynb":
        return notebook_page(path)
    if path.name == "README.md" and not path.exists():
        return listing(posixpath.dirname(page))
    return path.read_text(encoding="utf-8")


def exists(path: str) -> bool:
    """Return whether the site has a file: one of the repository, or a listing."""
    return (ROOT / path).is_file() or (path.endswith("/README.md") and (ROOT / path).parent.is_dir())


def linked_files(pages: Iterable[str]) -> Iterator[str]:
    """Yield the files outside docs/ that pages link to, and those that these link to."""
    ready, waiting = set(), list(pages)
    while waiting:
        page = waiting.pop()
        if page in ready:
            continue
        ready.add(page)
        if not page.startswith("docs/"):
            yield page
        if page.endswith((".md", ".ipynb")):
            found = (destination(page, target) for target in links(text_of(page)))
            waiting += [path for path, _ in filter(None, found) if exists(path)]


# ---------------------------------------------------------------- notebooks


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its text, its code, and what the code printed and showed when it was stored."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                parts.append(f"![What the code above shows](data:image/png;base64,{data['image/png'].strip()})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    parts.append(f'<a href="{path.name}" download>Download this notebook</a>')
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- navigation


def named(nav: Any) -> set[str]:
    """Return the entries of a navigation."""
    if isinstance(nav, str):
        return {nav}
    return set().union(*map(named, nav.values() if isinstance(nav, dict) else nav))


def expanded(nav: Any, pages: list[str]) -> list[Any]:
    """Return a navigation in which each entry with a wildcard is the pages that match it and stand nowhere else."""
    taken = named(nav)

    def entries(nav: list[Any]) -> Iterator[Any]:
        for entry in nav:
            if isinstance(entry, dict):
                ((title, below),) = entry.items()
                inner = below if isinstance(below, str) else list(entries(below))
                if inner:
                    yield {title: inner}
            elif "*" in entry:
                found = [page for page in pages if fnmatch.fnmatchcase(page, entry) and page not in taken]
                taken.update(found)
                yield from found
            else:
                yield entry

    return list(entries(nav))


# ---------------------------------------------------------------- what mkdocs calls


def on_config(config: Any) -> Any:
    """Put the pages there are in the place of wildcards."""
    docs = Path(config.docs_dir)
    paths = [path.relative_to(docs) for suffix in ("md", "ipynb") for path in docs.rglob(f"*.{suffix}")]
    found = sorted(path.with_suffix(".md").as_posix() for path in paths)
    config.nav = expanded(config.nav, found)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of notebooks, and what pages link to outside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for path in sorted(Path(config.docs_dir).rglob("*.ipynb")):
        page = site_path(path.relative_to(ROOT).as_posix())
        files.append(File.generated(config, page, content=notebook_page(path)))

    for path in sorted(linked_files([of_repository(file.src_uri) for file in files.documentation_pages()])):
        if (ROOT / path).exists():
            file = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
        else:
            file = File.generated(config, site_path(path), content=text_of(path))
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the files of the site."""
    return relinked(markdown, of_repository(page.file.src_uri))


def on_page_content(content: str, **_: Any) -> str:
    """Draw formulas."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match[str]) -> str:
        formula = html.unescape(match[2]).strip()[2:-2]  # without \( \) or \[ \]
        return convert(formula, display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(drawn, content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn of what a browser would fetch from elsewhere."""
    for found in FOREIGN.findall(output):
        logger.warning("%s needs a network: %s", page.file.src_uri, found)
    return output
