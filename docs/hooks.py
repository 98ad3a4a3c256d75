"""Hooks of mkdocs: the same pages can be read in the repository and on the site.

Files of the repository that a page links to become files of the site, in its folder `repository`. Entries of the
navigation with a wildcard stand for the pages there are. Formulas become MathML, which browsers draw without a script.
Notebooks become pages with the outputs that they hold.
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

    A folder is its README.md, or its `listing` where it has none. A notebook is its page.
    """
    path, _, anchor = target.partition("#")
    if re.match(r"[a-z]+:", path):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if (ROOT / found).is_dir():
        found = posixpath.join(found, "README.md")
    found = re.sub(r"\.ipynb$", ".md", found)
    return found, anchor


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def of_repository(page: str) -> str:
    """Return the file of the repository that a page of the site is made of."""
    return page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"


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


def from_notebook(path: Path) -> str:
    """Return a notebook as a page, with its outputs."""
    parts = [f'<a href="{path.name}" download>This page is a notebook: download it.</a>']
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```py\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            else:
                parts.append(f"```text\n{''.join(data.get('text/plain', '')).rstrip()}\n```")
    return "\n\n".join([*parts[1:2], parts[0], *parts[2:]])  # the title first


def made(page: str) -> str | None:
    """Return a page that is made of something else: of a notebook, or of a folder without README.md."""
    path = ROOT / page
    if path.exists():
        return None
    if path.with_suffix(".ipynb").exists():
        return from_notebook(path.with_suffix(".ipynb"))
    return listing(posixpath.dirname(page)) if path.name == "README.md" and path.parent.is_dir() else None


def exists(path: str) -> bool:
    """Return whether the site has a file: one of the repository, or a page that is made."""
    return (ROOT / path).is_file() or made(path) is not None


def linked_files(pages: Iterable[str]) -> Iterator[str]:
    """Yield the files outside docs/ that pages link to, and those that these link to."""
    ready, waiting = set(), list(pages)
    while waiting:
        page = waiting.pop()
        if page in ready:
            continue
        ready.add(page)
        if not page.startswith("docs/") or not (ROOT / page).exists():
            yield page
        if page.endswith(".md"):
            found = (
                destination(page, target) for target in links(made(page) or (ROOT / page).read_text(encoding="utf-8"))
            )
            waiting += [path for path, _ in filter(None, found) if exists(path)]


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


def own_pages() -> list[str]:
    """Return the pages of docs/, from there on, with those of notebooks."""
    docs = ROOT / "docs"
    found = [path for suffix in ("md", "ipynb") for path in docs.rglob(f"*.{suffix}")]
    return sorted(path.relative_to(docs).with_suffix(".md").as_posix() for path in found)


# ---------------------------------------------------------------- what mkdocs calls


def on_config(config: Any) -> Any:
    """Put the pages there are in the place of wildcards."""
    config.nav = expanded(config.nav, own_pages())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add notebooks as pages, and what pages link to outside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    own = [of_repository(page) for page in own_pages()]
    for path in sorted({*linked_files(own), *(page for page in own if made(page))}):
        content = made(path)
        if content is None:
            file = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
        else:
            file = File.generated(config, site_path(path), content=content)
        file.inclusion = InclusionLevel.INCLUDED if path in own else InclusionLevel.NOT_IN_NAV
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
