"""Publish a Space that shows models of the Hub: a page on which they label pictures.

The Space runs the very nfzoo that deploys it. The package's source files go with it, and its requirements are those of
the package, all of which PyPI has. A record, `nfzoo-space.json`, holds the models and marks the Space as one of these.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard

from nfzoo import __version__
from nfzoo.errors import ConfigError, HubError
from nfzoo.files import read_text
from nfzoo.hub.publish import CARD_FILE, check_name, refusals
from nfzoo.hub.registry import HUB, repository_of

RECORD_FILE = "nfzoo-space.json"
SOURCES = "nfzoo/"
MOST_TITLE = 60

_HERE = Path(__file__).parent
_PACKAGES = ("nfzoo", "nfzoo.hub", "nfzoo.conversion", "nfzoo.recipes")  # these lie apart in a clone
_SUFFIXES = (".py", ".json", ".yaml", ".txt", ".npz", ".md", ".c")
_OWN = (".gitattributes", CARD_FILE)  # what a new Space of the Hub holds

_APP = '''\
"""Run the Space; `nfzoo space deploy` wrote it, and nfzoo-space.json holds its models."""

from pathlib import Path

from nfzoo.files import read_json
from nfzoo.hub.space.app import main

main(read_json(Path(__file__).with_name("nfzoo-space.json"))["models"])
'''


class SpaceFiles(NamedTuple):
    """The files of a Space: path -> path on disk or content; and its models, as its record names them."""

    files: dict[str, Path | bytes]
    models: list[str]

    def sizes(self) -> dict[str, int]:
        """Return file name -> bytes, the sources of nfzoo as one."""
        sizes: dict[str, int] = {}
        for name, file in self.files.items():
            shown = f"{SOURCES}*" if name.startswith(SOURCES) else name
            sizes[shown] = sizes.get(shown, 0) + (len(file) if isinstance(file, bytes) else file.stat().st_size)
        return sizes


def space_files(
    repo_id: str, models: Sequence[str], *, title: str | None = None, package: str | None = None
) -> SpaceFiles:
    """Return the files that `deploy` uploads.

    Args:
        repo_id: the Space, as `organisation/name`.
        models: zoo names and repositories of the Hub.
        title: of the page; the name of the repository by default.
        package: what pip installs as nfzoo in the Space, such as `nfzoo==1.0`; by default the sources go with it.

    Raises:
        ConfigError: for no models, for a folder of this machine, and for a title or package that is more than a line.
        UnknownModelError, CheckpointError: for a name that is neither in the zoo nor a repository.
        HubError: for a name that no repository can have.
    """
    check_name(repo_id)
    if not models:
        raise ConfigError("a Space needs a model: name one of the zoo's or a repository of the Hub")
    sources, repositories = [], []
    for model in dict.fromkeys(models):
        if os.path.exists(model):
            raise ConfigError(
                f"{model!r} is on this machine, where a Space finds nothing: `nfzoo push {model} ORG/NAME` first, and "
                "name that repository"
            )
        repositories.append(repository_of(model).repo_id)
        sources.append(model if "/" not in model or model.startswith(HUB) else HUB + model)
    title = repo_id.rpartition("/")[2] if title is None else title
    for what, text, most in (("title", title, MOST_TITLE), ("package", package or "nfzoo", 300)):
        if not text.strip() or len(text) > most or not text.isprintable():
            raise ConfigError(f"the {what} of a Space must be one line of 1 to {most} characters, not {text[:80]!r}")
    record = {"models": sources, "nfzoo": __version__}
    files: dict[str, Path | bytes] = {
        CARD_FILE: _card(title, list(dict.fromkeys(repositories))).encode(),
        "app.py": _APP.encode(),
        RECORD_FILE: (json.dumps(record, indent=2) + "\n").encode(),
        "requirements.txt": ("\n".join(_requirements() if package is None else [package]) + "\n").encode(),
    }
    if package is None:
        files |= {f"{SOURCES}{name}": path for name, path in sorted(_sources())}
    return SpaceFiles(files, sources)


def _card(title: str, repositories: Sequence[str]) -> str:
    """Return the Space's card: the settings of nfzoo's own, with this title and these models."""
    own = SpaceCard(read_text(_HERE / CARD_FILE)).data.to_dict()
    settings = {**own, "title": title, "models": list(repositories), "tags": ["nfzoo", "image-classification"]}
    listed = "\n".join(f"- [{name}](https://huggingface.co/{name})" for name in repositories)
    text = f"""\
Give a picture, choose a model, and see its most probable labels. The models are Normalizer-Free networks:

{listed}

A model is fetched when it is first chosen; the last two stay in memory. `nfzoo space deploy` wrote this Space.
"""
    return f"---\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}---\n\n{text}"


def _requirements() -> list[str]:
    """Return what nfzoo needs of PyPI, without its extras. Gradio comes by the `sdk_version` of the card."""
    try:
        listed = importlib.metadata.requires("nfzoo") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "nfzoo is not installed here, so that its requirements are unknown; give --package"
        ) from error
    return [line for line in listed if "extra ==" not in line]


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield the name in the package, and the path on disk, of each of nfzoo's files."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in root.rglob("*"):
            inside = path.relative_to(root)
            hidden = any(part.startswith((".", "__pycache__")) for part in inside.parts)
            if path.is_file() and not hidden and (path.suffix in _SUFFIXES or path.name == "py.typed"):
                yield "/".join([*package.split(".")[1:], *inside.parts]), path


def deploy(
    repo_id: str,
    models: Sequence[str],
    *,
    title: str | None = None,
    package: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Create or update a Space as one commit; return its address.

    Files that an earlier `deploy` put there and that are no longer part of it are removed; all others stay.

    Args:
        repo_id, models, title, package: see `space_files`.
        private: make a new Space private; its organisation's default by default.
        overwrite: take a Space that `deploy` did not make.
        token: as in `from_pretrained`; it must allow writing.
        commit_message: "Deploy with nfzoo VERSION" by default.

    Raises:
        HubError: where the Hub refuses or cannot be reached, and for a Space that `deploy` did not make.
        ConfigError, UnknownModelError, CheckpointError: see `space_files`; nothing is sent.
    """
    content = space_files(repo_id, models, title=title, package=package)
    api = HfApi(token=token)
    with refusals(f"spaces/{repo_id}"):
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        present = set(api.list_repo_files(repo_id, repo_type="space"))
        foreign = sorted(present - {*_OWN})
        if foreign and RECORD_FILE not in present and not overwrite:
            raise HubError(
                f"the Space {repo_id!r} holds {foreign[0]!r}, which `nfzoo space deploy` did not put there; give "
                "another name, or pass --overwrite"
            )
        api.create_commit(
            repo_id,
            [*_additions(content.files), *_removals(present, content.files)],
            repo_type="space",
            commit_message=commit_message or f"Deploy with nfzoo {__version__}",
        )
    return str(url)


def _additions(files: Mapping[str, Path | bytes]) -> Iterator[CommitOperationAdd]:
    for name, file in files.items():
        yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))


def _removals(present: set[str], files: Mapping[str, Path | bytes]) -> Iterator[CommitOperationDelete]:
    for name in sorted(present - files.keys()):
        if name.startswith(SOURCES):
            yield CommitOperationDelete(path_in_repo=name)
