"""The pages for users, README.md and docs/**/*.md: their code, their links, and what runs their commands."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(?:<!-- not run: (.*?) -->\n+)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = ("sh", "python")  # kinds of blocks
SET_UP = re.compile(r"make |source \.venv/")  # CI runs these


class Block(NamedTuple):
    """Code of a page."""

    page: str
    kind: str
    text: str
    exempt: str  # why it is not run, or nothing

    @property
    def commands(self) -> list[str]:
        """Return the commands of shell code, but for the set-up."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        lines = [re.split(r"(?:^|\s)#\s", line)[0].strip() for line in lines]
        return [line for line in lines if line and not SET_UP.match(line)]


def pages() -> list[str]:
    """Return README.md and the pages of the site, from the repository's root on."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str) -> list[Block]:
    """Return the code of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, kind, code, exempt) for exempt, kind, code in FENCE.findall(text)]


def run_blocks(page: str) -> list[Block]:
    """Return the code of a page that has to run."""
    return [block for block in blocks(page) if block.kind in RUN and not block.exempt]


def without_code(text: str) -> str:
    """Return a page without its code."""
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", text))


def links(page: str) -> Iterator[tuple[str, str]]:
    """Yield path and anchor of a page's links within the repository, the path from the root on."""
    for target in LINK.findall(without_code((ROOT / page).read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if not re.match("[a-z]+:", path):
            yield ((ROOT / page).parent / path).resolve().relative_to(ROOT).as_posix() if path else page, anchor


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def photographs(folder: Path) -> Path:
    """Write a photograph and two classes of photographs."""
    from sklearn.datasets import load_sample_image  # takes seconds

    Image.fromarray(load_sample_image("china.jpg")).save(folder / "photo.jpg")
    for name in ("china", "flower"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            picture = Image.fromarray(load_sample_image(f"{name}.jpg")).crop((20 * i, 0, 20 * i + 400, 400))
            picture.save(folder / "photos" / name / f"{i}.jpg")
    return folder


def small(command: str) -> tuple[str, list[str]]:
    """Return module and arguments that do what a command does, in one process, with the smallest model and work.

    The module is `nfzoo` for its commands.
    """
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch("[A-Z_]+=.*", word)]
    if words[0] in ("accelerate", "torchrun", "python"):
        at = words.index("-m") + 1
        module, words = words[at], words[at + 1 :]
        if module == "nfzoo.dp":
            return module, [*words, "--steps", "1", "--batch", "16"]
        words = [{"nfzoo.tuner": "find-lr"}.get(module, module.removeprefix("nfzoo.")), *words]
    else:
        assert words.pop(0) == "nfzoo", command
    if words[0] == "find-lr":
        words += ["--steps", "10"]
    if words[0] in ("train", "find-lr"):
        words += ["--epochs", "2" if "--resume" in words else "1"]
        if any(word.endswith("-finetune") or word == "head" for word in words):
            words += ["--model", "nfnet-test", "--pretrained", "null", "--train-size", "32", "--test-size", "32"]
        elif "digits" in words:  # fewer and smaller ones
            words += ["--validation-fraction", "0.8", "--train-size", "16", "--test-size", "16"]
    if words[:3] == ["convert", "--to", "timm"]:
        words[3] = "timm-model"  # timm has nothing as small as the model of the others
    return "nfzoo", [*words, "--size", "32"] if words[:2] == ["plot", "signal"] else words


def new_folder(folder: Path, shared: Path, page: str = "") -> Path:
    """Make the folder that the code of a page runs in: a copy of what is in `shared`.

    README.md trains the model that other pages find in `runs`.
    """
    folder.mkdir()
    for path in shared.iterdir():
        if path.name == "runs" and page == "README.md":
            continue
        if path.name == "home":  # what came from the Hub
            (folder / path.name).symlink_to(path)
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy(path, folder / path.name)
    return folder
